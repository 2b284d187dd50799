"""How saves ended: failures are counted, and warned of once or raised; they never stop training unasked."""

from __future__ import annotations

import time
import warnings

from .. import errors
from ..save import Durable
from .settling import InFlight

__all__ = ["CheckpointWarning", "Outcomes"]


class CheckpointWarning(UserWarning):
    """A save failed, or could not be vouched for; training goes on."""


class Outcomes:
    """The saves in flight and what became of them."""

    def __init__(self, on_error: str) -> None:
        if on_error not in ("warn", "raise"):
            raise errors.InvalidArgument(f"on_error={on_error!r}: expected 'warn' or 'raise'")
        self.failures = 0
        self.last_error: errors.PccheckError | None = None
        self._raises = on_error == "raise"
        self._flights: list[InFlight] = []
        self._unraised: errors.PccheckError | None = None
        # Kind of the failures that the last saves in a row ended with.
        self._streak: type[errors.PccheckError] | None = None

    def begun(self, flight: InFlight) -> None:
        """A save is in flight."""
        self._flights.append(flight)

    def collect(self) -> list[tuple[InFlight, Durable]]:
        """Takes note of the saves that have ended, and warns of failures. Returns those that became durable."""
        durable = []
        # A signal's handler may do this too, in the middle: each flight stays listed until its end is known, and the
        # one who takes it off the list reports it.
        for flight in list(self._flights):
            outcome: Durable | errors.PccheckError
            try:
                outcome = flight.save.durable(0)
            except errors.TimedOut:
                continue
            except errors.PccheckError as why:
                outcome = flight.verdict or why
            if flight not in self._flights:
                continue
            self._flights.remove(flight)
            if isinstance(outcome, Durable):
                durable.append((flight, outcome))
                self._streak = None
            else:
                self.failed(flight.step, outcome)
        return durable

    def failed(self, step: int, why: errors.PccheckError) -> None:
        """A save failed. Of failures of one kind in a row the first is warned of."""
        self.failures += 1
        # Its traceback would keep the snapshot alive.
        self.last_error = why = why.with_traceback(None)
        if self._raises:
            self._unraised = self._unraised or why
        elif self._streak is not type(why):
            warnings.warn(f"the save of step {step} failed, training goes on: {why}", CheckpointWarning, stacklevel=4)
        self._streak = type(why)

    def raise_unraised(self) -> None:
        """With ``on_error="raise"``: raises the first failure not yet raised."""
        why, self._unraised = self._unraised, None
        if why is not None:
            raise why

    def wait(self, timeout: float | None) -> bool:
        """Waits until the saves in flight have ended, however. False: the time ran out."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for flight in list(self._flights):
            try:
                flight.save.durable(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except errors.TimedOut:
                return False
            except errors.PccheckError:
                # It has ended; collecting says how.
                continue
        return True

    @property
    def in_flight(self) -> int:
        """Saves whose outcome is not known yet."""
        return len(self._flights)
