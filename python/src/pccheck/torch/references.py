"""Reference files: what stands at a path where a framework expects a checkpoint file.

A reference is a small JSON file that names one checkpoint of a region in the folder ``.pccheck`` of its own folder or
of one above it. It is written when that checkpoint is durable, and by rename, so that it is whole or absent. It may be
renamed, linked and copied below the folder that holds ``.pccheck``; elsewhere the data are out of its reach.
"""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import errors, files

__all__ = ["FOLDER", "Reference", "is_reference", "read", "references_below", "region_candidates", "write"]

#: name of the folder that holds the regions
FOLDER = ".pccheck"
#: the first key of a reference file, and so what its bytes begin with
KEY = "pccheck_reference"
VERSION = 1
#: a reference is far smaller; a larger file is none
MAX_BYTES = 4096
#: how often a folder that changes meanwhile is walked again
_WALKS = 4

_START = f'{{"{KEY}":'.encode()
_NOTE = "The checkpoint is in the region. To get a file of its own: python -m pccheck convert THIS_FILE checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Reference:
    """One checkpoint of a region, by name."""

    #: file name of the region, in the folder ``.pccheck``
    region: str
    #: identity of the region, hexadecimal
    region_uuid: str
    generation: int
    step: int
    #: also in the checkpoint's metadata: what is found under the generation is what was meant
    id: str


def new_id() -> str:
    """A name for a checkpoint that nothing else has."""
    return uuid.uuid4().hex


def write(path: Path, reference: Reference) -> None:
    """Puts ``reference`` at ``path``, replacing what is there. Durable on return."""
    files.make_folders(path.parent)
    text = json.dumps({KEY: VERSION, **asdict(reference), "note": _NOTE})
    with files.replaced_file(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def is_reference(path: str | os.PathLike[str]) -> bool:
    """True when the file at ``path`` begins as a reference does; False for other files, folders and nothing."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_START)) == _START
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


def read(path: str | os.PathLike[str]) -> Reference:
    """The reference at ``path``.

    Raises:
        NotFound: there is no file.
        NotARegion: it is another kind of file.
        Corrupt: it begins as a reference, and is damaged.
        Unsupported: a newer version of this package wrote it.
    """
    path = Path(path)
    if not path.exists():
        dangling = " (a link to a file that is not there)" if path.is_symlink() else ""
        raise errors.NotFound(
            f"no checkpoint at {path}{dangling}",
            operation="load",
            path=str(path),
            advice="a save that was in flight when its process ended leaves nothing at its path; load an earlier one",
        )
    if not is_reference(path):
        raise errors.NotARegion(
            f"{path} is no reference to a checkpoint in a region",
            operation="load",
            path=str(path),
            advice="read it with the program that wrote it, or see python -m pccheck convert --help",
        )
    return _parse(path)


def _parse(path: Path) -> Reference:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        fields = json.loads(content)
        version = fields[KEY]
        if version != VERSION:
            raise errors.Unsupported(
                f"{path} is a reference of version {version!r}; this package knows version {VERSION}",
                operation="load",
                path=str(path),
                advice="install a newer pccheck",
            )
        reference = Reference(
            region=fields["region"],
            region_uuid=fields["region_uuid"],
            generation=fields["generation"],
            step=fields["step"],
            id=fields["id"],
        )
        texts = (reference.region, reference.region_uuid, reference.id)
        numbers = (reference.generation, reference.step)
        if not (all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)):
            raise TypeError("a field has the wrong type")
        if Path(reference.region).name != reference.region:
            raise ValueError(f"{reference.region!r} is no file name")
    except (ValueError, KeyError, TypeError) as why:
        raise errors.Corrupt(
            f"the reference {path} is damaged: {why}",
            operation="load",
            path=str(path),
            advice="python -m pccheck list shows what its region holds; convert takes a checkpoint by --generation",
        ) from None
    return reference


def region_candidates(path: str | os.PathLike[str], reference: Reference) -> Iterator[Path]:
    """Files that may be the region of the reference at ``path``, the nearest first; their identity is to be checked."""
    for above in Path(os.path.realpath(path)).parents:
        region = above / FOLDER / reference.region
        if region.is_file():
            yield region


def references_below(folder: Path, region_uuid: str) -> dict[int, list[Path]]:
    """Reference files below ``folder`` that name a region: generation to paths. Links are not followed.

    A damaged reference might have named anything: it raises :class:`~pccheck.errors.Corrupt`. What cannot be looked at
    might hold one: it raises :class:`OSError`.
    """
    for _ in range(_WALKS):
        with suppress(FileNotFoundError):
            return _walked(folder, region_uuid)
        # Something went away in mid-walk. It may have been renamed to where the walk had been already.
    return _walked(folder, region_uuid)


def _walked(folder: Path, region_uuid: str) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for at, folders, names in os.walk(folder, onerror=_raise):
        if FOLDER in folders:
            folders.remove(FOLDER)
        for name in names:
            path = Path(at, name)
            # An unfinished file was never announced, and what a crash left of one never will be.
            if files.is_unfinished(name) or path.is_symlink():
                continue
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                continue
            with path.open("rb") as file:
                is_one = file.read(len(_START)) == _START
            if not is_one:
                continue
            reference = _parse(path)
            if reference.region_uuid == region_uuid:
                found.setdefault(reference.generation, []).append(path)
    return found


def _raise(why: OSError) -> None:
    raise why
