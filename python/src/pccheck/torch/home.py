"""The region of one trainer: made when there is none, sized from the state, grown when the state grows."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..region import create_region, grow_region, payload_bytes
from ..save import Save
from ..store import Store

__all__ = ["Home", "HomeOptions"]

# Room for metadata and headers beyond the tensors' own bytes, so that small changes need no growing.
_SLACK_BYTES = 1 << 20
_SLACK_SHARE = 50
_DEFAULT_CHUNK_BYTES = 1 << 20
_MAX_STAGING_BYTES = 256 << 20
# For looking at a region without reading it: the default pool would cost more than the look.
_LOOK_BYTES = 4 << 20
# The format's own limit.
_MAX_SLOTS = 240


@dataclass(frozen=True)
class HomeOptions:
    """How the region is opened; see :class:`pccheck.Store`."""

    max_in_flight: int = 2
    keep: int = 1
    #: slots for pinned checkpoints when the region is made
    pinned: int = 0
    durability: str = "power"
    medium: str = "auto"
    staging_bytes: int | None = None
    chunk_bytes: int | None = None
    writers: int | None = None
    lock_timeout: float | None = 10.0
    drain_timeout: float | None = 600.0
    snapshot: str = "staging"
    direct_storage: str = "off"
    flag_waits: bool = False
    #: seconds after which a save that a GPU has not finished copying fails; None: the engine's default
    gpu_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.snapshot not in ("staging", "spare", "auto"):
            raise errors.InvalidArgument(f"snapshot={self.snapshot!r}: expected 'staging', 'spare' or 'auto'")
        if self.direct_storage not in ("off", "auto", "required"):
            raise errors.InvalidArgument(
                f"direct_storage={self.direct_storage!r}: expected 'off', 'auto' or 'required'"
            )
        for name, number in (("max_in_flight", self.max_in_flight), ("keep", self.keep)):
            if not isinstance(number, int) or number < 1:
                raise errors.InvalidArgument(f"{name}={number!r}: expected a number of checkpoints, 1 or more")
        if self.durability not in ("power", "process"):
            raise errors.InvalidArgument(f"durability={self.durability!r}: expected 'power' or 'process'")
        if self.slots > _MAX_SLOTS:
            raise errors.InvalidArgument(
                f"max_in_flight={self.max_in_flight}, keep={self.keep} and {self.pinned} to pin: a region has "
                f"{_MAX_SLOTS} slots at most"
            )

    @property
    def slots(self) -> int:
        """Slots that a new region gets: N in flight, K kept, and the pinned ones."""
        return self.max_in_flight + self.keep + self.pinned

    def slots_beside(self, pinned: int) -> int:
        """Slots that a region with so many pinned checkpoints needs at least."""
        return self.max_in_flight + self.keep + pinned


class Home:
    """Owns the region file and its store."""

    def __init__(self, path: str | os.PathLike[str], state_bytes: int, options: HomeOptions) -> None:
        """Opens the region, or makes one whose slots hold ``state_bytes``.

        Raises:
            NoSpace: there is no room for all slots; nothing was left behind.
            InUse, NotARegion, DurabilityError, ...: as :class:`pccheck.Store` and :func:`pccheck.format_region`.
        """
        self.path = os.fspath(path)
        self._options = options
        self._state_bytes = state_bytes
        self._slot_count = 0
        #: pinned saves that may still be in flight
        self._pinning: list[Save] = []
        self._store: Store | None = None
        self._make_or_widen()
        self._store = self._open()

    def _make_or_widen(self) -> None:
        options = self._options
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as why:
            folder = Path(self.path).parent
            raise errors.IoFailed(
                f"make the folder {folder}: {why.strerror}",
                operation="make folder",
                path=str(folder),
                errno=why.errno or 0,
            ) from None
        if not Path(self.path).exists() or (Path(self.path).is_file() and not Path(self.path).stat().st_size):
            # Another trainer may make it meanwhile: opening then says whose it is.
            with contextlib.suppress(errors.AlreadyExists):
                create_region(
                    self.path, slots=options.slots, payload_bytes=_roomy(self._state_bytes), medium=options.medium
                )
        chunk = _LOOK_BYTES // 4
        look = Store(self.path, read_only=True, durability="process", staging_bytes=_LOOK_BYTES, chunk_bytes=chunk)
        with look as found:
            slots, payload = found.got().slot_count, found.got().slot_bytes
            pinned = sum(info.pinned for info in found.checkpoints())
        needed = max(options.slots, options.slots_beside(pinned))
        if slots < needed:
            grow_region(self.path, slots=needed, payload_bytes=payload, lock_timeout=options.lock_timeout)

    @property
    def store(self) -> Store:
        """The open store.

        Raises:
            InvalidState: it is closed, or could not be opened again after it was grown; the next save tries.
        """
        if self._store is None:
            raise errors.InvalidState(f"{self.path}: the region is closed")
        return self._store

    def _open(self) -> Store:
        options = self._options
        chunk = options.chunk_bytes or _DEFAULT_CHUNK_BYTES
        staging = options.staging_bytes
        if staging is None:
            # A pool larger than the state would never be filled.
            most = max(_MAX_STAGING_BYTES, (options.max_in_flight + 2) * chunk)
            least = (options.max_in_flight + 2) * chunk
            staging = min(most, max(least, -(-self._state_bytes // chunk) * chunk + chunk))
        store = Store(
            self.path,
            max_in_flight=options.max_in_flight,
            keep=options.keep,
            durability=options.durability,
            medium=options.medium,
            staging_bytes=staging,
            chunk_bytes=options.chunk_bytes,
            writers=options.writers,
            lock_timeout=options.lock_timeout,
        )
        self._slot_count = store.got().slot_count
        return store

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, str],
        *,
        pin: bool,
        confirm: bool,
        timeout: float | None,
    ) -> Save:
        """Begins a save; grows the region first where the state or its pins do not fit.

        Where there is no room for one more pinned checkpoint the save is not pinned, with a warning.
        """
        if self._store is None:
            # It could not be opened after it was grown; what kept it from that may have passed.
            self._store = self._open()
        if pin:
            pin = self._room_for_pin(step)
        try:
            save = self._save(step, tensors, metadata, pin, confirm, timeout)
        except errors.TooLarge:
            self._grow(self._slot_count, payload_bytes(tensors, metadata))
            save = self._save(step, tensors, metadata, pin, confirm, timeout)
        except errors.NoSlot as why:
            if not pin:
                raise
            _warn_unpinned(step, why)
            pin = False
            save = self._save(step, tensors, metadata, pin, confirm, timeout)
        if pin:
            self._pinning.append(save)
        return save

    def _room_for_pin(self, step: int) -> bool:
        """Whether N + K slots are left beside one more pinned checkpoint, if need be after growing."""
        # In this order: a save that ends meanwhile counts twice rather than not at all.
        self._pinning = [save for save in self._pinning if not save.done()]
        held = self.store.checkpoints()
        # What is open to be read, or out of use after a failed flush, takes room too.
        others = sum(info.readers > 0 and not info.pinned for info in held) + self.store.stats().quarantined_slots
        pinned = len(self._pinning) + sum(info.pinned for info in held) + 1
        needed = self._options.slots_beside(pinned) + others
        if needed <= self._slot_count:
            return True
        try:
            if needed > _MAX_SLOTS:
                raise errors.NoSlot(
                    f"{pinned - 1} checkpoints are pinned, and a region has {_MAX_SLOTS} slots at most",
                    path=self.path,
                    advice="unpin some, or give a larger keep_every",
                )
            # Some more at once, as each growing copies what is kept.
            self._grow(min(needed + pinned // 2, _MAX_SLOTS), 0)
        except (errors.NoSlot, errors.NoSpace, errors.InUse) as why:
            _warn_unpinned(step, why)
            return False
        return True

    def _save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, str],
        pin: bool,
        confirm: bool,
        timeout: float | None,
    ) -> Save:
        return self.store.save(
            step,
            tensors,
            metadata,
            timeout=timeout,
            pin=pin,
            confirm=confirm,
            snapshot=self._options.snapshot,
            direct_storage=self._options.direct_storage,
            flag_waits=self._options.flag_waits,
            gpu_timeout=self._options.gpu_timeout,
        )

    def _grow(self, slots: int, state_bytes: int) -> None:
        """Replaces the region by a larger one that holds the same checkpoints.

        Raises:
            NoSpace, Unsupported (a device), InUse (a checkpoint is open), TimedOut (saves are in flight): the region
                is open as it was.
        """
        store = self.store
        read = [info.step for info in store.checkpoints() if info.readers]
        if read:
            # An open checkpoint keeps the region's lock, so that it could be neither replaced nor opened again.
            raise errors.InUse(
                f"the region has to grow, and its checkpoint of step {read[0]} is open to be read",
                operation="grow",
                path=self.path,
                advice="close it",
            )
        # What is in flight is wanted; saves that cannot end in time would be cancelled by closing.
        store.drain(self._options.drain_timeout)
        held = store.got().slot_bytes
        store.close()
        self._store = None
        self._state_bytes = max(self._state_bytes, state_bytes)
        try:
            left_out = grow_region(
                self.path,
                slots=slots,
                payload_bytes=max(held, _roomy(state_bytes)) if state_bytes else held,
                lock_timeout=self._options.lock_timeout,
            )
            if left_out:
                warnings.warn(
                    f"{self.path}: {left_out} checkpoints could not be read and are not in the grown region",
                    stacklevel=2,
                )
        finally:
            self._store = self._open()

    @property
    def closed(self) -> bool:
        """True while no store is open."""
        return self._store is None

    def close(self) -> None:
        """Closes the store, if it is open."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _warn_unpinned(step: int, why: errors.PccheckError) -> None:
    warnings.warn(
        f"the checkpoint of step {step} is not kept for good, as there is no room for it: {why}", stacklevel=3
    )


def _roomy(state_bytes: int) -> int:
    return state_bytes + state_bytes // _SLACK_SHARE + _SLACK_BYTES
