"""Checkpoints of other kinds into regions and back: ``.pt``, safetensors, DCP folders.

On the command line: ``python -m pccheck convert``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .. import errors
from .kinds import Kind, kind_of_source, kind_to_make
from .progress import Progress

__all__ = ["Converted", "convert"]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made of what."""

    source: str
    source_kind: str
    destination: str
    destination_kind: str
    #: the trainer's step of the checkpoint; 0 where the source tells none
    step: int
    tensors: int
    #: of the tensors, tied ones counted once
    tensor_bytes: int
    #: what the caller should know: damaged newer checkpoints that were passed over, and the like
    notes: list[str]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    step: int | None = None,
    generation: int | None = None,
    to: str | None = None,
    slots: int = 3,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Makes ``destination`` of the checkpoint in ``source``. It is durable on return, and was whole or absent before.

    Kinds: ``region`` (a region, or a reference to a checkpoint in one), ``torch`` (``.pt``, ``.pth``, ``.ckpt``,
    ``.bin``), ``safetensors`` and ``dcp`` (a folder of ``torch.distributed.checkpoint``). That of the source is found
    by its content, that of the destination by its name or ``to``. Where the newest checkpoint of a
    region is damaged, an older one is taken, and noted.

    Nothing that a file holds is executed: of pickled kinds, only tensors and plain values are loaded. Memory: files
    are mapped and regions written through the staging pool, so that a region is made of a file, and a safetensors file
    of a region, in bounded memory; otherwise one state is held. A region has mode 0600 at most, everything else the
    mode that the umask leaves.

    Args:
        step: which checkpoint of a region, the newest of that step; for other sources, the step that the new region
            notes.
        generation: which checkpoint of a region. The default is the newest.
        slots: of a region that is made.
        force: replace what is at ``destination``. Of a symbolic link the link itself is replaced, never what it leads
            to.
        progress: is told how far it is.

    Raises:
        NotFound, NotARegion, Corrupt: of the source.
        UnsupportedValue: of a value that the destination cannot hold, naming where it is.
        AlreadyExists: of the destination, without ``force``.
    """
    from . import readers, writers

    source, destination = Path(source), Path(os.path.abspath(destination))  # noqa: PTH100 - a link is replaced itself
    source_kind = kind_of_source(source)
    made = kind_to_make(destination, to)
    if os.path.lexists(destination):
        if not force:
            raise _exists(destination)
        of_source, of_destination = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
        if of_source == of_destination:
            raise errors.InvalidArgument(f"{source} is source and destination", path=str(source))
        if of_destination in of_source.parents:
            raise errors.InvalidArgument(
                f"{destination} is to be replaced, and holds the source {source}",
                operation="convert",
                path=str(destination),
                advice="name a folder of its own",
            )
        # A link that leads nowhere is of no kind.
        if destination.exists() and destination.is_dir() != (made is Kind.DCP):
            what = "a folder" if destination.is_dir() else "no folder"
            raise errors.AlreadyExists(
                f"{destination} is {what}", operation="convert", path=str(destination), advice="remove it first"
            )
    if generation is not None and source_kind is not Kind.REGION:
        raise errors.InvalidArgument(f"generation={generation}: {source} is no region", path=str(source))
    progress = progress or Progress(quiet=True)
    with readers.opened(source, source_kind, step=step, generation=generation, progress=progress) as found:
        try:
            writers.write(found, destination, made, slots=slots, replace=force, progress=progress)
        except FileExistsError:
            # What is in the way may also be above it.
            if not os.path.lexists(destination):
                raise
            raise _exists(destination) from None
        return Converted(
            source=str(source),
            source_kind=source_kind.value,
            destination=str(destination),
            destination_kind=made.value,
            step=found.step,
            tensors=found.tensor_count,
            tensor_bytes=found.tensor_bytes,
            notes=found.notes,
        )


def _exists(destination: Path) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        f"{destination} exists", operation="convert", path=str(destination), advice="--force replaces it"
    )
