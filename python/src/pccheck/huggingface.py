"""Hugging Face Transformers: a callback that checkpoints a ``Trainer`` into a region, and resumes it.

Usage::

    callback = pccheck.huggingface.RegionCallback("run.pccheck", every=10)
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.resume_folder())

Needs the extra ``pccheck[huggingface]``. Models, optimizers and schedulers that Accelerate has prepared can also be
given to :class:`pccheck.torch.Checkpointer` as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import errors, resume_folders, trees
from .checkpoint import Checkpoint
from .dtypes import to_torch
from .store import Store
from .torch import TREE_KEY, Checkpointer
from .torch.rng import RngMember
from .torch.sizing import region_path

__all__ = ["RegionCallback"]

# What the Trainer looks for in the folder that it resumes from.
_WEIGHTS = "model.safetensors"
_TRAINER_STATE = "trainer_state.json"


class RegionCallback(TrainerCallback):
    """Saves a Trainer's model, optimizer, scheduler, state and random-number generators every few steps.

    The Trainer's own saving (``save_strategy``) may stay on, for the folders that other tools read, or be "no".

    Args:
        path: of the region, made when it is missing; ``{rank}`` is replaced by the process's rank.
        every: save when ``global_step % every == 0``.
        start_anew: train from the beginning although the region holds checkpoints: they are discarded.
        options: of :class:`pccheck.torch.Checkpointer`, such as ``max_in_flight``, ``keep``, ``keep_best``.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, every: int = 1, start_anew: bool = False, **options: Any
    ) -> None:
        self.path = os.fspath(path)
        #: the checkpointer, while training
        self.checkpointer: Checkpointer | None = None
        self._every = every
        self._start_anew = start_anew
        self._options = options
        self._progress: dict[str, Any] = {}
        self._resuming: str | None = None
        self._rng_due = 0
        self._rng = _Later(RngMember())

    def resume_folder(self) -> str | None:
        """Makes the folder to give to ``Trainer.train(resume_from_checkpoint=...)``; None: there is no checkpoint.

        It lies in ``<region>.resume``, which only its owner may enter, holds the model's weights and the Trainer's
        state of the newest step that every rank holds, and is removed once training has begun. Everything else is
        restored from the region itself when training begins. What a killed process has left there is replaced.

        Raises:
            AlreadyExists: something that was not made here has the name ``<region>.resume``. Nothing was changed.
            StateMismatch: the region was not written by a RegionCallback.
            NotFound: the ranks hold checkpoints, but of no common step.
            IoFailed: the folder could not be made.
        """
        path = region_path(self.path)
        held = _steps_held(path)
        everywhere = _common_steps(held)
        if not everywhere:
            return None
        with Store(path, read_only=True, durability="process") as store, store.open(step=max(everywhere)) as checkpoint:
            beside = Path(f"{path}.resume")
            resume_folders.make(beside)
            folder = beside / f"checkpoint-{checkpoint.step}"
            try:
                folder.mkdir(mode=0o700)
                _export(checkpoint, folder)
            except BaseException:
                with contextlib.suppress(errors.AlreadyExists, OSError):
                    resume_folders.remove(beside)
                raise
        self._resuming = str(folder)
        return self._resuming

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()
        members = {
            "model": kwargs["model"],
            "optimizer": kwargs["optimizer"],
            "scheduler": kwargs["lr_scheduler"],
            "progress": self._progress,
            "generators": self._rng,
        }
        self.checkpointer = Checkpointer(self.path, every=self._every, rng=False, **{**self._options, **members})
        if self._resuming is not None:
            restored = self.checkpointer.restore(step=state.global_step)
            _remove_used(Path(self._resuming).parent)
            self._resuming = None
            # The Trainer draws numbers when it makes and skips batches: ours are due before and after that.
            self._rng_due = 2 if restored is not None else 0
        elif self._start_anew:
            self.checkpointer.discard()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._rng_due == 2:
            self._rng.load_now()
            # At the beginning of an epoch nothing is skipped: what making the batches draws is drawn as it was.
            self._rng_due = 0 if float(state.epoch or 0).is_integer() else 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._rng_due == 1:
            self._rng.load_now()
            self._rng_due = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.checkpointer is None:
            raise errors.InvalidState("the callback was not told that training began; add it before trainer.train()")
        self._progress.clear()
        self._progress.update(dataclasses.asdict(state))
        self.checkpointer.step(state.global_step, _last_metrics(state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()
            self.checkpointer = None


class _Later:
    """The generators' state, restored when the Trainer is ready for it rather than with everything else."""

    def __init__(self, generators: RngMember) -> None:
        self._generators = generators
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._generators.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["state"]

    def load_now(self) -> None:
        self._generators.set_state(self._loaded)


def _steps_held(path: str) -> set[int]:
    """Steps of this rank's intact checkpoints."""
    held: set[int] = set()
    if not Path(path).exists():
        return held
    with Store(path, read_only=True, durability="process") as store:
        for info in store.checkpoints():
            with contextlib.suppress(errors.Corrupt, errors.NotFound), store.open(generation=info.generation):
                held.add(info.step)
    return held


def _common_steps(held: set[int]) -> set[int]:
    """Steps that every rank holds."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return held
    of_all: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, held)
    common = set.intersection(*of_all)
    if not common and any(of_all):
        shown = ", ".join(f"rank {rank}: {sorted(steps) or 'none'}" for rank, steps in enumerate(of_all))
        raise errors.NotFound(
            f"no step is held by all ranks ({shown})",
            advice="a larger keep lets the ranks' steps meet: K of N + 1 or more",
        )
    return common


def _last_metrics(state: TrainerState) -> dict[str, float]:
    """Numbers of the latest log, for ``keep_best``."""
    latest = state.log_history[-1] if state.log_history else {}
    return {name: float(value) for name, value in latest.items() if isinstance(value, (int, float))}


def _export(checkpoint: Checkpoint, folder: Path) -> None:
    text = checkpoint.metadata.get(TREE_KEY)
    if text is None:
        raise errors.StateMismatch("the checkpoint was not made by a RegionCallback", path=checkpoint.path)
    # Names only: weights are read below, the rest not at all.
    tree = trees.unflatten(text, lambda name, kind: name)
    if not isinstance(tree, dict) or "model" not in tree or "progress" not in tree:
        raise errors.StateMismatch(
            "the checkpoint was not made by a RegionCallback: it lacks the model or the Trainer's progress",
            path=checkpoint.path,
        )
    weights: dict[str, torch.Tensor] = {}
    for key, name in tree["model"].items():
        info = checkpoint.tensors[name]
        weights[key] = torch.empty(info.shape, dtype=to_torch(info.dtype))
    checkpoint.read_into({tree["model"][key]: tensor for key, tensor in weights.items()})
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _TRAINER_STATE).write_text(json.dumps(tree["progress"]))
    # Both were made with the mode that the umask leaves, in a folder that nobody else may enter.
    for name in (_WEIGHTS, _TRAINER_STATE):
        (folder / name).chmod(0o600)


def _remove_used(folder: Path) -> None:
    try:
        resume_folders.remove(folder)
    except (errors.AlreadyExists, OSError) as why:
        # Training has all that it needs.
        warnings.warn(f"{folder} could not be removed: {why}", RuntimeWarning, stacklevel=2)
