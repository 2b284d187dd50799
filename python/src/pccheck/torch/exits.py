"""Normal exit and SIGTERM: what is in flight becomes durable, within the time that each trainer allows."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import weakref
from typing import Any, Protocol

__all__ = ["finish_at_exit", "forget"]


class Finishable(Protocol):
    """Something with saves in flight."""

    exit_timeout: float
    pid: int

    def finish(self, timeout: float | None) -> bool: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()
_previous: Any = None
_handling = False


def finish_at_exit(trainer: Finishable, *, on_sigterm: bool) -> None:
    """Finishes what is in flight when the interpreter exits and, where asked for, on SIGTERM.

    The signal's handler is set in the main thread only, and only once; it then calls the one that was there before, so
    that a program's own handling, or the end by the signal, follows.
    """
    global _previous, _handling
    _open.add(trainer)
    if not on_sigterm or _handling or threading.current_thread() is not threading.main_thread():
        return
    previous = signal.getsignal(signal.SIGTERM)
    # None: set by something that is not Python, which could not be called from here. Ignored stays ignored.
    if previous is not None and previous != signal.SIG_IGN:
        _previous, _handling = previous, True
        signal.signal(signal.SIGTERM, _on_sigterm)


def forget(trainer: Finishable) -> None:
    """It is closed."""
    _open.discard(trainer)


def _finish_all() -> None:
    # Forked children have copies of the trainers, but not their saves.
    trainers = [trainer for trainer in _open if trainer.pid == os.getpid()]
    deadline = time.monotonic() + max((trainer.exit_timeout for trainer in trainers), default=0.0)
    for trainer in trainers:
        trainer.finish(max(0.0, min(trainer.exit_timeout, deadline - time.monotonic())))


def _on_sigterm(number: int, frame: Any) -> None:
    _finish_all()
    if callable(_previous):
        _previous(number, frame)
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


atexit.register(_finish_all)
