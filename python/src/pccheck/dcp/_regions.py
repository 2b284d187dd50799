"""The regions of checkpoint folders as this process uses them: each is opened once, whoever writes to it.

A region has one writer at a time, and opening one starts threads: so all writers of a process share the open stores,
which are closed when the last writer that uses them is gone.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from ..region import create_region, grow_region
from ..store import Store

__all__ = ["Options", "Region", "metadata_name", "rank_name", "read_only", "region_at"]

# Beyond what a save takes: the bytes of values that are no tensors differ a little from save to save.
_SPARE_BYTES = 256 * 1024


def rank_name(rank: int, alone: bool) -> str:
    """File name of a rank's region. ``alone``: of ranks that save without collectives, each its own checkpoint."""
    return f"alone-{rank:05d}.pccheck" if alone else f"rank-{rank:05d}.pccheck"


def metadata_name(rank: int | None) -> str:
    """File name of the region for metadata: the group's, or that of one rank that saves alone."""
    return "metadata.pccheck" if rank is None else f"metadata-{rank:05d}.pccheck"


@dataclass(frozen=True, slots=True)
class Options:
    """How a region is opened for writing."""

    keep: int
    hold: bool
    durability: str
    medium: str
    chunk_bytes: int
    #: the largest staging pool that is acceptable
    staging_bytes: int
    lock_timeout: float | None = field(compare=False)
    #: threads; None: the library's default
    writers: int | None = None

    @property
    def slots(self) -> int:
        """Every checkpoint that is kept, and the one being saved."""
        return self.keep + 1

    def pool_for(self, payload_bytes: int) -> int:
        """A pool no larger than a state needs."""
        chunks = -(-payload_bytes // self.chunk_bytes) + 1
        return max(2 * self.chunk_bytes, min(self.staging_bytes, chunks * self.chunk_bytes))


class Region:
    """One region, open for writing or not. All methods need :attr:`lock`, which is taken before the metadata region's.

    A rank's region also says which save of this process to its folder is the newest; :attr:`claim` guards that, and is
    held while a save is being published. It is taken before the metadata region's lock, and never beside this region's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.claim = threading.Lock()
        #: ``save_id``
        self.newest_save: str | None = None
        #: generation that growing must not lose: of the newest published checkpoint; 0: none
        self.published = 0
        #: the coordinator's region: its newest checkpoint was found complete
        self.checked = False
        self._store: Store | None = None
        self._opened: tuple[Options, int, tuple[int, int]] | None = None
        self._reader: tuple[Store, tuple[int, int]] | None = None

    @property
    def store(self) -> Store | None:
        """The store that is open for writing, unless its file is no longer the one at the path."""
        if self._store is not None and self._opened is not None and _identity(self.path) != self._opened[2]:
            self.close()
        return self._store

    def reading(self) -> Store:
        """A store to read with: the one for writing where it is open, else a read-only one that stays open."""
        if (store := self.store) is not None:
            return store
        identity = _identity(self.path)
        if self._reader is not None:
            if self._reader[1] == identity:
                return self._reader[0]
            self._reader[0].close()
            self._reader = None
        self._reader = (read_only(self.path, small=True), identity)
        return self._reader[0]

    def fit(self, options: Options, payload_bytes: int) -> Store:
        """The region open for saves of ``payload_bytes``; made where there is none, opened where it is not.

        A region that turns out too small for a save is grown by :meth:`grow`.

        Raises:
            Corrupt, NotFound, IoFailed: it should grow, and :attr:`published` cannot be read; nothing was changed.
        """
        pool = options.pool_for(payload_bytes)
        store = self.store
        if store is not None and self._opened is not None:
            opened, pool_bytes, _ = self._opened
            if opened == options and pool_bytes >= pool:
                return store
        checked = self.checked
        self._let_go()
        if not self.path.exists():
            self._make(options, payload_bytes)
        else:
            with read_only(self.path, small=True) as found:
                got = found.got()
            if got.slot_count < options.slots:
                self._grow(options, options.slots, got.slot_bytes)
        self.checked = checked
        return self._open(options, pool)

    def grow(self, options: Options, payload_bytes: int) -> Store:
        """Makes room for saves of ``payload_bytes``; what the region holds stays. Takes room for both meanwhile."""
        store = self.fit(options, payload_bytes)
        got = store.got()
        self._let_go()
        self._grow(options, max(options.slots, got.slot_count), max(_with_spare(payload_bytes), got.slot_bytes))
        return self._open(options, options.pool_for(payload_bytes))

    def close(self) -> None:
        """Lets go of the region; saves in flight are cancelled."""
        self.checked = False
        self._let_go()

    def _let_go(self) -> None:
        store, self._store = self._store, None
        reader, self._reader = self._reader, None
        self._opened = None
        if store is not None:
            store.close()
        if reader is not None:
            reader[0].close()

    def _make(self, options: Options, payload_bytes: int) -> None:
        create_region(self.path, slots=options.slots, payload_bytes=_with_spare(payload_bytes), medium=options.medium)

    def _grow(self, options: Options, slots: int, payload_bytes: int) -> None:
        if self.published:
            # Growing leaves out what it cannot read, and then the old file is gone: that is known before.
            with read_only(self.path) as store:
                store.open(generation=self.published).close()
        lost = grow_region(self.path, slots=slots, payload_bytes=payload_bytes, lock_timeout=options.lock_timeout)
        if lost:
            warnings.warn(
                f"{self.path}: {lost} older checkpoint(s) could not be read when the region was grown, and are gone",
                stacklevel=2,
            )

    def _open(self, options: Options, pool: int) -> Store:
        self._store = Store(
            self.path,
            medium=options.medium,
            durability=options.durability,
            max_in_flight=1,
            keep=options.keep,
            hold=options.hold,
            writers=options.writers,
            staging_bytes=pool,
            chunk_bytes=options.chunk_bytes,
            lock_timeout=options.lock_timeout,
        )
        self._opened = (options, pool, _identity(self.path))
        return self._store


def read_only(path: Path, *, small: bool = False) -> Store:
    """A store that reads beside a writer. Its pool only passes bytes on: beyond a buffer for each of its readers a
    larger one would not be faster.

    Args:
        small: for metadata: one thread, and less memory still.
    """
    chunk_bytes, buffers = (256 << 10, 2) if small else (1 << 20, 16)
    return Store(
        path,
        read_only=True,
        max_in_flight=1,
        readers=1 if small else None,
        chunk_bytes=chunk_bytes,
        staging_bytes=buffers * chunk_bytes,
    )


def _with_spare(payload_bytes: int) -> int:
    """What a slot should hold so that saves of about ``payload_bytes`` fit."""
    return payload_bytes + _SPARE_BYTES


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


_regions: weakref.WeakValueDictionary[str, Region] = weakref.WeakValueDictionary()
_regions_lock = threading.Lock()


def region_at(path: Path) -> Region:
    """The region at a path. Whoever keeps it keeps its store open."""
    key = os.path.realpath(path)
    with _regions_lock:
        region = _regions.get(key)
        if region is None:
            region = _regions[key] = Region(Path(key))
        return region


def _forget() -> None:
    # A forked child: the stores are the parent's, and any lock may have been held by another thread.
    global _regions, _regions_lock
    _regions, _regions_lock = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_forget)
