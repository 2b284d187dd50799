"""One region per folder, shared by all of a process, and the thread that finishes its saves.

The order of what happens to paths is the order in which it was asked for: a checkpoint is removed only after every
earlier save has become durable, so that at every instant one that was announced can be loaded.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors, files
from ..region import format_region, grow_region, payload_bytes
from ..save import Save
from ..store import Store
from . import references
from .references import Reference

__all__ = ["REFERENCE_KEY", "FolderOptions", "RegionFolder", "region_name"]

#: metadata key of a checkpoint that a reference names: JSON of the reference's id and its path below the folder
REFERENCE_KEY = "reference"

_MAX_SLOTS = 240
_SLOT_ALIGN_BYTES = 2 << 20
# The next states of a run are seldom exactly as large as its first: counters get digits, metrics get entries.
_HEADROOM_BYTES = 256 << 10
_EXIT_TIMEOUT = 60.0
#: of a walk over the references that does not tell which there are
_UNKNOWN = (errors.Corrupt, errors.Unsupported, OSError)

_open_folders: dict[tuple[Path, int], RegionFolder] = {}
_registry_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class FolderOptions:
    """How a folder's region is made and opened; see :class:`pccheck.torch.paths.PathStore`."""

    slots: int = 6
    max_in_flight: int = 2
    durability: str = "power"
    medium: str = "auto"
    staging_bytes: int | None = None
    timeout: float | None = 600.0
    lock_timeout: float | None = 10.0

    #: the newest checkpoint outlives its reference until the next one is durable
    keep = 1


def region_name(rank: int) -> str:
    """File name of the region of one rank."""
    return f"region-{rank}.pccheck"


@dataclass(slots=True)
class _Job:
    """Something that the thread does, in order. ``failed`` is told why it could not."""

    path: Path
    failed: Callable[[BaseException], None]
    #: the save that this job finishes; None: the path is removed
    save: Save | None = None
    reference: Reference | None = None


class RegionFolder:
    """The region of one rank in one folder. Made by :meth:`acquire`, given back by :meth:`release`."""

    def __init__(self, folder: Path, rank: int, options: FolderOptions) -> None:
        self.folder = folder
        self.rank = rank
        self.options = options
        self.region = folder / references.FOLDER / region_name(rank)
        self._users = 0
        self._pid = os.getpid()
        self._store: Store | None = None
        self._uuid = ""
        # Held by whoever asks for something; the thread never takes it, so that it may be held while waiting for the
        # thread. The store is opened, closed and replaced only by its holder, and only while no job is unfinished.
        self._entry = threading.RLock()
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._running: _Job | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        # Of the thread alone: removals put off since a save failed.
        self._put_off: dict[Path, _Job] = {}
        self._save_failed = False
        self._warned = False

    @classmethod
    def acquire(cls, folder: Path, rank: int, options: FolderOptions) -> RegionFolder:
        """The process's one object for the folder and rank. Opens nothing yet.

        Raises:
            InvalidArgument: it is in use with other options.
        """
        folder = Path(os.path.realpath(folder))
        with _registry_lock:
            found = _open_folders.get((folder, rank))
            if found is None or found._pid != os.getpid():
                found = _open_folders[folder, rank] = cls(folder, rank, options)
            if found.options != options:
                raise errors.InvalidArgument(
                    f"{folder} is in use in this process with {found.options}, found {options}",
                    advice="give all path stores of a folder the same options",
                )
            found._users += 1
            return found

    def release(self, timeout: float | None = None) -> None:
        """Gives it back; the last one waits until all is done, and closes the region.

        Raises:
            TimedOut: the region is closed all the same, and the saves that were not durable are cancelled.
        """
        with _registry_lock:
            self._users -= 1
            last = self._users == 0
            if last and _open_folders.get((self.folder, self.rank)) is self:
                del _open_folders[self.folder, self.rank]
        if last:
            self._close(timeout)

    def _close(self, timeout: float | None) -> None:
        if self._pid != os.getpid():
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        # A thread that is stuck in a save holds it.
        if not self._entry.acquire(timeout=-1 if timeout is None else timeout):
            raise errors.TimedOut(
                f"another thread still saves to {self.folder} after {timeout} s",
                operation="close",
                path=str(self.region),
                advice="end that thread's save first; the region stays open",
            )
        try:
            try:
                self.wait(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except errors.TimedOut:
                raise errors.TimedOut(
                    f"saves to {self.folder} were not durable after {timeout} s and are cancelled",
                    operation="close",
                    path=str(self.region),
                    advice="allow close() more time",
                ) from None
            finally:
                with self._changed:
                    self._stopping = True
                    self._changed.notify_all()
                if self._store is not None:
                    self._store.close()
                    self._store = None
        finally:
            self._entry.release()

    def save(
        self,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, str],
        path: Path,
        step: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        """Saves host arrays, which ends with a reference at ``path``; they may change on return.

        ``failed`` is called by the thread if it does not come to that. When this is interrupted, the save is cancelled:
        the arrays may change before they are copied.
        """
        self._check_process()
        reference_id = references.new_id()
        note = {"id": reference_id, "path": os.path.relpath(path, self.folder)}
        metadata = {**metadata, REFERENCE_KEY: json.dumps(note)}
        save: Save | None = None
        try:
            with self._entry:
                store = self._ready(tensors, metadata)
                try:
                    save = self._begin(store, step, tensors, metadata)
                except errors.TooLarge:
                    needed = payload_bytes(tensors, metadata)
                    store = self._grow(store, store.got().slot_count, needed + needed // 32 + _HEADROOM_BYTES)
                    save = self._begin(store, step, tensors, metadata)
                name = self.region.name
                reference = Reference(name, self._uuid, save.generation, step, reference_id)
                self._enqueue(_Job(path, failed, save, reference))
            with suppress(errors.PccheckError):
                # Why it failed is told by the thread that waits until it is durable.
                save.copied()
        except BaseException:
            if save is not None:
                with suppress(errors.PccheckError):
                    save.cancel()
            raise

    def _begin(self, store: Store, step: int, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Save:
        return store.save(step, tensors, metadata, timeout=self.options.timeout, pin=True)

    def remove(self, path: Path, failed: Callable[[BaseException], None]) -> None:
        """Removes the reference at ``path``, and frees its checkpoint, when every earlier save is durable."""
        self._check_process()
        with self._entry:
            if self._store is None and self.region.is_file():
                self._store = self._opened()
            self._enqueue(_Job(path, failed))

    def pending(self, path: Path) -> bool:
        """True while a save or removal of ``path`` is not finished."""
        with self._changed:
            return any(job.path == path for job in self._unfinished())

    def wait(self, path: Path | None = None, timeout: float | None = None) -> None:
        """Waits until what was asked for (of ``path``, or all) is finished, well or not.

        Raises:
            TimedOut: it goes on.
        """
        self._check_process()

        def finished() -> bool:
            return not any(path in (None, job.path) for job in self._unfinished())

        with self._changed:
            if not self._changed.wait_for(finished, timeout):
                raise errors.TimedOut(
                    f"saves to {self.folder} are still not durable after {timeout} s",
                    operation="wait",
                    path=str(self.region),
                    advice="wait again; they go on",
                )

    def opened(self, region_uuid: str) -> Store | None:
        """The open store, if this process has that region open: to be used within :meth:`entered`."""
        return self._store if region_uuid == self._uuid else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While it lasts, the store is not closed and replaced by a larger one."""
        with self._entry:
            yield

    def _unfinished(self) -> list[_Job]:
        return [*self._jobs, *([self._running] if self._running else [])]

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise errors.Forked(
                f"the path store of {self.folder} was made before this process was forked",
                path=str(self.region),
                advice="make a new one in this process",
            )

    # The region: made, opened, given room.

    def _ready(self, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Store:
        """The open store, with a slot for one more pinned checkpoint."""
        if self._store is None:
            if not self.region.exists():
                self._format(payload_bytes(tensors, metadata))
            self._store = self._opened()
        store = self._store
        if self._lacking_slots(store) > 0:
            # References about to be removed free their slots; growing is far dearer than to wait for that.
            self.wait(timeout=self.options.timeout)
        if self._lacking_slots(store) > 0:
            self._unpin_orphans(store)
        lacking = self._lacking_slots(store)
        if lacking > 0:
            slots = store.got().slot_count
            if slots + lacking > _MAX_SLOTS:
                raise errors.TooLarge(
                    f"{self.region} has {slots} slots of at most {_MAX_SLOTS}, and {lacking} more are needed",
                    operation="save",
                    path=str(self.region),
                    advice="remove some of the folder's checkpoints",
                )
            store = self._grow(store, min(_MAX_SLOTS, slots + max(lacking, slots // 2)), 0)
        return store

    def _format(self, needed: int) -> None:
        files.make_folders(self.region.parent)
        # Appears when it is complete: what a crash leaves under the other name is overwritten.
        new = self.region.with_name(self.region.name + ".new")
        payload = needed + needed // 32 + _HEADROOM_BYTES
        slots, medium = max(self.options.slots, self._spare_slots() + 1), self.options.medium
        format_region(new, slots=slots, payload_bytes=payload, force=True, medium=medium)
        with suppress(FileExistsError):
            os.link(new, self.region)
        new.unlink()
        files.sync_folder(self.region.parent)

    def _opened(self) -> Store:
        options = self.options
        store = Store(
            self.region,
            durability=options.durability,
            medium=options.medium,
            max_in_flight=options.max_in_flight,
            keep=options.keep,
            staging_bytes=options.staging_bytes,
            lock_timeout=options.lock_timeout,
        )
        self._uuid = store.got().region_uuid
        return store

    def _spare_slots(self) -> int:
        return self.options.max_in_flight + self.options.keep

    def _lacking_slots(self, store: Store) -> int:
        kept = {info.generation for info in store.checkpoints() if info.pinned}
        with self._changed:
            kept |= {job.save.generation for job in self._unfinished() if job.save is not None}
        needed = len(kept) + 1 + self._spare_slots() + store.stats().quarantined_slots
        return needed - store.got().slot_count

    def _unpin_orphans(self, store: Store) -> None:
        """Frees what a crash between commit and reference, or a deleted reference, has left pinned."""
        try:
            referenced = references.references_below(self.folder, self._uuid)
        except _UNKNOWN:
            # What it means is unknown, so nothing is known to be superfluous.
            return
        for info in store.checkpoints():
            if info.pinned and info.generation not in referenced:
                store.unpin(info.generation)

    def _grow(self, store: Store, slots: int, payload: int) -> Store:
        self.wait(timeout=self.options.timeout)
        # The largest payload that needs no larger slot than there is now.
        payload = max(payload, store.got().slot_bytes - _SLOT_ALIGN_BYTES + 1)
        store.close()
        self._store = None
        try:
            left_out = grow_region(
                self.region, slots=slots, payload_bytes=payload, lock_timeout=self.options.lock_timeout
            )
        finally:
            self._store = self._opened()
        if left_out:
            warnings.warn(
                f"{self.region} was enlarged without {left_out} of its checkpoints, which the medium could not read "
                f"any more: their files below {self.folder} cannot be loaded",
                RuntimeWarning,
                stacklevel=2,
            )
        return self._store

    # The thread.

    def _enqueue(self, job: _Job) -> None:
        with self._changed:
            if self._thread is None:
                name = f"pccheck paths {self.folder.name}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return
                job = self._running = self._jobs.popleft()
            try:
                self._do(job)
            except BaseException as why:  # the thread outlives what fails; the caller is told
                job.failed(why)

    def _do(self, job: _Job) -> None:
        if self._stopping:
            raise errors.Cancelled(f"{self.folder} was closed before this was done", path=str(job.path))
        if job.save is None:
            if self._save_failed:
                # What was to replace it is not there.
                self._put_off[job.path] = job
            else:
                self._unlink(job.path)
            return
        try:
            self._finish(job)
        except BaseException:
            self._save_failed = True
            raise
        self._save_failed = False
        # The path was saved to again: it is no longer the one that was to be removed.
        self._put_off.pop(job.path, None)
        put_off, self._put_off = self._put_off, {}
        for removal in put_off.values():
            try:
                self._unlink(removal.path)
            except BaseException as why:
                removal.failed(why)

    def _finish(self, job: _Job) -> None:
        assert job.save is not None and job.reference is not None
        job.save.durable()
        job.save.close()
        replaced = self._generation_at(job.path)
        try:
            references.write(job.path, job.reference)
        except BaseException:
            with suppress(errors.PccheckError):
                self._unpin(job.reference.generation)
            raise
        if replaced is not None:
            self._unpin(replaced)

    def _unlink(self, path: Path) -> None:
        generation = self._generation_at(path)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        files.sync_folder(path.parent)
        if generation is not None:
            self._unpin(generation)

    def _generation_at(self, path: Path) -> int | None:
        """The generation of this region that the file itself (not what it links to) names."""
        if path.is_symlink() or not references.is_reference(path):
            return None
        try:
            reference = references.read(path)
        except (errors.Corrupt, errors.Unsupported):
            return None
        return reference.generation if reference.region_uuid == self._uuid else None

    def _unpin(self, generation: int) -> None:
        """Frees a checkpoint whose reference is gone, unless a copy of that reference is left.

        Where that cannot be told, the checkpoint is kept until slots are short: what was asked for is done.
        """
        store = self._store
        if store is None:
            # Closed before this was done.
            return
        try:
            referenced = references.references_below(self.folder, self._uuid)
        except _UNKNOWN as why:
            if not self._warned:
                self._warned = True
                text = f"checkpoints in {self.region} that are no longer needed keep their slots: {why}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return
        if generation not in referenced:
            with suppress(errors.NotFound, errors.InvalidState):
                store.unpin(generation)


def _at_exit() -> None:
    """Normal exit finishes what is in flight."""
    deadline = time.monotonic() + _EXIT_TIMEOUT
    with _registry_lock:
        folders = list(_open_folders.values())
    for folder in folders:
        with suppress(errors.PccheckError):
            folder._close(max(0.0, deadline - time.monotonic()))


atexit.register(_at_exit)
