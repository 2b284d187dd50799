"""The one room that touches the C ABI's plumbing: the library, statuses, texts, handles that close safely.

Every call releases the GIL while it runs (cffi's ABI mode does), so that waiting, copying and reading never hold up
other Python threads.
"""

from __future__ import annotations

import operator
import os
import threading
import time
import weakref
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
    "whole",
]

#: cffi's types and memory, and the library's functions: known at run time only
ffi: Any = _ffi
lib: Any = _lib

# The C ABI that this package was written for; it ships with its own library, so a mismatch is a broken install.
_MAJOR, _MINOR = 1, 2
_found = divmod(int(lib.pcc_abi_version()), 65536)
if _found[0] != _MAJOR or _found[1] < _MINOR:
    raise ImportError(f"pccheck: the library's C ABI is {_found}, this package needs {(_MAJOR, _MINOR)}; reinstall it")

# Python runs signal handlers between calls only: waits are cut into slices of this length, so that Ctrl-C works.
_SLICE_MS = 100
# How often it is looked whether other threads' calls on a handle have ended.
_POLL_S = 0.001


def abi() -> tuple[int, int]:
    """Major and minor version of the loaded library's C ABI."""
    return _found


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
    if lib.pcc_last_error_status() != status:
        # A finalizer or a signal handler has failed on this thread since, and its particulars are not this failure's.
        error = errors.class_of(status)(message or string(lib.pcc_status_text(status)))
    else:
        offset = int(lib.pcc_last_error_offset())
        text = message or text_of(lib.pcc_last_error) or string(lib.pcc_status_text(status))
        error = errors.class_of(status)(
            text,
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


def whole(what: str, value: Any, limit: int = 2**64) -> int:
    """A whole number from 0 to below ``limit``, of Python or numpy; True and False are none."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < limit:
        raise errors.InvalidArgument(f"{what}={value!r}: expected a whole number, 0 or more and below {limit}")
    return number


def deadline_ms(timeout: float | None) -> int:
    """Seconds as the C ABI's milliseconds: None waits for ever. Rounded up, so that a short wait is not no wait."""
    if timeout is None:
        return -1
    try:
        fits = 0 <= timeout < 2**53
    except TypeError:
        fits = False
    if not fits:
        raise errors.InvalidArgument(f"timeout={timeout!r}: expected seconds >= 0, or None to wait for ever")
    return -int(-timeout * 1000 // 1)


def wait(
    call: Callable[[int], int],
    timeout: float | None,
    *,
    again: int | None = None,
    between: Callable[[], None] | None = None,
) -> None:
    """Calls ``call(milliseconds)`` in slices until the time is over, or the status says anything but that.

    Args:
        again: the status of a slice that ran out, where it is not PCC_TIMED_OUT. Slices that end with it early were
            refused for another reason, which waiting does not change.
        between: called between slices, to look around.
    """
    milliseconds = deadline_ms(timeout)
    end = time.monotonic() + milliseconds / 1000
    while True:
        begun = time.monotonic()
        left = _SLICE_MS if milliseconds < 0 else max(0, -int((begun - end) * 1000 // 1))
        now = min(left, _SLICE_MS)
        status = call(now)
        refused = again is not None and time.monotonic() - begun < now / 2000
        over = milliseconds >= 0 and left <= _SLICE_MS
        if status != (lib.PCC_TIMED_OUT if again is None else again) or refused or over:
            return check(status)
        if between is not None:
            between()


class _User:
    """A call that uses a handle. Only the call itself refers to it: one that an exception cut short goes with it."""

    __slots__ = ("__weakref__", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Handle:
    """A C handle that is freed once, and never while another thread's call uses it.

    It is made before the library's handle is, whose pointer the library writes to :attr:`out`: an exception that a
    signal handler raises in between leaves nothing behind that nobody frees.

    Args:
        kind: the C type, such as "pcc_save".
        free: frees a pointer of it.
        keep: what must outlive the pointer, such as the memory that it reads.
    """

    # State changes by single operations only, which are atomic: a lock could be held at a fork, or by the very thread
    # in which the garbage collector runs __del__.

    def __init__(self, kind: str, free: Callable[[Any], None], keep: Any = None) -> None:
        self._what = kind.removeprefix("pcc_")
        self._free = free
        self.keep = keep
        #: where the library stores the pointer
        self.out: Any = ffi.new(f"{kind} **")
        # Empty once somebody has taken the pointer to free it.
        self._owned = [self.out]
        # Calls that use the pointer; those that want it for themselves.
        self._users: dict[int, weakref.ref[_User]] = {}
        self._claims: dict[object, None] = {}
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        """True once nobody may use the pointer any more, though it may not be freed yet."""
        return bool(self._claims) or not self._owned

    @property
    def inherited(self) -> bool:
        """True in a child that was forked since this was made."""
        return self._pid != os.getpid()

    @contextmanager
    def use(self) -> Iterator[Any]:
        """The pointer, which stays valid meanwhile."""
        if self.inherited:
            raise errors.Forked(
                f"the {self._what} was made before this process was forked; open the region anew here, or leave it "
                "to the parent"
            )
        user = _User()
        try:
            # In this order: close() looks for users after it has claimed the pointer.
            self._users[id(user)] = weakref.ref(user)
            self._check_open()
            yield self.out[0]
        finally:
            self._users.pop(id(user), None)

    def _check_open(self) -> None:
        if self.closed:
            raise errors.InvalidState(f"the {self._what} is closed")

    def wait(
        self,
        call: Callable[[Any, int], int],
        timeout: float | None,
        *,
        again: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        """As :func:`wait`, with the pointer. Ends with InvalidState when another thread closes the handle."""

        def look_around() -> None:
            self._check_open()
            if between is not None:
                between()

        with self.use() as pointer:
            wait(lambda ms: call(pointer, ms), timeout, again=again, between=look_around)

    @contextmanager
    def alone(self) -> Iterator[Any]:
        """The pointer, once no other call uses it. Calls that begin meanwhile are told that it is closed."""
        with self.use() as pointer:
            claim = object()
            try:
                self._claims[claim] = None
                if len(self._claims) > 1:
                    raise errors.InvalidState(f"the {self._what} is being closed or committed by another thread")
                self._wait_for_users(1)
                yield pointer
            finally:
                self._claims.pop(claim, None)

    def close(self) -> None:
        """Frees the handle once no call uses it; later uses raise. Closing twice is closing once."""
        if self.inherited:
            return self._release()
        claim = object()
        try:
            self._claims[claim] = None
            self._wait_for_users(0)
            self._release()
        finally:
            # Where the wait was interrupted it stays open.
            self._claims.pop(claim, None)

    def _wait_for_users(self, own: int) -> None:
        me = threading.get_ident()
        while True:
            users = [user.thread for reference in list(self._users.values()) if (user := reference()) is not None]
            if len(users) <= own:
                return
            if users.count(me) > own:
                raise errors.InvalidState(
                    f"the {self._what} cannot be closed by a signal handler that interrupts a call on it; "
                    "raise an exception there, and close it where that is caught"
                )
            time.sleep(_POLL_S)

    def _release(self) -> None:
        try:
            out = self._owned.pop()
        except IndexError:
            return
        if out[0] != ffi.NULL:
            self._free(out[0])
        self.keep = None

    def __del__(self) -> None:
        # Attributes may be missing where the constructor failed.
        if getattr(self, "_owned", None):
            self._release()
