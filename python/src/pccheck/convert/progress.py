"""How far long work is, for people: a bar of tqdm where it is installed, else lines on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]

# Shorter work is done before anybody wonders.
_LONG_BYTES = 256 << 20
_SECONDS_PER_LINE = 5.0


class Progress:
    """Told by the work how many bytes it will take, and how many are done."""

    def __init__(self, *, quiet: bool = False, long_bytes: int = _LONG_BYTES) -> None:
        self._quiet = quiet
        self._long_bytes = long_bytes
        self._bar: Any = None
        self._what = ""
        self._total = self._done = 0
        self._next_line: float | None = None

    def begin(self, what: str, total_bytes: int) -> None:
        """A piece of work begins; an earlier one has ended."""
        self.end()
        self._what, self._total, self._done = what, total_bytes, 0
        if self._quiet or total_bytes < self._long_bytes:
            return
        try:
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            self._next_line = time.monotonic()
        else:
            self._bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, file=sys.stderr)

    def advance(self, done_bytes: int) -> None:
        """So many bytes of the work are done."""
        done_bytes = min(done_bytes, self._total)
        if self._bar is not None:
            self._bar.update(done_bytes - self._done)
        self._done = done_bytes
        if self._next_line is not None and time.monotonic() >= self._next_line:
            self._line()
            self._next_line = time.monotonic() + _SECONDS_PER_LINE

    def end(self) -> None:
        """The work has ended, well or not."""
        if self._bar is not None:
            self._bar.close()
        elif self._next_line is not None:
            self._line()
        self._bar = self._next_line = None

    def _line(self) -> None:
        share = 100 * self._done // self._total if self._total else 100
        print(f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB ({share}%)", file=sys.stderr)
