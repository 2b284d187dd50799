"""Files and folders that appear whole or not at all, and are durable once they have appeared."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["is_unfinished", "make_folders", "replaced_file", "replaced_folder", "sync_folder"]

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable: those that were added, replaced or removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(folder: Path) -> None:
    """Makes ``folder`` and what lacks above it. Durable on return."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        sync_folder(one.parent)


def _beside(path: Path) -> Path:
    """A name in the same folder that no other writer uses; hidden, so that it is not taken for a checkpoint.

    It is random: process ids come again in other containers, and after what a crash has left behind.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_unfinished(name: str) -> bool:
    """True of a file or folder that is being written to replace another, or that a crash has left of that."""
    return _UNFINISHED.fullmatch(name) is not None


def _link_new(beside: Path, path: Path) -> None:
    try:
        # Unlike a rename, a link never replaces.
        os.link(beside, path)
    except OSError as why:
        if why.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links: as near to it as can be.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        beside.rename(path)


@contextmanager
def replaced_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Gives the name of a new file to write; when the block ends well, that file is durably at ``path``.

    When the block fails, ``path`` is as it was. ``replace=False``: a file that appeared at ``path`` meanwhile is not
    replaced (:class:`FileExistsError`).
    """
    beside = _beside(path)
    try:
        yield beside
        fd = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if replace:
            beside.replace(path)
        else:
            _link_new(beside, path)
            beside.unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def _rename_new(beside: Path, path: Path) -> None:
    try:
        # A folder takes the place of nothing but an empty folder.
        beside.rename(path)
    except OSError as why:
        if why.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None


@contextmanager
def replaced_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Gives a new, empty folder to fill; when the block ends well, it is durably at ``path``, with all its files.

    A folder that was at ``path`` is replaced (not in one step: a crash between the two renames leaves the old one
    beside it under a hidden name); when the block fails, ``path`` is as it was. Of a symbolic link at ``path`` the link
    itself is replaced, never what it leads to. ``replace=False``: what appeared at ``path`` meanwhile is not replaced
    (:class:`FileExistsError`), unless it is an empty folder.
    """
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for folder, _, names in os.walk(beside):
            for name in names:
                fd = os.open(Path(folder, name), os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            sync_folder(Path(folder))
        if not replace:
            _rename_new(beside, path)
        elif path.is_symlink() or path.is_dir():
            old = _beside(path)
            try:
                path.rename(old)
                beside.rename(path)
            except BaseException:
                if os.path.lexists(old) and not os.path.lexists(path):
                    old.rename(path)
                raise
            # The new name first: a crash must not find the old folder gone and the new one not yet there.
            sync_folder(path.parent)
            if old.is_symlink():
                with suppress(OSError):
                    old.unlink()
            else:
                shutil.rmtree(old, ignore_errors=True)
        else:
            beside.replace(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(path.parent)
