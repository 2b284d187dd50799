"""Files of ``torch.save``: tensors and plain values, mapped instead of read where the file allows it."""

from __future__ import annotations

import errno
import io
import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch

from .. import errors
from .progress import Progress

__all__ = ["read", "refused_global", "write"]


def read(source: Path) -> Any:
    """What the file holds."""
    try:
        try:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as why:
            # The format of before 1.6 cannot be mapped.
            if "mmap can only be used with files saved with" not in str(why):
                raise
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as why:
        raise errors.Unsupported(
            f"{source} holds more than tensors and plain values: {refused_global(why)}",
            path=str(source),
            advice="load it in a program that trusts it, and save its plain state",
        ) from None
    except (RuntimeError, EOFError, KeyError, OSError) as why:
        if isinstance(why, OSError) and why.errno != errno.EINVAL:
            # EINVAL is what torch makes of an archive that was cut off.
            raise
        text = (str(why) or repr(why)).splitlines()[0]
        raise errors.Corrupt(f"{source} cannot be read as a file of torch.save: {text}", path=str(source)) from None


def refused_global(why: pickle.UnpicklingError) -> str:
    """What torch refused to make; it explains at length how to trust the file, and names it in one line."""
    lines = [line.strip() for line in str(why).splitlines()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else repr(why))


class _Counting(io.RawIOBase):
    """A file that tells how much was written to it."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += self._file.write(data)
        self._progress.advance(self._written)
        return len(data)


def write(path: Path, state: Any, tensor_bytes: int, progress: Progress) -> None:
    """Saves a state."""
    progress.begin("writing", tensor_bytes)
    with path.open("wb") as file:
        torch.save(state, cast(IO[bytes], _Counting(file, progress)))
