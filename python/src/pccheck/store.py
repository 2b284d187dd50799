"""An open region: the Pythonic face of the C ABI's store."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import arrays, errors, streams
from ._abi import (
    Handle,
    check,
    deadline_ms,
    ffi,
    lib,
    new_struct,
    options,
    path_bytes,
    string,
    text_of,
    wait,
    whole,
)
from .checkpoint import Checkpoint, CheckpointInfo
from .region import MEDIA, number_of
from .save import RawSave, Save

__all__ = ["Got", "Stats", "Store", "Verified"]

_DURABILITIES = {"process": 1, "power": 2}
_BACKENDS = {"auto": 0, "uring": 1, "threads": 2}
_SNAPSHOTS = {"staging": 0, "auto": 1, "spare": 2}
_DIRECT = {"off": 0, "auto": 1, "required": 2}

# Longest wait for the saves in flight when a `with` block ends by an exception.
_DRAIN_AFTER_ERROR_S = 60.0
# How often it is looked whether a raw save may begin.
_LOOK_S = 0.005


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since open, and gauges of this moment. Times are in nanoseconds."""

    saves_begun: int
    saves_durable: int
    saves_superseded: int
    saves_failed: int
    saves_cancelled: int
    durable_bytes: int
    #: those of durable_bytes that were in their places already, and were not written
    unchanged_bytes: int
    #: those of durable_bytes that cuFile wrote from the memory of a GPU, past host memory
    direct_bytes: int
    #: in which at least one save was in flight: durable_bytes over this is the bandwidth got
    busy_ns: int
    #: sums over durable saves, from begin
    copied_ns: int
    durable_ns: int
    #: 0: none
    newest_generation: int
    in_flight: int
    quarantined_slots: int
    claimable_slots: int


@dataclass(frozen=True, slots=True)
class Got:
    """What was got at open, as opposed to what was asked for."""

    medium: str
    durability: str
    #: how bytes are moved, such as "io_uring, registered buffers"
    path_text: str
    #: what was refused and what is used instead, one per line
    notes: str
    region_uuid: str
    slot_count: int
    slot_bytes: int
    staging_bytes: int
    staging_huge_bytes: int
    staging_locked: bool
    chunk_bytes: int
    recovered_checkpoints: int
    max_in_flight: int
    keep: int
    read_only: bool
    #: files or devices over which the region is striped; 1 where it is not
    members: int
    #: bytes that lie together on one member; 0 where it is not striped
    stripe_unit_bytes: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification found: counts of checkpoints, and one line of text on each."""

    intact: int
    damaged: int
    #: overwritten while they were read: not damaged
    reclaimed: int
    text: str


class Store:
    """An open region and its threads. All methods may be called from any thread.

    Leaving a ``with`` block waits for the saves in flight. Where one then waits for :meth:`Save.confirm` alone, it is
    cancelled and InvalidState says so. After an exception the wait is 60 seconds at most, unconfirmed saves are
    cancelled, and the exception goes on.

    Args:
        path: a region made by :func:`pccheck.format_region`.
        read_only: open beside a live writer: no lock, no saves, no pins.
        medium: "auto", "dax", "mmap" or "direct".
        backend: of the direct medium: "auto", "uring" or "threads".
        durability: the weakest that is acceptable: "power" (survives power loss) or "process" (tmpfs is enough).
        max_in_flight: N, saves that may be in flight at once.
        keep: K, newest checkpoints that are kept; N + K may not exceed the region's slots.
        hold: keep every checkpoint until :meth:`mark_global` names a newer step (for groups of ranks).
        writers, readers: threads that copy and hash on save, and verify on restore.
        queue_depth: operations in flight on the direct medium.
        rewrite_every: a save does not write chunks that its slot durably holds already, as their hashes tell; but of so
            many saves into a slot one writes everything, so that damage is not kept for ever (default 16; 1: all do).
        lock_memory: lock the staging pool in memory where the limit allows it.
        run_id: names this training run, the same on all its ranks.
        staging_bytes: of the staging pool, which bounds the memory taken (default 256 MiB, at least N + 1 chunks).
        chunk_bytes: unit of copying, hashing and writing (default 1 MiB).
        lock_timeout: seconds to wait while another writer holds the region; None waits for ever.

    Raises:
        InUse: another writer holds the region; its text names it.
        NotFound, NotARegion, Unsupported, DurabilityError, InvalidArgument, OutOfMemory, IoFailed, Corrupt
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        medium: str = "auto",
        backend: str = "auto",
        durability: str = "power",
        max_in_flight: int = 2,
        keep: int = 1,
        hold: bool = False,
        writers: int | None = None,
        readers: int | None = None,
        queue_depth: int | None = None,
        rewrite_every: int | None = None,
        lock_memory: bool = False,
        run_id: int = 0,
        staging_bytes: int | None = None,
        chunk_bytes: int | None = None,
        lock_timeout: float | None = 10.0,
    ) -> None:
        chosen = options(
            "pcc_open_options",
            read_only=int(read_only),
            medium=number_of("medium", medium, MEDIA),
            backend=number_of("backend", backend, _BACKENDS),
            required_durability=number_of("durability", durability, _DURABILITIES),
            max_in_flight=max_in_flight,
            keep=keep,
            hold=int(hold),
            writers=writers,
            readers=readers,
            queue_depth=queue_depth,
            rewrite_every=rewrite_every,
            lock_memory=int(lock_memory),
            run_id=whole("run_id", run_id),
            staging_bytes=staging_bytes,
            chunk_bytes=chunk_bytes,
        )
        #: path of the region as it was given
        self.path: str = os.fsdecode(path)
        self._run_id = chosen.run_id
        self._packer = arrays.Packer()
        self._unconfirmed: weakref.WeakValueDictionary[int, Save] = weakref.WeakValueDictionary()
        name, self._handle = path_bytes(path), Handle("pcc_store", lib.pcc_close)

        def attempt(milliseconds: int) -> int:
            chosen.lock_wait_ms = milliseconds
            return int(lib.pcc_open(name, chosen, self._handle.out))

        wait(attempt, lock_timeout, again=lib.PCC_IN_USE)

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._handle.closed

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
        *,
        timeout: float | None = 60.0,
        confirm: bool = False,
        pin: bool = False,
        stream: Any = None,
        snapshot: str = "staging",
        direct_storage: str = "off",
        flag_waits: bool = False,
        gpu_timeout: float | None = None,
    ) -> Save:
        """Begins a save and returns while it goes on; what is saved is the arrays' memory as it is now.

        The arrays must not change before :meth:`Save.copied` has returned. They are not copied by Python, and those
        with the same memory, dtype and shape are stored once and restored under all their names.

        Tensors on GPUs are saved as they are when ``stream`` has done what was enqueued on it before; the call does not
        wait for that. They may be updated after :meth:`Save.stream_wait_copied`, on the stream that waits.

        Args:
            step: the trainer's iteration number; need not be unique.
            tensors: name -> torch, numpy, JAX, or any array of the kinds that :mod:`pccheck.arrays` lists.
            metadata: texts, kept beside the tensors. Keys must not begin with "pccheck.".
            timeout: seconds to wait for a slot while N saves are in flight; None waits for ever.
            confirm: become durable only after :meth:`Save.confirm`.
            pin: keep the checkpoint, from its commit on, until :meth:`unpin`.
            stream: a ``torch.cuda.Stream`` or the number of a CUDA stream; None: torch's current streams.
            snapshot: where tensors on GPUs go first: "staging" (the staging pool), "spare" (spare memory of the GPU, at
                the speed of that memory: copied at once) or "auto" (spare where there is room for it).
            direct_storage: with "auto", chunks of a state on one GPU go from its spare memory (so ``snapshot`` must be
                "spare" or "auto") to the file by GPUDirect Storage, past host memory, where cuFile is there and really
                does that, and the region is one file on the direct medium; :attr:`Stats.direct_bytes` tells.
                "required": the save fails and says why where that is not so, and cuFile is used also where it goes
                through host memory itself.
            flag_waits: where the staging pool is smaller than the state, copies wait on the GPU, by flags in memory,
                for buffers to be written, so that all are enqueued at once and :meth:`Save.stream_wait_copied` waits
                for no writing, but the stream. What waits for all that runs on the GPU (``torch.cuda.synchronize``,
                freeing its memory) waits for storage meanwhile, too. After ``gpu_timeout`` the save fails, and nothing
                waits for storage any more. Ignored with a driver before CUDA 11.7, under
                ``CUDA_DEVICE_MAX_CONNECTIONS=1``, where too few buffers become free (or there are fewer than four, or
                they cannot be page-locked), where more than 16 MiB in host memory stand between tensors of GPUs, and
                once chunks of the store have gone past host memory.
            gpu_timeout: seconds after which a save that a GPU has not finished copying fails (default 600).

        Raises:
            NoSlot: N saves are still in flight, or a pin would leave fewer than N slots to save into.
            TooLarge: a slot is too small for the state: grow the region.
            InvalidArgument, Unsupported: of an array; nothing was saved.
            InvalidState: the stream captures a graph.
        """
        packed, pairs = self._packer.pack(tensors), arrays.pack_pairs(metadata)
        chosen, step, save = _save_options(confirm, pin), whole("step", step), Save.handle(packed.owners)
        chosen.snapshot = number_of("snapshot", snapshot, _SNAPSHOTS)
        chosen.direct_storage = number_of("direct_storage", direct_storage, _DIRECT)
        chosen.flag_waits = int(bool(flag_waits))
        if gpu_timeout is not None:
            chosen.device_timeout_ms = max(1, deadline_ms(gpu_timeout))
        if packed.gpus:
            chosen.stream = ffi.cast("void *", streams.joined(packed.gpus, stream))

        def attempt(store: Any, milliseconds: int) -> int:
            chosen.wait_ms = milliseconds
            named = (packed.array, packed.count, pairs.array, pairs.count)
            return int(lib.pcc_save_begin(store, step, *named, chosen, save.out))

        self._handle.wait(attempt, timeout, again=lib.PCC_NO_SLOT)
        begun = Save(save, self._handle, self.path, confirm, packed.gpus)
        if confirm:
            self._unconfirmed[begun.generation] = begun
        return begun

    def raw_save(
        self,
        step: int,
        data_bytes: int,
        metadata: Mapping[str, str] | None = None,
        *,
        timeout: float | None = 60.0,
        pin: bool = False,
    ) -> RawSave:
        """Begins a save of exactly ``data_bytes`` bytes that the caller writes piece by piece; see :class:`RawSave`.

        ``timeout`` also bounds each wait for room in the staging pool.

        Raises:
            NoSlot, TooLarge, InvalidArgument: as :meth:`save`.
        """
        data_bytes, step, pairs = whole("data_bytes", data_bytes), whole("step", step), arrays.pack_pairs(metadata)
        chosen, raw = _save_options(False, pin), RawSave.handle()
        chosen.wait_ms = deadline_ms(timeout)
        begun, in_flight_at_most = time.monotonic(), self.got().max_in_flight
        # The library's own wait cannot be cut into slices, since it bounds those of the writes, too: Ctrl-C works here.
        while self.stats().in_flight >= in_flight_at_most and not _over(begun, timeout):
            time.sleep(_LOOK_S)
        with self._handle.use() as store:
            check(lib.pcc_raw_begin(store, step, data_bytes, pairs.array, pairs.count, chosen, raw.out))
        return RawSave(raw, self._handle, self.path)

    def checkpoints(self) -> list[CheckpointInfo]:
        """The durable checkpoints, newest first."""
        count = ffi.new("uint64_t *")
        with self._handle.use() as store:
            capacity = 0
            while True:
                infos = ffi.new("pcc_checkpoint_info[]", max(1, capacity))
                for info in infos:
                    info.struct_bytes = ffi.sizeof("pcc_checkpoint_info")
                check(lib.pcc_list(store, infos, ffi.sizeof("pcc_checkpoint_info"), capacity, count))
                if count[0] <= capacity:
                    return [CheckpointInfo.of(infos[i]) for i in range(count[0])]
                capacity = int(count[0])

    def open(
        self,
        *,
        generation: int | None = None,
        step: int | None = None,
        older_than: int | None = None,
        verify: bool = True,
    ) -> Checkpoint:
        """Opens the newest checkpoint, or the one that an argument selects.

        Args:
            generation: exactly this one.
            step: the newest of this step.
            older_than: the newest with a generation below this.
            verify: read and verify all of it now, and fall back to an older one where it is damaged; else each chunk
                is verified when it is read.

        Raises:
            NotFound: there is no such checkpoint.
            Corrupt: every candidate is damaged.
        """
        chosen, checkpoint = _select(generation, step, older_than, verify), Checkpoint.handle()
        with self._handle.use() as store:
            check(lib.pcc_checkpoint_open(store, chosen, checkpoint.out))
        return Checkpoint(checkpoint, self.path)

    def restore(
        self,
        tensors: Mapping[str, Any],
        *,
        generation: int | None = None,
        step: int | None = None,
        older_than: int | None = None,
    ) -> Checkpoint:
        """Fills writable arrays from the newest checkpoint, or the one that an argument selects, in one verified pass.

        Names, dtypes and shapes must be those of the checkpoint, which may hold more. Where a payload is damaged, the
        next candidate is read instead. Returns the checkpoint that was restored, for its step and metadata: close it.
        Tensors on GPUs are written to when torch's current streams are done with them.

        Raises:
            NotFound, InvalidArgument: nothing was written. After other errors the arrays hold unspecified bytes.
        """
        chosen, checkpoint = _select(generation, step, older_than, True), Checkpoint.handle()
        packed = arrays.pack_tensors(arrays.memories_of(tensors, write=True))
        streams.synchronize(packed.gpus)
        with self._handle.use() as store:
            check(lib.pcc_restore(store, chosen, packed.array, packed.count, checkpoint.out))
        return Checkpoint(checkpoint, self.path)

    def pin(self, generation: int) -> None:
        """Keeps a checkpoint until it is unpinned, also across restarts. Durable on return.

        Raises:
            NoSlot: fewer than N slots would be left to save into.
            NotFound: there is no such checkpoint.
        """
        with self._handle.use() as store:
            check(lib.pcc_pin(store, whole("generation", generation)))

    def unpin(self, generation: int) -> None:
        """Lets a checkpoint be reclaimed once it is not among the newest K. Durable on return."""
        with self._handle.use() as store:
            check(lib.pcc_unpin(store, whole("generation", generation)))

    def mark_global(self, step: int) -> int:
        """Says that ``step`` of this run is durable on all ranks, so that older ones may go. Returns its generation."""
        generation = ffi.new("uint64_t *")
        with self._handle.use() as store:
            check(lib.pcc_mark_global(store, self._run_id, whole("step", step), generation))
        return int(generation[0])

    def abandon(self, step: int, timeout: float | None = None) -> int:
        """Gives up ``step``, which some rank skipped, lost or failed. Returns how many checkpoints went."""
        discarded, step = ffi.new("uint32_t *"), whole("step", step)
        self._handle.wait(
            lambda store, ms: int(lib.pcc_abandon(store, self._run_id, step, ms, discarded)),
            timeout,
        )
        return int(discarded[0])

    def discard_newer(self, generation: int) -> int:
        """Discards every checkpoint newer than ``generation`` (0: all). Returns how many went; durable on return."""
        discarded = ffi.new("uint32_t *")
        with self._handle.use() as store:
            check(lib.pcc_discard_newer(store, whole("generation", generation), discarded))
        return int(discarded[0])

    def verify(self, generation: int = 0) -> Verified:
        """Reads and verifies every byte of one checkpoint, or of all (0). Damage is in the result, not raised."""
        report = new_struct("pcc_verify_report")
        with self._handle.use() as store:
            # The text's size is known only afterwards; a line takes well below this.
            text = ffi.new("char[]", 240 * 4096)
            status = lib.pcc_verify(store, whole("generation", generation), report, text, ffi.sizeof(text))
            if status != lib.PCC_CORRUPT:
                check(status)
            found = bytes(ffi.string(text)).decode("utf-8", "replace")
        return Verified(report.intact, report.damaged, report.reclaimed, found)

    def repair(self, timeout: float | None = None) -> int:
        """Rewrites quarantined slots in full and takes them back into use. Returns how many."""
        repaired = ffi.new("uint32_t *")
        with self._handle.use() as store:
            check(lib.pcc_repair(store, deadline_ms(timeout), repaired))
        return int(repaired[0])

    def drain(self, timeout: float | None = None) -> None:
        """Waits until no save is in flight; says nothing of how they ended. Raises TimedOut.

        Saves that wait for :meth:`Save.confirm` are in flight.

        Raises:
            InvalidState: without a timeout, only such saves are left: nobody could end this wait but another thread.
        """
        self._handle.wait(
            lambda store, ms: int(lib.pcc_drain(store, ms)),
            timeout,
            between=self._check_confirmed if timeout is None else None,
        )

    def _check_confirmed(self) -> None:
        waiting = [save.generation for save in self._unconfirmed_saves() if save.awaits_confirmation()]
        if waiting and len(waiting) == self.stats().in_flight:
            raise errors.InvalidState(
                f"drain: generation {', '.join(map(str, waiting))} waits for Save.confirm(); confirm or cancel it, or "
                "drain with a timeout",
                operation="drain",
                path=self.path,
            )

    def _unconfirmed_saves(self) -> list[Save]:
        found = [reference() for reference in self._unconfirmed.valuerefs()]
        return [save for save in found if save is not None]

    def stats(self) -> Stats:
        """Counters since open, and gauges of this moment."""
        found = new_struct("pcc_stats_info")
        with self._handle.use() as store:
            check(lib.pcc_stats(store, found))
        return Stats(**{field: getattr(found, field) for field in Stats.__dataclass_fields__})

    def got(self) -> Got:
        """What was got at open: medium, durability, memory, slots."""
        found = new_struct("pcc_got_info")
        with self._handle.use() as store:
            check(lib.pcc_got(store, found))
            return Got(
                medium={number: name for name, number in MEDIA.items()}.get(found.medium, str(found.medium)),
                durability="power" if found.durability == lib.PCC_DURABILITY_POWER else "process",
                path_text=string(found.path_text),
                notes=string(found.notes_text),
                region_uuid=bytes(found.region_uuid).hex(),
                slot_count=found.slot_count,
                slot_bytes=found.slot_bytes,
                staging_bytes=found.staging_bytes,
                staging_huge_bytes=found.staging_huge_bytes,
                staging_locked=bool(found.staging_locked),
                chunk_bytes=found.chunk_bytes,
                recovered_checkpoints=found.recovered_checkpoints,
                max_in_flight=found.max_in_flight,
                keep=found.keep,
                read_only=bool(found.read_only),
                members=found.members,
                stripe_unit_bytes=found.stripe_unit_bytes,
            )

    def recovery(self) -> str:
        """What recovery found at open, for people: every slot, and why it was or was not taken."""
        with self._handle.use() as store:
            return text_of(lambda buffer, size: int(lib.pcc_recovery_text(store, buffer, size)))

    def close(self) -> None:
        """Cancels saves in flight (see :meth:`drain`), waits for their I/O and releases the region. Commits nothing."""
        self._handle.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._handle.inherited or self.closed:
            return self.close()
        try:
            if kind is None:
                self.drain()
            else:
                # What was begun is wanted all the same, but must not hide the exception.
                with suppress(errors.PccheckError):
                    for save in self._unconfirmed_saves():
                        save.cancel_unconfirmed()
                    self.drain(_DRAIN_AFTER_ERROR_S)
        finally:
            self.close()

    def __repr__(self) -> str:
        return f"<pccheck.Store {self.path!r}{' closed' if self.closed else ''}>"


def _save_options(confirm: bool, pin: bool) -> Any:
    return options("pcc_save_options", confirm=int(confirm), pin=int(pin))


def _over(begun: float, timeout: float | None) -> bool:
    return timeout is not None and time.monotonic() - begun >= timeout


def _select(generation: int | None, step: int | None, older_than: int | None, verify: bool) -> Any:
    given = [
        (select, value)
        for select, value in (
            (lib.PCC_SELECT_GENERATION, generation),
            (lib.PCC_SELECT_STEP, step),
            (lib.PCC_SELECT_OLDER_THAN, older_than),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise errors.InvalidArgument("expected at most one of generation, step and older_than")
    select, value = given[0] if given else (lib.PCC_SELECT_NEWEST, 0)
    return options("pcc_select_options", select=select, value=whole("value", value), verify=int(verify))
