"""What a checkpoint folder holds: its published checkpoints, and whether all their parts are there."""

from __future__ import annotations

from pathlib import Path

from .. import errors
from ..checkpoint import Checkpoint
from ..store import Store
from ._document import DOCUMENT, Published
from ._regions import read_only

__all__ = ["TOKEN_KEY", "document_bytes", "incomplete", "open_part", "published"]

#: key of the text in a rank's checkpoint that says which published checkpoint it belongs to
TOKEN_KEY = "dcp.token"


def published(store: Store) -> tuple[list[Published], list[str]]:
    """The published checkpoints of a metadata region, newest first, and why others of it do not count."""
    found: list[Published] = []
    rejected: list[str] = []
    for info in store.checkpoints():
        try:
            with store.open(generation=info.generation) as checkpoint:
                found.append(Published.of(info.generation, checkpoint.metadata, store.path))
        except (errors.NotFound, errors.Reclaimed):
            # A live writer was faster: what took its place is newer, and the caller looks again.
            continue
        except errors.Corrupt as why:
            rejected.append(f"generation {info.generation} of {Path(store.path).name}: {why.message}")
    return found, rejected


def document_bytes(store: Store, chosen: Published) -> bytes:
    """The JSON of a published checkpoint."""
    with store.open(generation=chosen.generation, verify=False) as checkpoint:
        text = bytearray(checkpoint.tensors[DOCUMENT].nbytes)
        if text:
            checkpoint.read_bytes(DOCUMENT, 0, text)
        return bytes(text)


def open_part(store: Store, chosen: Published, region: str, *, verify: bool = False) -> Checkpoint:
    """A rank's part of a published checkpoint.

    Raises:
        NotFound: the region does not hold it.
    """
    part = chosen.parts[region]
    checkpoint = store.open(generation=part.generation, verify=verify)
    if checkpoint.metadata.get(TOKEN_KEY) != part.token:
        checkpoint.close()
        raise errors.NotFound(
            f"its generation {part.generation} belongs to another save than metadata {chosen.sequence} names",
            operation="load",
            path=store.path,
            advice="the region was made anew or copied from elsewhere; put the right file back",
        )
    return checkpoint


def incomplete(folder: Path, chosen: Published, *, verify: bool = False) -> str | None:
    """Why a published checkpoint cannot be loaded; None where all its parts are there.

    Args:
        verify: read and verify every byte of every part, instead of only looking for them.

    Raises:
        IoFailed, OutOfMemory, ...: nothing is known of the checkpoint; trying again may find it.
    """
    for region in chosen.parts:
        try:
            with read_only(folder / region) as store:
                open_part(store, chosen, region, verify=verify).close()
        except (errors.NotFound, errors.NotARegion, errors.Corrupt, errors.Reclaimed) as why:
            return f"save {chosen.sequence}: {region}: {why.message}"
    return None
