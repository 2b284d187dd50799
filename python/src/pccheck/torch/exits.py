"""Normal exit and SIGTERM: what is in flight becomes durable, within the time that each trainer allows."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["finish_at_exit", "forget"]


class Finishable(Protocol):
    """Something with saves in flight."""

    exit_timeout: float
    pid: int

    def finish(self, timeout: float | None) -> bool: ...

    def close(self, timeout: float | None) -> None: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()


def finish_at_exit(trainer: Finishable, *, on_sigterm: bool) -> None:
    """Closes the trainer when the interpreter exits and, where asked for, finishes what is in flight on SIGTERM.

    The signal's handler is set in the main thread only, unless it is set already; it then calls the one that was there
    before, so that a program's own handling, or the end by the signal, follows. A program that sets one afterwards
    replaces it, until the next trainer is made.
    """
    _open.add(trainer)
    if not on_sigterm or threading.current_thread() is not threading.main_thread():
        return
    previous = signal.getsignal(signal.SIGTERM)
    # None: set by something that is not Python, which could not be called from here. Ignored stays ignored.
    if previous is not None and previous != signal.SIG_IGN and not isinstance(previous, _OnSigterm):
        signal.signal(signal.SIGTERM, _OnSigterm(previous))
        _guard_forks()


_mask = threading.local()
_guarded = False


def _guard_forks() -> None:
    """Holds SIGTERM back while a process forks.

    Python forgets a signal that reaches a forked child before that runs, where it has a handler: a worker that is
    terminated at once would live on, and be waited for.
    """
    global _guarded
    if not _guarded:
        _guarded = True
        os.register_at_fork(before=_hold_back, after_in_parent=_let_go, after_in_child=_let_go_in_child)


def _hold_back() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _let_go_in_child() -> None:
    # A child has none of the saves. Without a handler the kernel ends it; with one, Python would miss a signal that
    # comes just before it waits for something.
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _OnSigterm) and handler.previous == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_go()


def forget(trainer: Finishable) -> None:
    """It is closed."""
    _open.discard(trainer)


def _for_each(end: Callable[[Any, float], object]) -> None:
    # Forked children have copies of the trainers, but not their saves.
    trainers = [trainer for trainer in _open if trainer.pid == os.getpid()]
    deadline = time.monotonic() + max((trainer.exit_timeout for trainer in trainers), default=0.0)
    for trainer in trainers:
        try:
            end(trainer, max(0.0, min(trainer.exit_timeout, deadline - time.monotonic())))
        except Exception as why:
            # The others, and the end of the process, must follow.
            warnings.warn(f"{trainer!r} while the process ends: {why}", stacklevel=2)


class _OnSigterm:
    """Finishes, then does what was done before on this signal. One that comes meanwhile changes nothing."""

    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self._finishing = False

    def __call__(self, number: int, frame: Any) -> None:
        # Schedulers repeat the signal: the one that is being handled goes on where this one interrupted it.
        if self._finishing:
            return
        self._finishing = True
        try:
            _for_each(lambda trainer, timeout: trainer.finish(timeout))
        finally:
            self._finishing = False
            if callable(self.previous):
                self.previous(number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


def _close_all() -> None:
    # Closed and not only finished: once the interpreter is torn down, its threads cannot be waited for any more.
    _for_each(lambda trainer, timeout: trainer.close(timeout))


atexit.register(_close_all)
