"""A progress bar on a terminal, a line per step elsewhere; on stderr, so that stdout holds results alone."""

from __future__ import annotations

import sys
import time

BAR_CHARACTERS = 24


class Progress:
    """Counts steps to a total."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._write(f"{text}\n")

    def now(self, text: str) -> None:
        """What the next step is."""
        if self._terminal:
            filled = BAR_CHARACTERS * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (BAR_CHARACTERS - filled)
            self._write(f"[{bar}] {self._done}/{self._total}{self._left()}  {text}")

    def step(self, text: str) -> None:
        """A step is done."""
        self._done += 1
        if not self._terminal:
            self._write(f"{self._done}/{self._total}  {text}\n")

    def _left(self) -> str:
        if self._done == 0:
            return ""
        seconds = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        return f", {int(seconds) // 60}:{int(seconds) % 60:02} left"

    def _write(self, text: str) -> None:
        clear = "\r\033[K" if self._terminal else ""
        print(f"{clear}{text}", end="", file=sys.stderr, flush=True)
