"""Whether the bytes of a folder's files are really on the device, asked of the kernel.

Two facts, neither of which needs privileges: how much of the files in the page cache still waits to be written
(cachestat, Linux 6.5), and whether the device was told to flush its own cache meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measuring import machine

_CACHESTAT = 451
_FLUSHES_FIELD = 15

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent")]


@dataclass(frozen=True)
class Cached:
    """Of a folder's files, in bytes; none where the kernel cannot say."""

    cached: int
    #: not yet written
    dirty: int


def files(folder: Path) -> Iterator[Path]:
    """All regular files below a folder."""
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base) / name
            if path.is_file() and not path.is_symlink():
                yield path


def cached(folder: Path) -> Cached | None:
    """What the page cache holds of a folder's files."""
    pages = dirty = 0
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            found = _CacheStat()
            if _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, 0)), ctypes.byref(found), 0) != 0:
                return None
        finally:
            os.close(fd)
        pages += found.cached
        dirty += found.dirty + found.writeback
    return Cached(pages * mmap.PAGESIZE, dirty * mmap.PAGESIZE)


def flushes(folder: Path) -> int | None:
    """Cache flushes that the device below a folder has completed since the machine started.

    None where that tells nothing: there is no single device, it counts none, or its cache needs none.
    """
    device = machine.block_device(folder)
    if device is None:
        return None
    try:
        fields = (device / "stat").read_text().split()
        needed = (device / "queue" / "write_cache").read_text().strip() == "write back"
        by_write = (device / "queue" / "fua").read_text().strip() == "1"
    except OSError:
        return None
    if not needed or by_write or len(fields) <= _FLUSHES_FIELD:
        return None
    return int(fields[_FLUSHES_FIELD])


def drop_cache(folder: Path) -> None:
    """Lets the kernel forget what it caches of a folder's files, which must be on the device already."""
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Makes a file's bytes durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
