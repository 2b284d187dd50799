"""Settling snapshots: waiting until the engine has copied them, checking that they are sound, letting them commit.

A save of a snapshot commits only after it has been confirmed, and it is confirmed only if no tensor of it changed while
it was copied. The trainer does it, which must not update before; or, where it makes no update for a while, as in an
evaluation, one long-lived thread, so that a save becomes durable then too.

That thread waits before it looks. torch counts an in-place change when its kernel has ended, so that a change that
nobody announced may be under way and not yet counted when the copy is complete. A kernel changes one tensor, at about
the speed at which the engine copies all of them: after several times the copy's duration it is counted. The trainer's
own check needs no such wait, because what it checks is what it changes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from dataclasses import dataclass, field

import torch

from .. import errors
from ..save import Save
from .snapshot import Snapshot

__all__ = ["InFlight", "Settler"]

# So many tensors of a snapshot, evenly spread, stand for all in telling whether an update was missed.
_WITNESSES = 8

# For the trainer to settle, its thread waits so long, and so many times as long as the copy took.
_GRACE_SECONDS = 0.5
_GRACE_COPIES = 5


@dataclass(eq=False)
class InFlight:
    """A save that was begun and whose outcome is not known yet."""

    save: Save
    snapshot: Snapshot
    step: int
    metrics: dict[str, float]
    pinned: bool
    #: why the checkpointer itself gave it up
    verdict: errors.PccheckError | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def settle(self) -> None:
        """Checks the snapshot, which is copied, and lets it commit or gives it up. Once, whoever calls."""
        # A signal's handler may come here while the thread that it interrupted holds the lock.
        with self.lock:
            if self.settled.is_set():
                return
            # A save that has failed for another reason is not judged.
            failed = self.verdict is not None or self.save.error() is not None
            changed = [] if failed else self.snapshot.changed()
            # Where the save has failed its outcome says why.
            with contextlib.suppress(errors.PccheckError):
                if changed:
                    self.give_up(_torn(self.step, changed))
                elif self.verdict is None:
                    self.save.confirm()
            # Not before: that handler must find it confirmed, or do it, for it will wait until it is durable.
            self.settled.set()
            self.snapshot.release()

    def give_up(self, why: errors.PccheckError) -> None:
        """Cancels the save, for this reason."""
        self.verdict = why
        self.save.cancel()


def _torn(step: int, changed: list[str]) -> errors.PccheckError:
    shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return errors.InvalidState(
        f"the snapshot of step {step} is torn and was not committed: {shown} changed before it was copied",
        operation="save",
        advice="call before_update() ahead of what changes them",
    )


class Settler:
    """Has at most one snapshot to settle, and the thread that does it where the trainer does not."""

    def __init__(self, update_timeout: float | None) -> None:
        self._update_timeout = update_timeout
        self._pending: InFlight | None = None
        #: some tensors of the last snapshot and their version counters
        self._witnesses: list[tuple[torch.Tensor, int]] = []
        self._queue: queue.SimpleQueue[InFlight | None] = queue.SimpleQueue()
        # It refers to the queue alone, so that it keeps nothing else alive.
        self._thread = threading.Thread(target=_settle_all, args=(self._queue,), name="pccheck-settle", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._queue.put, None)

    def submit(self, flight: InFlight) -> None:
        """The engine has begun to copy this snapshot."""
        if flight.snapshot.private:
            # No update can touch what it reads.
            flight.settle()
            return
        self._pending = flight
        live = flight.snapshot.live
        every = max(1, len(live.tensors) // _WITNESSES)
        self._witnesses = list(zip(live.tensors[::every], live.versions[::every], strict=True))
        self._queue.put(flight)

    def before_update(self) -> None:
        """Waits until nothing more is read from the trainer's memory; torch's current streams wait for that of GPUs."""
        self._witnesses = []
        self.settle(self._update_timeout, on_host=False)

    def settle(self, timeout: float | None, *, give_up: bool = True, on_host: bool = True) -> None:
        """As :meth:`before_update`, for at most ``timeout`` seconds; then the save is given up, or goes on.
        ``on_host``: the calling thread waits, also for memory of GPUs.
        """
        flight = self._pending
        if flight is None:
            return
        try:
            if on_host:
                flight.save.copied(timeout)
            else:
                flight.save.stream_wait_copied(timeout=timeout)
        except errors.TimedOut:
            if not give_up:
                return
            flight.give_up(
                errors.TimedOut(
                    f"step {flight.step} was not copied within {timeout} s; the save was cancelled, so that training "
                    "can go on",
                    operation="save",
                    advice="look at the device, give a larger staging pool or update_timeout, or save less often",
                )
            )
            with contextlib.suppress(errors.PccheckError):
                # Cancelled copiers leave the memory at once.
                flight.save.copied()
        except errors.PccheckError:
            # Its outcome says why; the memory is the trainer's again.
            pass
        flight.settle()
        self._done(flight)

    def _done(self, flight: InFlight) -> None:
        # Optimizers step in any thread: a newer snapshot may be pending by now.
        if self._pending is flight:
            self._pending = None

    def missed_update(self) -> bool:
        """True where saved tensors changed although :meth:`before_update` was not called; said once per snapshot."""
        witnesses, self._witnesses = self._witnesses, []
        if any(tensor._version != version for tensor, version in witnesses):
            return True
        self._witnesses = witnesses
        return False

    def forget(self) -> None:
        """After a restore: what changed since is no update."""
        self._witnesses = []

    def close(self) -> None:
        """Ends the thread, once it has settled what was submitted."""
        self._queue.put(None)
        self._thread.join()


def _settle_all(flights: queue.SimpleQueue[InFlight | None]) -> None:
    while (flight := flights.get()) is not None:
        began = time.monotonic()
        try:
            flight.save.copied()
        except errors.PccheckError:
            # It has failed: there is nothing to look at.
            pass
        else:
            flight.settled.wait(_GRACE_SECONDS + _GRACE_COPIES * (time.monotonic() - began))
        flight.settle()
        # Not to be kept alive until the next one comes.
        del flight
