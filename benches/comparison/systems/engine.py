"""PCcheck by its Python package: one save in flight, in a region of two slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pccheck

from ..state import State
from .base import System

CHUNK_BYTES = 1 << 20
#: beside those that hold the state: the header, and chunks that straddle
SPARE_CHUNKS = 8


class _Engine(System):
    medium: ClassVar[str] = "direct"
    backend: ClassVar[str] = "auto"
    #: the staging pool holds the state; otherwise it is the default one
    whole: ClassVar[bool] = False
    #: the region is written once when it is made, which is part of `open`
    prewrite: ClassVar[bool] = True

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._path = folder / "region.pcc"

    def open(self) -> None:
        payload_bytes = pccheck.payload_bytes(self.state.tensors)
        options: dict[str, Any] = {"payload_bytes": payload_bytes, "medium": self.medium, "prewrite": self.prewrite}
        pccheck.format_region(self._path, slots=2, **options)
        self.reopen()

    def reopen(self) -> None:
        chosen: dict[str, Any] = {"medium": self.medium, "backend": self.backend, "durability": self.durability}
        if self.whole:
            chunks = -(-self.state.nbytes // CHUNK_BYTES) + SPARE_CHUNKS
            chosen |= {"staging_bytes": chunks * CHUNK_BYTES, "chunk_bytes": CHUNK_BYTES}
        self._store = pccheck.Store(self._path, max_in_flight=1, **chosen)

    def save(self, step: int) -> None:
        self._save = self._store.save(step, self.state.tensors)
        self._save.copied()

    def wait(self) -> None:
        self._save.durable()

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        with self._store.restore(target) as checkpoint:
            return checkpoint.step, target

    def close(self) -> None:
        self._store.close()

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self._store.got()) | {"prewritten": self.prewrite}


class Direct(_Engine):
    """O_DIRECT through io_uring, everything by default."""


class DirectWhole(_Engine):
    whole = True


class DirectFresh(_Engine):
    """Each slot's first save goes to extents that were never written."""

    prewrite = False


class Threads(_Engine):
    """O_DIRECT where io_uring is refused."""

    backend = "threads"


class ThreadsWhole(Threads):
    whole = True


class Mapped(_Engine):
    medium = "mmap"


class MappedWhole(Mapped):
    whole = True


class Tmpfs(_Engine):
    """The path of persistent memory: non-temporal stores into a mapping."""

    medium = "auto"
    durability = "process"
