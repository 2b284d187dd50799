"""`torch.distributed.checkpoint.StorageWriter` on regions."""

from __future__ import annotations

import os
import secrets
import threading
import uuid
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .. import errors
from ..save import Save
from ..store import Store
from ._document import DOCUMENT, Part, Published, Stored, encode, published_texts
from ._folder import TOKEN_KEY, incomplete, published
from ._payload import NamedPayload, StreamedPayload, payload_of
from ._regions import Options, Region, metadata_name, rank_name, region_at

if TYPE_CHECKING:
    from _collections_abc import dict_items

__all__ = ["RegionWriter"]

# The metadata region holds small checkpoints: it gets a small pool and one thread.
_METADATA_CHUNK_BYTES = 256 * 1024
_METADATA_STAGING_BYTES = 4 << 20
# How long the I/O of a save that was given up may take to end before the next save fails.
_DRAIN_SECONDS = 60.0


@dataclass(slots=True)
class _Current:
    """One save, from ``set_up_storage_writer`` to ``finish``."""

    folder: Path
    rank: int
    #: this rank's, whether or not the save has anything to put in it
    region: Region
    #: saved without collectives: this rank's checkpoint is a checkpoint by itself
    alone: bool
    #: the trainer's step when the save was asked for
    step: int | None
    sequence: int = 0
    save_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def metadata_path(self) -> Path:
        return self.folder / metadata_name(self.rank if self.alone else None)

    @property
    def rank_region(self) -> str:
        return self.region.path.name


@dataclass(frozen=True, slots=True)
class _Label:
    """What a save is to be called, as of when it was asked for: it may run on another thread, and later."""

    writer: str
    folder: Path
    step: int | None
    #: process and thread
    asked_by: tuple[int, int]


class _Staged(dict[str, Any]):
    """A staged state dict that can be referenced weakly: it lives as long as the save that reads it."""

    def __init__(self, staged: dict[str, Any], label: _Label) -> None:
        super().__init__(staged)
        self.label = label

    def items(self) -> dict_items[str, Any]:
        # The first that torch does on the thread (or in the process) of a save is to go through its staged state: that
        # tells which save it is. Nothing else that torch hands over does.
        _begun.label = self.label
        return super().items()


# .label: of the staged state that this thread has begun to save
_begun = threading.local()


class RegionWriter(StorageWriter, AsyncStager):
    """Saves distributed checkpoints to a folder of regions, for ``dcp.save`` and ``dcp.async_save``.

    The folder is used again and again: each save adds a checkpoint and, once that is published, the oldest beyond
    ``keep`` makes room. Keep one writer (it keeps the regions open, so that later saves start no thread and no file),
    and use one folder for a run; a folder per step works, but takes the space of ``keep + 1`` checkpoints each.
    All ranks need the same folder, on storage that all of them see.

    A save is durable when ``dcp.save`` returns, or the future of ``dcp.async_save`` is done. A save that fails, on any
    rank, at any point, leaves the published checkpoints as they are. Wait for one save before the next to the same
    folder: one that is not published when another begins is given up (:class:`pccheck.errors.Cancelled`).

    Args:
        path: the folder; made if need be. ``checkpoint_id`` of ``dcp.save`` takes its place.
        single_file_per_rank, sync_files, thread_count, per_thread_copy_ahead, serialization_format: those of
            ``FileSystemWriter``, so that this class can stand in for it. They change nothing: there is one region per
            rank, always durable, always a safetensors payload, and the engine has its own threads.
        cache_staged_state_dict: keep the staged copy that ``dcp.async_save`` makes for the next one. A copy that a save
            still reads is never written to: another is made then.
        overwrite: False: refuse to save where a published checkpoint exists (nothing is overwritten before the new one
            is published, whatever this says).
        keep: how many published checkpoints the folder keeps at least; the one before often can be loaded too.
        step: the trainer's step, to be found again by ``RegionReader(step=...)``; set :attr:`step` before each save.
            A save keeps the step and the folder that the writer had when ``dcp.save`` or ``dcp.async_save`` was called
            (with an ``async_stager`` of the caller's own: when the save begins in the background).
        staging_bytes: the most that the engine's staging pool takes, and the most that copies of tensors take which
            are not in contiguous host memory (default 256 MiB; the pool is never larger than the state).
        chunk_bytes: unit of copying, hashing and writing; a multiple of 4096.
        durability: the weakest that is acceptable: "power" or "process" (tmpfs is enough).
        medium: "auto", "dax", "mmap" or "direct".
        timeout: seconds that one rank's data may take to become durable; None: for ever.
        lock_timeout: seconds to wait while another process writes to a region.
    """

    # What dcp.async_save asks of a stager: staging has ended when `stage` returns.
    _synchronize_after_execute: bool = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: Any = None,
        *,
        keep: int = 1,
        step: int | None = None,
        staging_bytes: int = 256 << 20,
        chunk_bytes: int = 1 << 20,
        durability: str = "power",
        medium: str = "auto",
        timeout: float | None = None,
        lock_timeout: float | None = 10.0,
    ) -> None:
        super().__init__()
        if _extensions:
            raise errors.Unsupported(
                "stream extensions (_extensions) transform FileSystemWriter's files; regions hold plain tensors",
                advice="leave _extensions out",
            )
        if not isinstance(keep, int) or not 1 <= keep <= 200:
            raise errors.InvalidArgument(f"keep={keep!r}: expected 1 to 200 checkpoints")
        self.cache_staged_state_dict = cache_staged_state_dict
        self.overwrite = overwrite
        #: the trainer's step of the next save; None: none
        self.step = step
        self._path = Path(path)
        self._name = secrets.token_hex(8)
        self._staging_bytes = staging_bytes
        self._timeout = timeout
        self._rank_options = Options(
            keep=keep,
            hold=True,
            durability=durability,
            medium=medium,
            chunk_bytes=chunk_bytes,
            staging_bytes=staging_bytes,
            lock_timeout=lock_timeout,
        )
        self._metadata_options = Options(
            keep=keep,
            hold=False,
            durability=durability,
            medium=medium,
            chunk_bytes=_METADATA_CHUNK_BYTES,
            staging_bytes=_METADATA_STAGING_BYTES,
            lock_timeout=lock_timeout,
            writers=1,
        )
        self._fresh()

    def _fresh(self) -> None:
        # Saves of several threads (of dcp.async_save) may overlap: each has its own state, and its own folder.
        self._thread = threading.local()
        self._let_go()

    def _let_go(self) -> None:
        self._held: dict[Path, Region] = {}
        self._stager: DefaultStager | None = None
        self._staged: weakref.ReferenceType[_Staged] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # dcp.async_save in a process sends the writer there: the regions are opened anew.
        unshared = ("_thread", "_held", "_stager", "_staged")
        state = {name: value for name, value in self.__dict__.items() if name not in unshared}
        return state | {"_path": self._folder()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    # What names a checkpoint

    @property
    def path(self) -> Path:
        """The folder of the save in progress on this thread, else of the next one."""
        current: _Current | None = getattr(self._thread, "current", None)
        return self._label().folder if current is None else current.folder

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for what can be a folder."""
        if "://" in os.fspath(checkpoint_id):
            return False
        return any(parent.exists() and os.access(parent, os.W_OK) for parent in Path(checkpoint_id).parents)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save of this thread follows; it and later ones go to this folder if one is given."""
        self._thread.current = None
        if checkpoint_id:
            self._thread.folder = Path(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """What torch hands to planners, and the metadata keeps."""
        current: _Current | None = getattr(self._thread, "current", None)
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=None if current is None else current.save_id)

    # The steps of a save, in the order in which torch calls them

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks. ``rank`` and ``use_collectives`` come from torch."""
        rank = kwargs.get("rank")
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        label = self._label()
        _begun.label = None
        alone = not kwargs.get("use_collectives", True)
        region = self._region(label.folder / rank_name(rank, alone))
        self._thread.current = _Current(label.folder, rank, region, alone, label.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """All ranks: makes the folder. An older save to it that is not published yet is given up from here on."""
        current = self._current()
        current.folder.mkdir(parents=True, exist_ok=True)
        if not self.overwrite and current.metadata_path.exists():
            region = self._region(current.metadata_path)
            with region.lock:
                found, _ = published(region.reading())
            if found:
                raise errors.AlreadyExists(
                    f"Checkpoint already exists (save {found[0].sequence}), and overwrite is False",
                    operation="save",
                    path=str(current.folder),
                    advice="save to another folder, or let this one keep several: overwrite=True, keep=...",
                )
        with current.region.claim:
            current.region.newest_save = current.save_id
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator: opens the metadata region. What it publishes last is what all ranks will keep."""
        current = self._current()
        region = self._region(current.metadata_path)
        with region.lock:
            found = published(region.reading())[0] if region.path.exists() else []
            region.published = found[0].generation if found else 0
            store = region.fit(self._metadata_options, _METADATA_CHUNK_BYTES)
            if not region.checked:
                _fall_back(store, current.folder)
                region.checked = True
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All ranks: saves this rank's items. They are durable on return, and count once :meth:`finish` publishes them.

        Raises:
            NoSpace, DurabilityError, InUse, IoFailed, ...: this save is lost, older ones are intact.
        """
        current = self._current()
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(current, plan, planner))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The coordinator: publishes what all ranks have saved, by one durable metadata checkpoint."""
        current = self._current()
        metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
        metadata.storage_data = {written.index: written.storage_data for rank in results for written in rank}
        metadata.storage_meta = self.storage_meta()
        document = encode(metadata)
        parts = {stored.part.region: stored.part for stored in metadata.storage_data.values()}
        region = self._region(current.metadata_path)
        # What a save finds published when it has claimed the folder is all that ever precedes it.
        with current.region.claim, region.lock:
            _refuse_overtaken(current)
            found, _ = published(region.fit(self._metadata_options, len(document)))
            region.published = found[0].generation if found else 0
            sequence = max([current.sequence, *(1 + old.sequence for old in found[:1])])
            texts = published_texts(sequence, current.step, current.save_id, parts)
            payload = NamedPayload([], {DOCUMENT: document})
            step = sequence if current.step is None else current.step
            self._save(region, self._metadata_options, payload, step, texts)
        self._thread.current = None

    # Staging for dcp.async_save

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """A copy of the state in host memory: exact, and complete on return, so that training may go on."""
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        label = _Label(self._name, self._folder(), self.step, _here())
        free = self._staged is None or self._staged() is None
        if not (self.cache_staged_state_dict and free):
            stager = DefaultStager(options)
            staged = _Staged(cast(dict[str, Any], stager.stage(state_dict)), label)
            stager.close()
            return staged
        if self._stager is None:
            self._stager = DefaultStager(options)
        reusable = _Staged(cast(dict[str, Any], self._stager.stage(state_dict)), label)
        self._staged = weakref.ref(reusable)
        return reusable

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for: :meth:`stage` has copied everything."""

    def close(self) -> None:
        """Lets go of the regions and of cached memory; the writer may be used again.

        Call it before another process saves to the folder. Regions that other writers of this process use stay open.
        """
        self._let_go()

    # Parts of these

    def _folder(self) -> Path:
        folder: Path | None = getattr(self._thread, "folder", None)
        return self._path if folder is None else folder

    def _label(self) -> _Label:
        """Of the staged state that this thread saves, else of a save that is asked for now."""
        staged: _Label | None = getattr(_begun, "label", None)
        if staged is None or staged.writer != self._name or staged.asked_by == _here():
            return _Label(self._name, self._folder(), self.step, _here())
        # dcp.async_save says in the background which folder it was given.
        return replace(staged, folder=getattr(self._thread, "folder", staged.folder))

    def _current(self) -> _Current:
        current: _Current | None = getattr(self._thread, "current", None)
        if current is None:
            raise errors.InvalidState(
                "no save is in progress on this thread", operation="save", advice="call it through dcp.save"
            )
        return current

    def _region(self, path: Path) -> Region:
        if any(other.parent != path.parent for other in self._held):
            # The writer has moved on to another folder.
            self._held = {other: held for other, held in self._held.items() if other.parent == path.parent}
        region = self._held[path] = region_at(path)
        return region

    def _write(self, current: _Current, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        region = current.region
        with region.lock:
            # An overtaken save would discard what the newer one has written.
            _refuse_overtaken(current)
            # Only now: while this save waited for the region, another may have been published.
            found = self._published(current)
            current.sequence = 1 + (found[0].sequence if found else 0)
            if not plan.items:
                return []
            payload = payload_of(plan.items, planner, self._staging_bytes)
            token = secrets.token_hex(8)
            texts = {TOKEN_KEY: token}
            if found and current.rank_region in found[0].parts and not region.path.exists():
                raise _lost(found[0], str(region.path))
            newest = found[0].parts.get(current.rank_region) if found else None
            region.published = 0 if newest is None else newest.generation
            _settle(region.fit(self._rank_options, payload.payload_bytes(texts)), found, current.rank_region)
            generation = self._save(region, self._rank_options, payload, current.sequence, texts)
        part = Part(current.rank_region, generation, token)
        return [
            WriteResult(
                index=item.item.index,
                size_in_bytes=item.nbytes,
                storage_data=Stored(part, item.tensor, item.offset, item.nbytes, item.dtype, item.shape),
            )
            for item in payload.items
        ]

    def _published(self, current: _Current) -> list[Published]:
        region = self._region(current.metadata_path)
        if not current.metadata_path.exists():
            raise errors.NotFound(
                f"rank {current.rank} does not see the file that the coordinator has made",
                operation="save",
                path=str(current.metadata_path),
                advice="all ranks need the same folder, on storage that all of them see",
            )
        with region.lock:
            return published(region.reading())[0]

    def _save(
        self,
        region: Region,
        options: Options,
        payload: NamedPayload | StreamedPayload,
        step: int,
        texts: dict[str, str],
    ) -> int:
        payload_bytes = payload.payload_bytes(texts)
        store = region.fit(options, payload_bytes)
        try:
            save = payload.begin(store, step, texts)
        except errors.TooLarge:
            save = payload.begin(region.grow(options, payload_bytes), step, texts)
        return self._durable(save)

    def _durable(self, save: Save) -> int:
        try:
            return save.durable(self._timeout).generation
        except BaseException:
            save.cancel()
            raise
        finally:
            # Until it is copied the engine reads the tensors' memory.
            save.close()


def _refuse_overtaken(current: _Current) -> None:
    if current.region.newest_save != current.save_id:
        raise errors.Cancelled(
            "another save to this folder began before this one was published, which is given up",
            operation="save",
            path=str(current.folder),
            advice="wait for the future of dcp.async_save before saving to the same folder again",
        )


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _settle(store: Store, found: list[Published], region: str) -> None:
    """Makes a rank's region agree with what is published, before it saves again.

    The newest published checkpoint is marked as durable on all ranks, which lets older ones go; what is newer was never
    published, because some rank or the coordinator failed, and is discarded.
    """
    # A save that timed out may still have I/O under way.
    store.drain(_DRAIN_SECONDS)
    have = {info.generation for info in store.checkpoints()}
    parts = [(publication, publication.parts[region]) for publication in found if region in publication.parts]
    kept = next(((publication, part) for publication, part in parts if part.generation in have), None)
    if found and region in found[0].parts and (kept is None or kept[0] is not found[0]):
        raise _lost(found[0], store.path)
    generation = 0
    if kept is not None:
        generation = kept[1].generation
        store.mark_global(kept[0].sequence)
    if any(other > generation for other in have):
        store.discard_newer(generation)


def _lost(publication: Published, path: str) -> errors.InvalidState:
    return errors.InvalidState(
        f"save {publication.sequence} is published, but its part is not in this region",
        operation="save",
        path=path,
        advice="put the right file back, or save to an empty folder",
    )


def _fall_back(store: Store, folder: Path) -> None:
    """Takes back published checkpoints of which a part is lost, where an older one is complete."""
    found, rejected = published(store)
    reasons = list(rejected)
    for number, publication in enumerate(found):
        why = incomplete(folder, publication)
        if why is None:
            if reasons:
                _refuse_absent(folder, found[:number])
                store.discard_newer(publication.generation)
                warnings.warn(
                    f"{folder}: going on from save {publication.sequence}, the newest complete one: "
                    + "; ".join(reasons),
                    stacklevel=2,
                )
            return
        reasons.append(why)
    if reasons:
        raise errors.Corrupt(
            f"none of its published checkpoints is complete: {'; '.join(reasons)}",
            operation="save",
            path=str(folder),
            advice="put the missing files back, or save to another folder",
        )


def _refuse_absent(folder: Path, passed_over: list[Published]) -> None:
    # A whole file that is not there may come back, with its mount for one: what needs it is not discarded.
    for publication in passed_over:
        for region in publication.parts:
            if not (folder / region).exists():
                raise errors.NotFound(
                    f"save {publication.sequence} is published, but its file {region} is not there",
                    operation="save",
                    path=str(folder),
                    advice="put the file back (is its storage mounted?), or load an older checkpoint and save to "
                    "another folder",
                )
