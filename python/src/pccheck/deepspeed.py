"""DeepSpeed: checkpoints of an engine in a region, durable before their tag is announced.

>>> engine, *_ = deepspeed.initialize(...)                          # doctest: +SKIP
>>> engine.checkpoint_engine = RegionCheckpointEngine()              # doctest: +SKIP
>>> engine.save_checkpoint("checkpoints")                            # doctest: +SKIP
>>> engine.load_checkpoint("checkpoints")                            # doctest: +SKIP

DeepSpeed has no setting for foreign checkpoint engines: assign it, on every rank, after ``deepspeed.initialize``. What
stands in the folders of the tags are small reference files, see :mod:`pccheck.torch.paths`. DeepSpeed's own offline
scripts (``zero_to_fp32.py``) read its pickled files only, and what its ``save_16bit_model`` writes is a reference too:
``python -m pccheck convert`` makes an ordinary file of it.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator  # type: ignore[import-untyped, unused-ignore]
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (  # type: ignore[import-untyped, unused-ignore]
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # type: ignore[import-untyped, unused-ignore]
from deepspeed.runtime.zero.config import ZeroStageEnum  # type: ignore[import-untyped, unused-ignore]
from deepspeed.utils.tensor_fragment import fragment_address  # type: ignore[import-untyped, unused-ignore]

from . import errors, files
from .torch.paths import PathStore, default_rank, load_reference

__all__ = ["RegionCheckpointEngine"]

#: what cleanup() waits at most
_CLEANUP_SECONDS = 60.0


class RegionCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """A ``CheckpointEngine`` that keeps what a rank saves below a folder in one region of that folder.

    Args:
        config_params: as DeepSpeed's own engines take it; not used.
        decoupled: ``save_checkpoint`` returns when this rank's state is copied, and DeepSpeed announces the tag at the
            next update of the model, which waits until it is durable; call :meth:`finish` after the last one. Else
            ``save_checkpoint`` waits.
        options: of :class:`pccheck.torch.paths.PathStore`, but for ``on_error``.
    """

    def __init__(self, config_params: Any = None, *, decoupled: bool = False, **options: Any) -> None:
        super().__init__(config_params)
        self.name = "RegionCheckpointEngine"
        if "on_error" in options:
            raise errors.InvalidArgument("on_error is not an option here: a tag that is announced must be complete")
        self._decoupled = decoupled
        self._options = options
        self._stores: dict[Path, PathStore] = {}
        self._current: PathStore | None = None
        self._info: CheckpointCommitInfo | None = None
        self._failure: errors.PccheckError | OSError | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Called before the saves of a tag."""
        if self._info is not None:
            # DeepSpeed would forget the tag: it has not reached the update at which it announces it.
            self._announce(self._info)
        folder = Path(os.path.realpath(info.save_dir))
        if folder not in self._stores:
            self._stores[folder] = PathStore(folder, **self._options)
        self._current = self._stores[folder]
        self._info = info

    def save(self, state_dict: Any, path: str) -> None:
        """Saves a state at ``path``; it may change on return. It is durable after :meth:`commit`, which tells failures:
        between the two all ranks wait for each other.
        """
        if self._current is None:
            raise errors.InvalidState(f"save of {path} before create()", path=str(path))
        step = state_dict.get("global_steps", 0) if isinstance(state_dict, dict) else 0
        try:
            self._current.save(_plain(state_dict), path, step=step if isinstance(step, int) else 0)
        except (errors.PccheckError, OSError) as why:
            self._failure = self._failure or why

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state at ``path``, verified, in host memory unless ``map_location`` says otherwise."""
        for folder, store in self._stores.items():
            if folder in Path(os.path.realpath(path)).parents:
                return _restored(store.load(path, map_location))
        return _restored(load_reference(path, map_location))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Returns True when everything that any rank has saved of the tag is durable.

        Raises:
            UnsupportedValue: of client state that cannot be represented, naming where it is.
            PccheckError: why a save of this rank failed, or that one of another rank has. The tag is not announced.
        """
        failure, self._failure, self._info = self._failure, None, None
        try:
            if self._current is not None:
                self._current.wait()
        except (errors.PccheckError, OSError) as why:
            failure = failure or why
        failed_ranks = _count_of_ranks(failure is not None)
        if failure is not None:
            raise failure
        if failed_ranks:
            raise errors.IoFailed(
                f"{failed_ranks} other ranks could not save the tag {info.tag}",
                operation="commit",
                path=os.path.join(info.save_dir, info.tag),  # noqa: PTH118 - texts
                advice="see their errors; load an earlier tag",
            )
        return True

    def is_decoupled(self) -> bool:
        """What ``decoupled`` says."""
        return self._decoupled

    def get_commit_info(self) -> CheckpointCommitInfo | None:
        """The tag that is not committed yet; None where there is none."""
        return self._info

    def preserves_storage_sharing(self) -> bool:
        """False: of a tensor that is a part of a larger one only the part is saved, so that no clone is needed."""
        return False

    def finish(self) -> None:
        """Commits and announces the last tag. Where ``decoupled``, call it on every rank after the last save.

        Raises:
            PccheckError: as :meth:`commit`.
        """
        if self._info is not None:
            self._announce(self._info)

    def cleanup(self) -> None:
        """Waits, for a minute at most, until what this rank saved is durable, and closes the regions.

        DeepSpeed calls it where ``decoupled``, also while one rank alone ends: it does not wait for other ranks. With
        more than one, a tag for which neither an update nor :meth:`finish` came is therefore not announced.

        Raises:
            PccheckError: why a save of this rank failed.
        """
        info, failure, stores = self._info, self._failure, self._stores
        self._info = self._failure = self._current = None
        self._stores = {}
        for store in stores.values():
            try:
                store.close(_CLEANUP_SECONDS)
            except (errors.PccheckError, OSError) as why:
                failure = failure or why
        if failure is not None:
            raise failure
        if info is not None and _ranks() == 1:
            self._announce(info)
        elif info is not None:
            warnings.warn(
                f"tag {info.tag} of {info.save_dir} is saved but not announced in its file 'latest': call "
                "checkpoint_engine.finish() on every rank after the last save_checkpoint(); to load it name the tag",
                RuntimeWarning,
                stacklevel=2,
            )

    def _announce(self, info: CheckpointCommitInfo) -> None:
        """Commits a tag that DeepSpeed did not come to commit."""
        self.commit(info)
        if self._decoupled and info.save_latest and default_rank() == 0:
            with files.replaced_file(Path(info.save_dir, "latest")) as beside:
                beside.write_text(info.tag)


def _ranks() -> int:
    distributed = torch.distributed
    alone = not distributed.is_available() or not distributed.is_initialized()
    return 1 if alone else distributed.get_world_size()


def _count_of_ranks(flag: bool) -> int:
    """On how many ranks ``flag`` is true; every rank waits for all."""
    if _ranks() == 1:
        return int(flag)
    device = get_accelerator().current_device_name()
    count = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(count)
    return int(count.item())


# DeepSpeed's own classes in what it saves, as plain values and back.

_TAG = "pccheck.deepspeed"


def _object(kind: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def make(attributes: Any) -> Any:
        made: Any = object.__new__(kind)
        made.__dict__.update(attributes)
        return made

    return lambda value: dict(vars(value)), make


_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "LossScaler": (LossScaler, *_object(LossScaler)),
    "DynamicLossScaler": (DynamicLossScaler, *_object(DynamicLossScaler)),
    "ZeroStageEnum": (ZeroStageEnum, lambda value: value.value, ZeroStageEnum),
    "fragment_address": (
        fragment_address,
        lambda value: [value.numel, value.start],
        lambda value: fragment_address(numel=value[0], start=value[1]),
    ),
}
_NAME_OF = {kind: name for name, (kind, _, _) in _KINDS.items()}


def _plain(value: Any) -> Any:
    """The tree with DeepSpeed's own objects as tagged dicts."""
    name = _NAME_OF.get(type(value))
    if name is not None:
        return {_TAG: name, "value": _KINDS[name][1](value)}
    if isinstance(value, dict) and _TAG in value:
        raise errors.UnsupportedValue(f"the key {_TAG!r} is PCcheck's own", at=_TAG)
    return _mapped(value, _plain)


def _restored(value: Any) -> Any:
    """The tree as DeepSpeed gave it."""
    if type(value) is dict and _TAG in value:
        known = _KINDS.get(value[_TAG])
        if known is None:
            raise errors.Unsupported(f"the state holds a {value[_TAG]!r:.80}", advice="install a newer pccheck")
        return known[2](value["value"])
    return _mapped(value, _restored)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a container with each element changed; the container itself where none is."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        changed = {key: change(element) for key, element in value.items()}
        if all(changed[key] is element for key, element in value.items()):
            return value
        made: Any = kind(changed)
        if kind is OrderedDict:
            made.__dict__.update(vars(value))
        return made
    if kind in (list, tuple):
        elements = [change(element) for element in value]
        return value if all(a is b for a, b in zip(elements, value, strict=True)) else kind(elements)
    return value
