"""Exceptions. Every status of the C ABI is one class; all derive from :class:`PccheckError`."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AlreadyExists",
    "BadPointer",
    "Cancelled",
    "Corrupt",
    "DeviceError",
    "DurabilityError",
    "DurabilityUnknown",
    "Forked",
    "InUse",
    "InternalError",
    "InvalidArgument",
    "InvalidState",
    "IoFailed",
    "MemberError",
    "NoSlot",
    "NoSpace",
    "NotARegion",
    "NotFound",
    "OutOfMemory",
    "PccheckError",
    "ReadOnly",
    "Reclaimed",
    "StateMismatch",
    "TimedOut",
    "TooLarge",
    "Unsupported",
    "UnsupportedFeature",
    "UnsupportedValue",
    "UnsupportedVersion",
]


class PccheckError(Exception):
    """Anything that PCcheck refuses or that failed.

    Attributes:
        message: what failed, with what was expected and found, and what to do next.
        status: name of the C ABI's status, such as ``"PCC_NO_SLOT"``; ``None`` where the C ABI has none.
        code: its number; ``None`` likewise.
        operation: what was being done, ``""`` where that is not known.
        path: the file concerned, ``None`` where none is.
        errno: the operating system's error number; 0 where it gave none.
        offset: the byte offset in the region concerned; ``None`` where none is.
        advice: what to do next, ``""`` where there is nothing to advise.
    """

    status: str | None = None
    code: int | None = None

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        path: str | None = None,
        errno: int = 0,
        offset: int | None = None,
        advice: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.path = path
        self.errno = errno
        self.offset = offset
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice and self.advice not in self.message else self.message


class InvalidArgument(PccheckError, ValueError):
    """An argument breaks the documented contract of the call."""

    status, code = "PCC_INVALID_ARGUMENT", -1


class InvalidState(PccheckError):
    """The call is not allowed in the present state of the object, for example on a closed store."""

    status, code = "PCC_INVALID_STATE", -2


class NotFound(PccheckError, LookupError):
    """No checkpoint, tensor, metadata entry or file of that name, step or generation exists."""

    status, code = "PCC_NOT_FOUND", -3


class AlreadyExists(PccheckError):
    """The path already holds a region or other data, and ``force`` was not given."""

    status, code = "PCC_ALREADY_EXISTS", -4


class NotARegion(PccheckError):
    """The file is not a region."""

    status, code = "PCC_NOT_A_REGION", -5


class Unsupported(PccheckError):
    """The medium, kernel, file system or this build cannot do what was asked, or the region is of a newer format."""

    status, code = "PCC_UNSUPPORTED", -8


class UnsupportedVersion(Unsupported):
    """The region was written by a newer, incompatible version of the format."""

    status, code = "PCC_UNSUPPORTED_VERSION", -6


class UnsupportedFeature(Unsupported):
    """The region uses a feature that this library does not know."""

    status, code = "PCC_UNSUPPORTED_FEATURE", -7


class DurabilityError(PccheckError):
    """The medium cannot give the durability that the caller requires."""

    status, code = "PCC_DURABILITY", -9


class InUse(PccheckError):
    """Another writer holds the region."""

    status, code = "PCC_IN_USE", -10


class NoSpace(PccheckError):
    """The device or file system has no room."""

    status, code = "PCC_NO_SPACE", -11


class TooLarge(PccheckError):
    """The state does not fit in a slot, or a documented limit is passed."""

    status, code = "PCC_TOO_LARGE", -12


class NoSlot(PccheckError):
    """No slot became free in the time given, or a pin would leave too few of them."""

    status, code = "PCC_NO_SLOT", -13


class TimedOut(PccheckError, TimeoutError):  # type: ignore[misc]  # errno: ours is never None
    """The time given ran out; the operation goes on and can be waited for again."""

    status, code = "PCC_TIMED_OUT", -14


class Cancelled(PccheckError):
    """The save was cancelled before it became durable."""

    status, code = "PCC_CANCELLED", -15


class Reclaimed(PccheckError):
    """The checkpoint was overwritten by its writer (another process) while it was being read."""

    status, code = "PCC_RECLAIMED", -16


class Corrupt(PccheckError):
    """Stored bytes do not match their checksum, or do not mean anything."""

    status, code = "PCC_CORRUPT", -17


class IoFailed(PccheckError):
    """The operating system reported an I/O error."""

    status, code = "PCC_IO", -18


class DurabilityUnknown(PccheckError):
    """A flush failed: the durability of what was written is unknown, and its slot is out of use."""

    status, code = "PCC_DURABILITY_UNKNOWN", -19


class ReadOnly(PccheckError):
    """The store was opened read-only."""

    status, code = "PCC_READ_ONLY", -20


class Forked(PccheckError):
    """The object was made before this process was forked, and cannot be used here."""

    status, code = "PCC_FORKED", -21


class OutOfMemory(PccheckError, MemoryError):
    """Memory could not be allocated."""

    status, code = "PCC_OUT_OF_MEMORY", -22


class InternalError(PccheckError):
    """A defect of the library itself; durable checkpoints are intact."""

    status, code = "PCC_INTERNAL", -23


class BadPointer(PccheckError):
    """An address that was passed to the library is not valid."""

    status, code = "PCC_BAD_POINTER", -24


class MemberError(PccheckError):
    """A member of a striped region is lost, foreign, in the wrong place, too short or damaged; or the path is that of a
    member other than the first. The message names it.
    """

    status, code = "PCC_MEMBER", -25


class DeviceError(PccheckError):
    """The driver of a GPU reported a failure."""

    status, code = "PCC_DEVICE", -26


class UnsupportedValue(PccheckError, TypeError):
    """A value in a state that cannot be represented in a checkpoint.

    Attributes:
        at: where it is, such as ``optimizer['param_groups'][0]['lr']``.
    """

    def __init__(self, message: str, *, at: str) -> None:
        super().__init__(f"{at or 'the state'}: {message}")
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross to other processes (of worker pools) by this; `args` hold the composed text.
        return _unsupported_value, (self.message, self.__dict__)


def _unsupported_value(message: str, attributes: dict[str, Any]) -> UnsupportedValue:
    error = UnsupportedValue(message, at="")
    error.args = (message,)
    error.__dict__.update(attributes)
    return error


class StateMismatch(PccheckError):
    """A checkpoint does not fit what it is to be restored into. Nothing was changed.

    Attributes:
        missing: names that the target has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the target lacks.
        mismatched: ``name: reason`` of those that differ in dtype, shape or kind.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        missing: list[str] | None = None,
        unexpected: list[str] | None = None,
        mismatched: list[str] | None = None,
        advice: str = "",
    ) -> None:
        self.missing = missing or []
        self.unexpected = unexpected or []
        self.mismatched = mismatched or []
        parts = [message]
        for title, names in (
            ("missing in the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("mismatched", self.mismatched),
        ):
            if names:
                shown = ", ".join(names[:_SHOWN_NAMES])
                more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
                parts.append(f"{title}: {shown}{more}")
        super().__init__("; ".join(parts), operation="restore", path=path, advice=advice)


# How many names of each kind an error's text lists; its attributes have all.
_SHOWN_NAMES = 20


def _statuses(base: type[PccheckError]) -> dict[int, type[PccheckError]]:
    found: dict[int, type[PccheckError]] = {}
    for cls in base.__subclasses__():
        if cls.code is not None:
            found[cls.code] = cls
        found |= _statuses(cls)
    return found


_CLASS_OF = _statuses(PccheckError)


def class_of(code: int) -> type[PccheckError]:
    """The exception of a C status; :class:`PccheckError` itself for a number that this version does not know."""
    return _CLASS_OF.get(code, PccheckError)
