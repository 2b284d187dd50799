"""Making, growing and sizing regions."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import arrays, errors
from ._abi import check, ffi, lib, options, path_bytes, wait, whole

__all__ = ["MEDIA", "create_region", "format_region", "grow_region", "payload_bytes"]

#: How bytes become persistent; "auto" measures.
MEDIA = {"auto": 0, "dax": 1, "mmap": 2, "direct": 3}

# No region takes so long to be made: a hidden file of that age is what a killed process has left.
_LEFTOVER_SECONDS = 3600.0


def number_of(what: str, name: str, numbers: Mapping[str, int]) -> int:
    """The C ABI's number of a choice."""
    if name not in numbers:
        raise errors.InvalidArgument(f"{what}={name!r}: expected one of {', '.join(map(repr, numbers))}")
    return numbers[name]


def format_region(
    path: str | os.PathLike[str],
    *,
    slots: int,
    payload_bytes: int,
    force: bool = False,
    prewrite: bool = False,
    medium: str = "auto",
    stripe: Sequence[str | os.PathLike[str]] = (),
    stripe_unit: int | None = None,
) -> None:
    """Creates a region: a new file, an empty file, or a block device. It is durable on return.

    Args:
        path: file or device.
        slots: saves in flight + checkpoints kept + pinned ones; 2 to 240.
        payload_bytes: what each slot holds at most, see :func:`payload_bytes`. All space is allocated now.
        force: overwrite what the path holds, even a valid region.
        prewrite: write the whole region once now, so that first saves are as fast as later ones.
        medium: a key of :data:`MEDIA`.
        stripe: up to 15 files or devices beside ``path`` over which the region is striped, so that their bandwidth
            adds up. The region is opened by ``path``, and all of them must be there.
        stripe_unit: bytes that lie together on one member: a power of two from 2 MiB to 1 GiB, which the chunks of
            saves must divide; ``None``: 4 MiB.

    Raises:
        AlreadyExists: the path, or one of ``stripe``, holds something, and ``force`` was not given. Nothing was
            changed.
        NoSpace: the file system has too little room. Nothing was left behind.
        InvalidArgument, InUse, Unsupported, TooLarge, IoFailed
    """
    if isinstance(stripe, (str, bytes, os.PathLike)):
        raise errors.InvalidArgument(f"stripe={stripe!r}: expected a sequence of paths, found one path")
    members = [ffi.new("char[]", path_bytes(member)) for member in stripe]
    paths = ffi.new("char *[]", members)
    chosen = options(
        "pcc_format_options",
        force=int(force),
        prewrite=int(prewrite),
        medium=number_of("medium", medium, MEDIA),
        stripe_paths=paths if members else None,
        stripe_count=len(members),
        stripe_unit_bytes=None if stripe_unit is None else _unit(stripe_unit),
    )
    slots = whole("slots", slots, 2**32)
    check(lib.pcc_format(path_bytes(path), slots, whole("payload_bytes", payload_bytes), chosen))


def _unit(stripe_unit: int) -> int:
    # 0 would be the library's default.
    if whole("stripe_unit", stripe_unit) == 0:
        raise errors.InvalidArgument("stripe_unit=0: expected a power of two from 2 MiB to 1 GiB")
    return stripe_unit


def create_region(path: str | os.PathLike[str], *, slots: int, payload_bytes: int, medium: str = "auto") -> None:
    """As :func:`format_region` of a new file, which appears under its name only once it is complete.

    A process that is killed meanwhile leaves nothing at ``path``, so that the next one can make it. What it leaves
    beside it, under a hidden name, goes when a region is made there an hour later or more.

    Raises:
        AlreadyExists: the path holds something. Nothing was changed.
        NoSpace, InvalidArgument, Unsupported, IoFailed: nothing was left behind.
    """
    target = Path(path)
    if target.exists():
        # A device or an empty file is made where it is; anything else is refused.
        return format_region(path, slots=slots, payload_bytes=payload_bytes, medium=medium)
    _remove_leftovers(target)
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(8)}.new")
    try:
        format_region(hidden, slots=slots, payload_bytes=payload_bytes, medium=medium)
        # Unlike a rename it replaces nothing.
        os.link(hidden, target)
        _sync_folder(target.parent)
    except FileExistsError:
        raise errors.AlreadyExists(
            f"make {target}: another process has just made it", operation="format", path=str(target)
        ) from None
    except OSError as why:
        if why.errno in (errno.EPERM, errno.EOPNOTSUPP):
            # A file system without hard links.
            return format_region(path, slots=slots, payload_bytes=payload_bytes, medium=medium)
        raise errors.IoFailed(
            f"make {target}: {why.strerror}", operation="format", path=str(target), errno=why.errno or 0
        ) from None
    finally:
        # It is not there where nothing could be made, and then the error that says why must stay.
        with contextlib.suppress(OSError):
            hidden.unlink()


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes have left of making ``target``: old files of exactly the names made here."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.new")
    # Without the folder, or the right to read it, making the region says what is wrong.
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) is None:
                continue
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _LEFTOVER_SECONDS:
                    Path(entry.path).unlink()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def grow_region(
    path: str | os.PathLike[str], *, slots: int, payload_bytes: int, lock_timeout: float | None = 10.0
) -> int:
    """Replaces a region file by a larger one that holds the same checkpoints and pins; durable on return.

    A crash leaves the old file or the new one. No store may have it open for writing. Takes room for both meanwhile.

    Args:
        slots, payload_bytes: of the new region; see :func:`format_region`.
        lock_timeout: seconds to wait while another writer has it open.

    Returns:
        How many checkpoints the medium could no longer read, which the new file lacks.

    Raises:
        NoSpace, InUse: the old region is untouched.
        InvalidArgument: the new size is smaller than the old one.
        Unsupported: it is a device.
    """
    left_out = ffi.new("uint64_t *")
    name, slots, payload_bytes = path_bytes(path), whole("slots", slots, 2**32), whole("payload_bytes", payload_bytes)
    wait(lambda ms: int(lib.pcc_grow(name, slots, payload_bytes, ms, left_out)), lock_timeout, again=lib.PCC_IN_USE)
    return int(left_out[0])


def payload_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that a save of these arrays and this metadata takes: the ``payload_bytes`` to format a region for."""
    packed, pairs = arrays.pack_tensors(arrays.memories_of(tensors)), arrays.pack_pairs(metadata)
    out = ffi.new("uint64_t *")
    check(lib.pcc_payload_bytes(packed.array, packed.count, pairs.array, pairs.count, out))
    return int(out[0])
