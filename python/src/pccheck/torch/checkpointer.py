"""The trainer's checkpointer: three lines in a training script."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import errors
from ..checkpoint import CheckpointInfo
from ..save import Save
from ..store import Store
from . import exits, sizing
from .home import Home, HomeOptions
from .hooks import GradientWatch, UpdateHooks
from .members import Member, members_of
from .restoring import Restored, restore_newest
from .retention import TRAINER_KEY, Best, Retention
from .rng import RngMember
from .snapshot import Snapshot, take

__all__ = ["Checkpointer", "CheckpointWarning", "TREE_KEY"]

#: metadata key of the state's tree, see docs/trees.md
TREE_KEY = "tree"
_RNG = "rng"
_GRADIENTS = "gradients"


class CheckpointWarning(UserWarning):
    """A save failed, or a snapshot could not be vouched for; training goes on."""


@dataclass
class _Pending:
    """A save whose tensors the engine still reads, or whose snapshot has not been checked."""

    save: Save
    snapshot: Snapshot
    step: int
    settled: bool = False


@dataclass
class _Begun:
    save: Save
    step: int
    metrics: dict[str, float]
    pinned: bool


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
    Python values) is captured before :meth:`step` returns. A snapshot whose tensors were changed too early is never
    committed: the save fails and says which.

    State in device memory is copied to host memory by torch before :meth:`step` returns.

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
        durability, medium, staging_bytes, chunk_bytes, writers, lock_timeout: see :class:`pccheck.Store`.
        slot_timeout: seconds that :meth:`step` waits for a slot while N saves are in flight.
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
        durability: str = "power",
        medium: str = "auto",
        staging_bytes: int | None = None,
        chunk_bytes: int | None = None,
        writers: int | None = None,
        lock_timeout: float | None = 10.0,
        slot_timeout: float | None = 60.0,
        **members: Any,
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise errors.InvalidArgument(f"on_error={on_error!r}: expected 'warn' or 'raise'")
        if not isinstance(every, int) or every < 1:
            raise errors.InvalidArgument(f"every={every!r}: expected a number of steps, 1 or more")
        if _RNG in members or _GRADIENTS in members:
            raise errors.InvalidArgument(f"{_RNG!r} and {_GRADIENTS!r} are names of the checkpointer's own")
        if not members:
            raise errors.InvalidArgument("expected something to save, such as model=model, optimizer=optimizer")
        self.every = every
        self.exit_timeout = exit_timeout
        self.pid = os.getpid()
        #: saves that failed so far
        self.failures = 0
        #: why the last failed save failed
        self.last_error: errors.PccheckError | None = None
        self._members: dict[str, Member] = members_of(members)
        if rng:
            self._members[_RNG] = RngMember(_RNG)
        self._gradients = gradients
        self._on_error = on_error
        self._debug = debug
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
            ),
        )
        self._retention.adopt(self._home.store)
        #: False while the region holds checkpoints that were neither restored nor given up
        self._may_save = not self._home.store.checkpoints()
        self._lock = threading.RLock()
        self._pending: _Pending | None = None
        self._begun: list[_Begun] = []
        self._unraised: errors.PccheckError | None = None
        self._in_streak: str | None = None
        self._watch = GradientWatch()
        self._witness: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._told_of_missed_updates = False
        self._closed = False
        self._settler: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_settle_all, args=(weakref.ref(self), self._settler), daemon=True)
        self._thread.start()
        self._hooks = UpdateHooks(self, Checkpointer._on_update, Checkpointer._on_updated)
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
        self._note_missed_updates()
        self._collect()
        self._raise_unraised()
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if step % self.every != 0 and not self._retention.wants_pin(step, numbers):
            return None
        return self._save(step, numbers)

    def save(self, step: int, metrics: Mapping[str, float] | None = None) -> Save | None:
        """As :meth:`step`, but saves now, whether or not it is due."""
        self._check_open()
        self._collect()
        self._raise_unraised()
        return self._save(step, {name: float(value) for name, value in (metrics or {}).items()})

    def _save(self, step: int, metrics: dict[str, float]) -> Save | None:
        if not self._may_save:
            raise errors.InvalidState(
                f"{self.path} holds checkpoints, which new saves would replace: call restore() first, or discard() to "
                "start anew",
                path=self.path,
            )
        if not self._gradients and self._watch.accumulating():
            raise errors.InvalidState(
                "gradients were accumulated since the last update, and a checkpoint without them could not be resumed: "
                "save after optimizer.step(), or pass gradients=True"
            )
        self._settle()
        snapshot = take(self._tree(), self._steady(), hashes=self._debug)
        trainer = {"version": 1, "step": step, "metrics": metrics, "torch": torch.__version__}
        if snapshot.shardings:
            trainer["shardings"] = snapshot.shardings
        metadata = {TREE_KEY: snapshot.json, TRAINER_KEY: json.dumps(trainer)}
        pinned = self._retention.wants_pin(step, metrics)
        try:
            save = self._home.begin(
                step, snapshot.tensors, metadata, pin=pinned, confirm=True, timeout=self._slot_timeout
            )
        except (errors.InvalidArgument, errors.InvalidState):
            raise
        except errors.PccheckError as why:
            self._failed(step, why)
            self._raise_unraised()
            return None
        self._begun.append(_Begun(save, step, metrics, pinned))
        pending = _Pending(save, snapshot, step)
        self._pending = pending
        self._witness = [(weakref.ref(live.tensor), live.version) for live in snapshot.live[:8]]
        if snapshot.urgent or self._gradients:
            self._settle()
        else:
            self._settler.put(pending)
        return save

    def _tree(self) -> dict[str, Any]:
        tree = {name: member.state() for name, member in self._members.items()}
        if self._gradients:
            tree[_GRADIENTS] = {name: p.grad for name, p in self._parameters().items() if p.grad is not None}
        return tree

    def _steady(self) -> list[torch.Tensor]:
        steady = [tensor for member in self._members.values() for tensor in member.steady()]
        return steady + [p.grad for p in self._parameters().values() if p.grad is not None and self._gradients]

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
        self._witness = []
        self._settle()

    def _on_update(self) -> None:
        self.before_update()

    def _on_updated(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._gradients:
            self._watch.updated(optimizer)

    def _settle(self) -> None:
        """Waits until the pending snapshot is copied, checks that it is sound, and lets it commit."""
        pending = self._pending
        if pending is not None:
            self._settle_one(pending)

    def _settle_one(self, pending: _Pending) -> None:
        try:
            # Not under the lock: the trainer and the settling thread may both wait.
            pending.save.copied()
        except errors.PccheckError:
            # Its outcome says why.
            pending.settled = True
        with self._lock:
            if not pending.settled:
                pending.settled = True
                self._check_snapshot(pending)
            pending.snapshot.live.clear()
            if self._pending is pending:
                self._pending = None

    def _check_snapshot(self, pending: _Pending) -> None:
        changed = pending.snapshot.changed()
        if not changed:
            try:
                pending.save.confirm()
            except errors.PccheckError:
                # It has failed; its outcome says why.
                return
            return
        pending.save.cancel()
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        self._failed(
            pending.step,
            errors.InvalidState(
                f"the snapshot of step {pending.step} is torn and was not committed: {shown} changed before it was "
                "copied; call before_update() before what changes them",
                path=self.path,
            ),
        )

    def _note_missed_updates(self) -> None:
        """Says so where saved tensors changed although neither a hook nor before_update() came before."""
        if self._told_of_missed_updates or not self._witness:
            return
        for tensor, version in self._witness:
            alive = tensor()
            if alive is not None and alive._version != version:
                self._told_of_missed_updates = True
                warnings.warn(
                    "parameters or optimizer state changed after a save although no optimizer's hook ran and "
                    "before_update() was not called: call it before updates that torch's optimizers do not make, or "
                    "saves will fail whenever the change comes before they are copied",
                    CheckpointWarning,
                    stacklevel=3,
                )
                return

    # ---- outcomes -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Takes note of the saves that have ended."""
        going = []
        for begun in self._begun:
            try:
                durable = begun.save.durable(0)
            except errors.TimedOut:
                going.append(begun)
            except errors.Cancelled as why:
                # Torn snapshots are cancelled, and were reported when they were found.
                if not self._is_reported(begun.step):
                    self._failed(begun.step, why)
            except errors.PccheckError as why:
                self._failed(begun.step, why)
            else:
                self._in_streak = None
                if begun.pinned:
                    self._retention.durable(self._home.store, begun.step, durable.generation, begun.metrics)
        self._begun = going

    def _is_reported(self, step: int) -> bool:
        return isinstance(self.last_error, errors.InvalidState) and f"step {step} is torn" in self.last_error.message

    def _failed(self, step: int, why: errors.PccheckError) -> None:
        """Counts a failed save; warns once for each run of failures of one kind."""
        self.failures += 1
        self.last_error = why
        if self._on_error == "raise":
            self._unraised = self._unraised or why
        elif self._in_streak != type(why).__name__:
            self._in_streak = type(why).__name__
            warnings.warn(f"the save of step {step} failed, training goes on: {why}", CheckpointWarning, stacklevel=4)

    def _raise_unraised(self) -> None:
        why, self._unraised = self._unraised, None
        if why is not None:
            raise why

    def finish(self, timeout: float | None = None) -> bool:
        """Waits until the saves in flight have ended, for at most ``timeout`` seconds. True: all of them have.

        Failures are counted, and reported by the next call.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._closed or self._home.closed:
            return True
        pending = self._pending
        try:
            if pending is not None:
                pending.save.copied(timeout)
                self._settle_one(pending)
            for begun in list(self._begun):
                begun.save.durable(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except errors.TimedOut:
            return False
        except errors.PccheckError:
            # Counted below; the others go on.
            return self.finish(None if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            self._collect()
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the saves in flight are durable.

        Raises:
            TimedOut: they go on.
            PccheckError: with ``on_error="raise"``, why one failed.
        """
        self._check_open()
        if not self.finish(timeout):
            raise errors.TimedOut(f"saves are still in flight after {timeout} s; they go on, wait again")
        self._raise_unraised()

    def close(self, timeout: float | None = None) -> None:
        """Finishes the saves in flight, for at most ``timeout`` seconds (None: ``exit_timeout``), and closes the region.

        Raises:
            PccheckError: with ``on_error="raise"``, why a save failed. The region is closed all the same.
        """
        if self._closed:
            return
        if self.pid == os.getpid():
            self.finish(self.exit_timeout if timeout is None else timeout)
        self._closed = True
        self._hooks.remove()
        exits.forget(self)
        self._settler.put(None)
        if self.pid == os.getpid():
            self._thread.join()
            self._home.close()
        self._raise_unraised()

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
            only: prefixes of names, such as ``["model.encoder"]``: restore these alone, and leave the rest.
            device: where parameters on the meta device get their memory.

        Raises:
            StateMismatch: lists missing, unexpected and mismatched names. Nothing was changed.
            NotFound: the asked-for checkpoint does not exist.
            Corrupt: every candidate is damaged; the state is unspecified then.
        """
        self._check_open()
        self._settle()
        found: Restored | None = restore_newest(
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
        self._witness = []
        return None if found is None else found.step

    def discard(self) -> int:
        """Durably discards all checkpoints of the region, pinned ones excepted, so that a run may start anew.

        Returns how many went.
        """
        self._check_open()
        self.finish()
        count = self._home.store.discard_newer(0)
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


def _settle_all(alive: weakref.ref[Checkpointer], pending: queue.SimpleQueue[_Pending | None]) -> None:
    """The settling thread: lets snapshots commit also while the trainer makes no update, as in a long evaluation."""
    while (found := pending.get()) is not None:
        # While it waits for the copy it must not keep the checkpointer alive.
        try:
            found.save.copied()
        except errors.PccheckError:
            pass
        checkpointer = alive()
        if checkpointer is None:
            return
        if not found.settled:
            checkpointer._settle_one(found)
        del checkpointer, found
