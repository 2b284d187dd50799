"""The one room that touches the C ABI's plumbing: the library, statuses, texts, handles that close safely.

Every call releases the GIL while it runs (cffi's ABI mode does), so that waiting, copying and reading never hold up
other Python threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import errors
from ._native import ffi as _ffi
from ._native import lib as _lib

__all__ = [
    "Handle",
    "abi",
    "check",
    "deadline_ms",
    "error_of",
    "ffi",
    "lib",
    "new_struct",
    "options",
    "path_bytes",
    "string",
    "text_of",
    "wait",
]

#: cffi's types and memory, and the library's functions: known at run time only
ffi: Any = _ffi
lib: Any = _lib

# The C ABI that this package was written for; it ships with its own library, so a mismatch is a broken install.
_MAJOR = 1
_found = lib.pcc_abi_version()
if _found // 65536 != _MAJOR:
    raise ImportError(f"pccheck: the library's C ABI is {_found // 65536}, this package needs {_MAJOR}; reinstall it")

# Python runs signal handlers between calls only: waits are cut into slices of this length, so that Ctrl-C works.
_SLICE_MS = 100


def abi() -> tuple[int, int]:
    """Major and minor version of the loaded library's C ABI."""
    return _found // 65536, _found % 65536


def text_of(copy: Callable[[Any, int], int]) -> str:
    """The text that ``copy(buffer, capacity)`` copies; it returns the bytes that all of it takes with its NUL."""
    size = copy(ffi.NULL, 0)
    if size == 0:
        return ""
    buffer = ffi.new("char[]", size)
    copy(buffer, size)
    return bytes(ffi.string(buffer)).decode("utf-8", "replace")


def string(text: Any) -> str:
    """A static, NUL-terminated UTF-8 text of the library."""
    found: bytes = ffi.string(text)
    return found.decode()


def error_of(status: int, message: str | None = None) -> errors.PccheckError:
    """The exception for this thread's last failure. ``message`` replaces its text."""
    offset = int(lib.pcc_last_error_offset())
    error = errors.class_of(status)(
        message or text_of(lib.pcc_last_error) or string(lib.pcc_status_text(status)),
        operation=text_of(lib.pcc_last_error_operation),
        path=text_of(lib.pcc_last_error_path) or None,
        errno=int(lib.pcc_last_error_errno()),
        offset=None if offset == lib.PCC_NO_OFFSET else offset,
        advice=text_of(lib.pcc_last_error_advice),
    )
    error.code = status
    error.status = string(lib.pcc_status_name(status))
    return error


def check(status: int) -> None:
    """Raises the exception of a failed call of this thread."""
    if status != 0:
        raise error_of(status)


def new_struct(name: str) -> Any:
    """A zeroed ``name`` with its ``struct_bytes`` set."""
    struct = ffi.new(f"{name} *")
    struct.struct_bytes = ffi.sizeof(name)
    return struct


def options(name: str, **values: Any) -> Any:
    """An option struct with the library's defaults, changed by the values that are not None."""
    struct = ffi.new(f"{name} *")
    check(getattr(lib, f"{name}_init")(struct, ffi.sizeof(name)))
    for field, value in values.items():
        if value is not None:
            try:
                setattr(struct, field, value)
            except (OverflowError, TypeError) as why:
                raise errors.InvalidArgument(f"{field}={value!r}: {why}") from None
    return struct


def path_bytes(path: str | os.PathLike[str]) -> bytes:
    """A path as the file system's bytes."""
    encoded = os.fsencode(path)
    if b"\0" in encoded or not encoded:
        raise errors.InvalidArgument(f"{path!r} is not a path: it is empty or contains a NUL")
    return encoded


def deadline_ms(timeout: float | None) -> int:
    """Seconds as the C ABI's milliseconds: None waits for ever. Rounded up, so that a short wait is not no wait."""
    if timeout is None:
        return -1
    if not 0 <= timeout < 2**53:
        raise errors.InvalidArgument(f"timeout={timeout!r}: expected seconds >= 0, or None to wait for ever")
    return -int(-timeout * 1000 // 1)


def wait(call: Callable[[int], int], timeout: float | None) -> None:
    """Calls ``call(milliseconds)``, which may be repeated after PCC_TIMED_OUT, in slices until the time is over."""
    left = deadline_ms(timeout)
    while True:
        now = _SLICE_MS if left < 0 else min(left, _SLICE_MS)
        status = call(now)
        if status != lib.PCC_TIMED_OUT or (0 <= left <= _SLICE_MS):
            return check(status)
        left = left if left < 0 else left - now


class Handle:
    """A C handle that is freed once, and never while another thread's call uses it."""

    def __init__(self, what: str, pointer: Any, free: Callable[[Any], None]) -> None:
        self._what = what
        self._pointer = pointer
        self._free = free
        self._users = 0
        self._changed = threading.Condition()
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        return self._pointer is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        """The pointer, which stays valid meanwhile."""
        if self._pid != os.getpid():
            # The condition may have been held by another thread at the fork.
            raise errors.Forked(f"the {self._what} was opened before this process was forked; open another here")
        with self._changed:
            if self._pointer is None:
                raise errors.InvalidState(f"the {self._what} is closed; open it again")
            self._users += 1
            pointer = self._pointer
        try:
            yield pointer
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Frees the handle once no call uses it; later uses raise. Closing twice is closing once."""
        if self._pid != os.getpid():
            pointer, self._pointer = self._pointer, None
        else:
            with self._changed:
                pointer, self._pointer = self._pointer, None
                self._changed.wait_for(lambda: self._users == 0)
        if pointer is not None:
            self._free(pointer)

    def __del__(self) -> None:
        # Attributes may be missing where the constructor failed.
        if getattr(self, "_pointer", None) is not None:
            self.close()
