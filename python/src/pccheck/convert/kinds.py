"""Which kind of checkpoint is at a path, and which one a path asks for."""

from __future__ import annotations

import enum
import json
from pathlib import Path

from .. import errors

__all__ = ["Kind", "kind_of_source", "kind_to_make"]


class Kind(enum.Enum):
    """A kind of checkpoint."""

    REGION = "region"
    REFERENCE = "reference"
    TORCH = "torch"
    SAFETENSORS = "safetensors"
    DCP = "dcp"


_REGION_MAGIC = b"PCCHECK\0"
# Where the two superblocks begin; either alone is enough.
_SUPERBLOCK_OFFSETS = (0, 4096)
_REFERENCE_START = b'{"pccheck_reference":'
_ZIP_MAGIC = b"PK\x03\x04"
# Pickle protocol 2, with which torch's format from before 1.6 begins.
_PICKLE_START = b"\x80\x02"
_MAX_SAFETENSORS_HEADER = 100_000_000
_SUFFIXES = {
    ".pt": Kind.TORCH,
    ".pth": Kind.TORCH,
    ".ckpt": Kind.TORCH,
    ".bin": Kind.TORCH,
    ".safetensors": Kind.SAFETENSORS,
    ".pccheck": Kind.REGION,
    "": Kind.DCP,
}
_MADE = (Kind.REGION, Kind.TORCH, Kind.SAFETENSORS, Kind.DCP)


def kind_of_source(path: Path) -> Kind:
    """The kind of the checkpoint at ``path``, by its content."""
    if path.is_dir():
        if (path / ".metadata").is_file():
            return Kind.DCP
        raise errors.NotFound(
            f"{path} is a folder without .metadata, so no checkpoint of torch.distributed.checkpoint",
            operation="convert",
            path=str(path),
            advice="name a region, a .pt or .safetensors file, or a DCP folder",
        )
    if not path.exists():
        raise errors.NotFound(f"{path} does not exist", operation="convert", path=str(path))
    with path.open("rb") as file:
        head = file.read(_SUPERBLOCK_OFFSETS[-1] + len(_REGION_MAGIC))
        if any(head[at : at + len(_REGION_MAGIC)] == _REGION_MAGIC for at in _SUPERBLOCK_OFFSETS):
            return Kind.REGION
        if head.startswith(_REFERENCE_START):
            return Kind.REFERENCE
        if head.startswith((_ZIP_MAGIC, _PICKLE_START)):
            return Kind.TORCH
        header_bytes = int.from_bytes(head[:8], "little")
        if len(head) > 8 and head[8:9] == b"{" and header_bytes <= _MAX_SAFETENSORS_HEADER:
            file.seek(8)
            try:
                json.loads(file.read(header_bytes))
                return Kind.SAFETENSORS
            except ValueError:
                pass
    raise errors.NotARegion(
        f"{path} is neither a region, a reference, a .pt nor a .safetensors file",
        operation="convert",
        path=str(path),
        advice="check that it is the file you mean, and whole",
    )


def kind_to_make(path: Path, to: str | None) -> Kind:
    """The kind that ``path`` is to become: ``to`` if given, else what its suffix says."""
    if to is not None:
        for kind in _MADE:
            if kind.value == to:
                return kind
        raise errors.InvalidArgument(f"to={to!r}: expected one of {', '.join(kind.value for kind in _MADE)}")
    kind_of_suffix = _SUFFIXES.get(path.suffix)
    if kind_of_suffix is None:
        raise errors.InvalidArgument(
            f"{path}: the suffix {path.suffix} says no kind of checkpoint",
            path=str(path),
            advice="use .pccheck, .pt, .pth, .ckpt, .bin, .safetensors, or none for a DCP folder; or --to KIND",
        )
    return kind_of_suffix
