"""The trainer's checkpointer: three lines in a training script."""

from __future__ import annotations

import json
import math
import operator
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import errors, trees
from ..checkpoint import CheckpointInfo
from ..save import Save
from ..store import Store
from . import exits, sizing
from .home import Home, HomeOptions
from .hooks import GradientWatch, UpdateHooks
from .members import Member, members_of
from .outcomes import CheckpointWarning, Outcomes
from .restoring import GRADIENTS, TREE_KEY, restore_newest
from .retention import PINNED_KEY, TRAINER_KEY, Best, Retention
from .rng import RNG, RngMember
from .settling import InFlight, Settler
from .snapshot import Snapshot, take

__all__ = ["Checkpointer"]


class Checkpointer:
    """Saves a training run's state every few iterations, and restores it.

    Usage::

        checkpointer = pccheck.torch.Checkpointer("run.pccheck", model=model, optimizer=optimizer)
        last = checkpointer.restore()                    # None: nothing to restore
        for i in range(0 if last is None else last + 1, steps):
            ...                                          # forward, backward
            optimizer.step()
            checkpointer.step(i)                         # saves when due, returns at once

    What is saved is the state as it is when :meth:`step` is called. Parameters and optimizer state are copied while
    forward and backward of the next iteration run; before the next update the checkpointer waits, by itself, through
    torch's optimizer hooks. Where something else updates them (an EMA kept in parameters, an update written by hand, a
    step replayed as a CUDA graph), call :meth:`before_update` ahead of it. Everything else (buffers, RNG, schedulers,
    Python values) is captured before :meth:`step` returns. A snapshot of which torch has
    counted an in-place change by then is not committed: the save fails and says which tensors changed.

    State on CUDA devices is copied by their copy engines while the next iteration runs: :meth:`step` does not wait for
    the GPU, and before the next update torch's current stream waits for the copies, not the host, as soon as all are
    enqueued (``snapshot`` says when that is). State on other devices is copied to host memory by torch before
    :meth:`step` returns.

    Args:
        path: of the region, made when it is missing; ``{rank}`` in it is replaced by torch.distributed's rank, of
            which each needs a region of its own.
        every: save when ``step % every == 0``.
        max_in_flight: N, saves in flight at once.
        keep: K, newest checkpoints kept.
        keep_every: keep the checkpoint of every M-th step for good.
        keep_best: keep the best by a metric, see :class:`Best`.
        rng: save and restore the global random-number generators.
        gradients: save gradients too, so that a save in the middle of gradient accumulation is allowed. Such a save
            waits until all is copied before it returns.
        on_error: "warn" (a failed save warns, is counted, training goes on) or "raise" (in the next call).
        exit_timeout: seconds that normal exit and SIGTERM give to saves in flight.
        on_sigterm: finish saves in flight on SIGTERM, then do what the program or the system does on it.
        debug: hash what is copied in the background before and after, which finds changes that bypass torch's version
            counters (such as ``tensor.data``). Slow.
        snapshot: where state on CUDA devices goes first. "staging": the staging pool; with one as large as the state
            the host does not wait before updates. "spare": spare memory of the GPU, as much as the state takes, at the
            speed of that memory, so that even a save per iteration hardly delays the update. "auto": spare where there
            is room.
        direct_storage: "auto" has state on one CUDA device go from spare memory (so ``snapshot`` must be "spare" or
            "auto") to the file past host memory, where that is possible; see :meth:`pccheck.Store.save`.
        flag_waits: where the staging pool is smaller than the state, not the host waits before updates, but the GPU's
            stream; see :meth:`pccheck.Store.save`.
        durability, medium, staging_bytes, chunk_bytes, writers, lock_timeout: see :class:`pccheck.Store`.
        slot_timeout: seconds that :meth:`step` waits for a slot while N saves are in flight, and before the region
            grows.
        update_timeout: seconds that an update waits until the state is copied; then the save is cancelled, and counts
            as failed. With ``flag_waits`` they count from the call that saves.
        members: what is saved: modules, optimizers, anything with ``state_dict`` and ``load_state_dict``, dicts, lists,
            tensors, generators of torch, numpy and Python; or lists and dicts of stateful things.

    Raises:
        NoSpace: the disk is too small for all slots; found here, before training starts.
        InUse: another trainer has the region open.
        NotARegion, AlreadyExists: the path holds something else, which was not touched.
        InvalidArgument: a member cannot be restored in place, or an argument is out of range.

    Threads: one thread may call the methods; the engine's threads and one of Python live as long as the checkpointer.
    None is started per save.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
        max_in_flight: int = 2,
        keep: int = 1,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        rng: bool = True,
        gradients: bool = False,
        on_error: str = "warn",
        exit_timeout: float = 30.0,
        on_sigterm: bool = True,
        debug: bool = False,
        snapshot: str = "staging",
        direct_storage: str = "off",
        flag_waits: bool = False,
        durability: str = "power",
        medium: str = "auto",
        staging_bytes: int | None = None,
        chunk_bytes: int | None = None,
        writers: int | None = None,
        lock_timeout: float | None = 10.0,
        slot_timeout: float | None = 60.0,
        update_timeout: float | None = 300.0,
        **members: Any,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise errors.InvalidArgument(f"every={every!r}: expected a number of steps, 1 or more")
        if not isinstance(rng, bool) or not isinstance(gradients, bool):
            raise errors.InvalidArgument("rng and gradients are switches: give members of these names other names")
        if not members:
            raise errors.InvalidArgument("expected something to save, such as model=model, optimizer=optimizer")
        self.every = every
        self.exit_timeout = exit_timeout
        self.pid = os.getpid()
        self._outcomes = Outcomes(on_error)
        self._members: dict[str, Member] = members_of(members)
        if rng:
            self._members[RNG] = RngMember()
        self._gradients = gradients
        self._debug = debug
        self._known = trees.Known()
        self._update_timeout = update_timeout
        self._slot_timeout = slot_timeout
        self._retention = Retention(keep_every, keep_best)
        self._home = Home(
            sizing.region_path(path),
            sizing.estimate(self._members.values(), gradients),
            HomeOptions(
                max_in_flight=max_in_flight,
                keep=keep,
                pinned=self._retention.first_pins,
                durability=durability,
                medium=medium,
                staging_bytes=staging_bytes,
                chunk_bytes=chunk_bytes,
                writers=writers,
                lock_timeout=lock_timeout,
                drain_timeout=slot_timeout,
                snapshot=snapshot,
                direct_storage=direct_storage,
                flag_waits=flag_waits,
                # The stream waits then, and nobody who could give a save up.
                gpu_timeout=update_timeout if flag_waits else None,
            ),
        )
        self._retention.adopt(self._home.store)
        #: False while the region holds checkpoints that were neither restored nor given up
        self._may_save = not self._home.store.checkpoints()
        targets = [member.target for member in self._members.values()]
        self._watch = GradientWatch(target for target in targets if isinstance(target, torch.optim.Optimizer))
        self._told_of_missed_updates = False
        self._closed = False
        self._settler = Settler(update_timeout)
        self._hooks = UpdateHooks(self, Checkpointer.before_update, Checkpointer._on_updated)
        exits.finish_at_exit(self, on_sigterm=on_sigterm)

    # ---- saving -------------------------------------------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> Save | None:
        """Saves when due (``step % every == 0``, or a metric makes it a best one); call it after the optimizer's step.

        Returns at once, before anything is durable. Reports saves that failed since the last call.

        Args:
            step: the iteration that was just finished.
            metrics: name -> value, kept with the checkpoint; see ``keep_best``.

        Returns:
            The save, to wait for where one wants to; None where none was due or it could not begin.

        Raises:
            InvalidState: gradients were accumulated since the last update, and ``gradients`` is not set; or the region
                holds checkpoints and :meth:`restore` was not called.
            UnsupportedValue: the state holds something that cannot be represented; names where.
            PccheckError: with ``on_error="raise"``, why a save failed.
        """
        self._check_open()
        self._note_missed_update()
        self._report()
        step, numbers = operator.index(step), _numbers(metrics)
        if step % self.every != 0 and not self._retention.wants_pin(step, numbers):
            return None
        return self._save(step, numbers)

    def save(self, step: int, metrics: Mapping[str, float] | None = None) -> Save | None:
        """As :meth:`step`, but saves now, whether or not it is due."""
        self._check_open()
        self._report()
        return self._save(operator.index(step), _numbers(metrics))

    def _save(self, step: int, metrics: dict[str, float]) -> Save | None:
        self._check_may_save()
        self._settler.settle(self._update_timeout)
        pinned = self._retention.wants_pin(step, metrics)
        try:
            snapshot = take(self._tree(), self._steady(), hashes=self._debug, known=self._known)
            save = self._home.begin(
                step,
                snapshot.tensors,
                {
                    TREE_KEY: snapshot.json,
                    TRAINER_KEY: _trainer_text(step, metrics, snapshot, self._retention.why_pinned(step, metrics)),
                },
                pin=pinned,
                confirm=True,
                timeout=self._slot_timeout,
            )
        except (errors.InvalidArgument, errors.UnsupportedValue):
            # A defect of the state, which would be there at every save.
            raise
        except MemoryError as why:
            self._outcomes.failed(step, errors.OutOfMemory(f"capture the state: {why}", operation="save"))
            self._outcomes.raise_unraised()
            return None
        except errors.PccheckError as why:
            self._outcomes.failed(step, why)
            self._outcomes.raise_unraised()
            return None
        flight = InFlight(save, snapshot, step, metrics, pinned)
        # In this order: a save that was listed and never settled would be waited for in vain.
        self._settler.submit(flight)
        self._outcomes.begun(flight)
        if snapshot.urgent or self._gradients:
            # All is copied then: no update that comes later is missed.
            self._settler.before_update()
        return save

    def _check_may_save(self) -> None:
        if not self._may_save:
            raise errors.InvalidState(
                f"{self.path} holds checkpoints, which new saves would replace",
                path=self.path,
                advice="call restore() first, or discard() to start anew",
            )
        if not self._gradients and self._watch.accumulating():
            raise errors.InvalidState(
                "gradients were accumulated since the last update, and a checkpoint without them could not be resumed",
                advice="save after optimizer.step(), or pass gradients=True",
            )

    def _tree(self) -> dict[str, Any]:
        tree = {name: member.state() for name, member in self._members.items()}
        if self._gradients:
            tree[GRADIENTS] = {name: p.grad for name, p in self._parameters().items() if p.grad is not None}
        return tree

    def _steady(self) -> list[torch.Tensor]:
        steady = [tensor for member in self._members.values() for tensor in member.steady()]
        if self._gradients:
            steady += [p.grad for p in self._parameters().values() if p.grad is not None]
        return steady

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, member in self._members.items()
            if isinstance(member.target, torch.nn.Module)
            for key, parameter in member.target.named_parameters()
        }

    # ---- waiting ------------------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """Waits until the last snapshot is copied: what it saves may change after this.

        torch's optimizers do it by themselves. Call it before updates that are not made by one.
        """
        self._settler.before_update()

    def _on_updated(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._gradients:
            self._watch.updated(optimizer)

    def _note_missed_update(self) -> None:
        """Says so, once, where saved tensors changed although neither a hook nor before_update() came before."""
        if not self._told_of_missed_updates and self._settler.missed_update():
            self._told_of_missed_updates = True
            warnings.warn(
                "parameters or optimizer state changed after a save although no optimizer's hook ran and "
                "before_update() was not called: call it before updates that torch's optimizers do not make, or saves "
                "will fail whenever such a change comes before they are copied",
                CheckpointWarning,
                stacklevel=3,
            )

    # ---- outcomes -----------------------------------------------------------------------------------------------

    @property
    def failures(self) -> int:
        """Saves that failed so far."""
        return self._outcomes.failures

    @property
    def last_error(self) -> errors.PccheckError | None:
        """Why the last failed save failed."""
        return self._outcomes.last_error

    def _collect(self) -> None:
        for flight, durable in self._outcomes.collect():
            # A region that could not be opened again after growing is looked at when it can.
            if flight.pinned and not self._home.closed:
                self._retention.durable(self._home.store, flight.step, durable.generation, flight.metrics)

    def _report(self) -> None:
        self._collect()
        self._outcomes.raise_unraised()

    def finish(self, timeout: float | None = None) -> bool:
        """Waits until the saves in flight have ended, for at most ``timeout`` seconds. True: all of them have.

        Failures are counted, and reported by the next call.
        """
        if self._closed or self._home.closed:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        self._settler.settle(timeout, give_up=False)
        ended = self._outcomes.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._collect()
        return ended

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the saves in flight are durable.

        Raises:
            TimedOut: they go on.
            PccheckError: with ``on_error="raise"``, why one failed.
        """
        self._check_open()
        if not self.finish(timeout):
            raise errors.TimedOut(f"saves are still in flight after {timeout} s; they go on", advice="wait again")
        self._outcomes.raise_unraised()

    def close(self, timeout: float | None = None) -> None:
        """Finishes the saves in flight, within ``timeout`` seconds (None: ``exit_timeout``), and closes the region.

        Raises:
            PccheckError: with ``on_error="raise"``, why a save failed. The region is closed all the same.
        """
        if self._closed:
            return
        self._hooks.remove()
        if self.pid != os.getpid():
            # The saves are the parent's.
            self._closed = True
            exits.forget(self)
            return
        self.finish(self.exit_timeout if timeout is None else timeout)
        exits.forget(self)
        self._closed = True
        # Cancels what could not finish in time, which the settling thread may be waiting for.
        self._home.close()
        self._settler.close()
        # What could not finish in time was cancelled by closing.
        self._outcomes.collect()
        self._outcomes.raise_unraised()

    def __del__(self) -> None:
        # Attributes are missing where the constructor failed.
        if getattr(self, "_closed", True) is False and self.pid == os.getpid():
            warnings.warn(f"{self!r} was not closed; closing it now", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<pccheck.torch.Checkpointer {self.path!r}{' closed' if self._closed else ''}>"

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- restoring ----------------------------------------------------------------------------------------------

    def restore(
        self,
        *,
        step: int | None = None,
        generation: int | None = None,
        strict: bool = True,
        only: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> int | None:
        """Fills everything from the newest checkpoint, in place, and returns its step; None where there is none.

        Every byte is verified; where a checkpoint is damaged, the next older one is taken, with a warning.

        Args:
            step: restore the newest checkpoint of this step instead.
            generation: restore exactly this checkpoint.
            strict: refuse where names or dtypes differ; else what fits is restored. Shapes must always agree.
            only: prefixes of names, such as ``["model.encoder"]``: restore these alone, and leave the rest. Of members
                that are no modules only all can be restored.
            device: where parameters on the meta device get their memory.

        Raises:
            StateMismatch: lists missing, unexpected and mismatched names. Nothing was changed, unless a warning
                has said that a newer checkpoint is damaged.
            InvalidArgument: ``only`` names nothing that there is. Nothing was changed.
            NotFound: the asked-for checkpoint does not exist.
            Corrupt: every candidate is damaged; the state is unspecified then.
        """
        self._check_open()
        self._settler.settle(self._update_timeout)
        found = restore_newest(
            self._home.store,
            self._members,
            step=step,
            generation=generation,
            strict=strict,
            only=(only,) if isinstance(only, str) else tuple(only),
            device=torch.device(device),
            gradients=self._parameters() if self._gradients else None,
        )
        self._may_save = True
        self._watch.forget()
        self._settler.forget()
        return None if found is None else found.step

    def discard(self) -> int:
        """Durably discards all checkpoints of the region, pinned ones too, so that a run may start anew.

        Returns how many went.
        """
        self._check_open()
        self.finish()
        count = self._home.store.discard_newer(0)
        self._retention.adopt(self._home.store)
        self._may_save = True
        return count

    def checkpoints(self) -> list[CheckpointInfo]:
        """The durable checkpoints, newest first."""
        self._check_open()
        return self._home.store.checkpoints()

    @property
    def path(self) -> str:
        """Path of the region."""
        return self._home.path

    @property
    def store(self) -> Store:
        """The open store, for pins, statistics and repairs. It is replaced when the region grows: do not keep it."""
        self._check_open()
        return self._home.store

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    def _check_open(self) -> None:
        if self.pid != os.getpid():
            raise errors.Forked("the checkpointer was made before this process was forked; make another one here")
        if self._closed:
            raise errors.InvalidState("the checkpointer is closed; make another one")


def _numbers(metrics: Mapping[str, float] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (metrics or {}).items()}


def _trainer_text(step: int, metrics: Mapping[str, float], snapshot: Snapshot, pinned: str | None) -> str:
    # JSON has no numbers for what is not finite.
    shown = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    trainer = {"version": 1, "step": step, "metrics": shown, "torch": torch.__version__}
    if pinned is not None:
        trainer[PINNED_KEY] = pinned
    if snapshot.shardings:
        trainer["shardings"] = snapshot.shardings
    return json.dumps(trainer)
