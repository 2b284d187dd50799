"""The folder beside a region that a Trainer resumes from: only its owner may read it, and only ours is removed."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from . import errors

__all__ = ["make", "remove"]

# Present in a folder that was made here from before anything else is in it until nothing else is.
_MARKER = ".pccheck-resume"


def make(folder: Path) -> None:
    """Makes an empty ``folder`` of mode 0700, in place of one that a killed process has left.

    Raises:
        AlreadyExists: something else has its name. Nothing was changed.
        IoFailed
    """
    try:
        remove(folder)
        # Exclusive: what appears here meanwhile, a link too, is not written into.
        folder.mkdir(mode=0o700)
        os.close(os.open(folder / _MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except FileExistsError:
        raise _foreign(folder, "what has appeared there meanwhile") from None
    except OSError as why:
        raise errors.IoFailed(
            f"make {folder}: {why.strerror}", operation="resume", path=str(folder), errno=why.errno or 0
        ) from None


def remove(folder: Path) -> None:
    """Removes a ``folder`` that was made here, or an empty one; nothing to do where there is none.

    Raises:
        AlreadyExists: something else has its name. Nothing was changed.
        OSError
    """
    try:
        found = folder.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found):
        raise _foreign(folder, "a symbolic link" if stat.S_ISLNK(found) else "no folder")
    names = os.listdir(folder)  # noqa: PTH208 - nothing is left open while they are removed
    if names and not _is_marker(folder / _MARKER):
        raise _foreign(folder, f"a folder without {_MARKER}")
    # The marker last: killed in between, what is left can still be told.
    for path in (folder / name for name in names if name != _MARKER):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / _MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _is_marker(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _foreign(folder: Path, found: str) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        f"resume from {folder}: expected nothing or a folder that PCcheck has made, found {found}",
        operation="resume",
        path=str(folder),
        advice="move it away, or remove it if nothing in it is needed",
    )
