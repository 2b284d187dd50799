"""`torch.distributed.checkpoint.StorageReader` on regions."""

from __future__ import annotations

import dataclasses
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .. import errors
from ..store import Store
from ._document import Published, Stored, decode
from ._folder import document_bytes, incomplete, open_part, published
from ._read import read_items
from ._regions import metadata_name, read_only

__all__ = ["RegionReader"]

# How often the newest checkpoint is looked for again where a live writer was faster.
_ATTEMPTS = 5


class RegionReader(StorageReader):
    """Loads distributed checkpoints that :class:`RegionWriter` saved, on any number of ranks, for ``dcp.load``.

    It reads beside a live writer, takes no lock, and reads only the bytes that each rank needs; every byte is verified.
    Where a part of the newest published checkpoint is missing, the newest complete one is loaded, with a warning that
    says why (:attr:`rejected`). Damage that is found while tensors are being filled raises
    :class:`pccheck.errors.Corrupt`; then ``older_than`` gives the checkpoint before.

    Args:
        path: the folder. ``checkpoint_id`` of ``dcp.load`` takes its place.
        step: load the newest checkpoint of this trainer's step (``RegionWriter(step=...)``).
        older_than: load the newest checkpoint whose :attr:`sequence` is below this.
        verify: read and verify every byte of all ranks before anything is loaded, and fall back where it is damaged.
            Reads everything twice, on every rank.
        read_bytes: bytes that are read at once, and the most memory that reading takes beyond the tensors themselves.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Any = None,
        *,
        step: int | None = None,
        older_than: int | None = None,
        verify: bool = False,
        read_bytes: int = 256 << 20,
    ) -> None:
        super().__init__()
        if _extension_registry is not None:
            raise errors.Unsupported(
                "stream extensions transform FileSystemReader's files; regions hold plain tensors",
                advice="leave _extension_registry out",
            )
        if not isinstance(read_bytes, int) or read_bytes < 1:
            raise errors.InvalidArgument(f"read_bytes={read_bytes!r}: expected a number of bytes")
        self.path = Path(path)
        self.load_id = str(uuid.uuid4())
        #: counts the saves of the folder: which one is being loaded; None before ``read_metadata``
        self.sequence: int | None = None
        #: its trainer's step, where the writer was given one
        self.step: int | None = None
        #: why newer checkpoints were passed over
        self.rejected: list[str] = []
        self._wanted_step = step
        self._older_than = older_than
        self._verify = verify
        self._read_bytes = read_bytes
        self._chosen: Published | None = None
        self._alone = False
        self._storage: dict[MetadataIndex, Stored] = {}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for a folder that holds published checkpoints."""
        return "://" not in os.fspath(checkpoint_id) and Path(checkpoint_id, metadata_name(None)).exists()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load follows, from this folder if one is given."""
        self._storage, self._chosen = {}, None
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self.load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """All ranks: chooses the checkpoint. ``rank``: the one that this rank saved without collectives.

        Raises:
            NotFound: the folder holds no published checkpoint (that was asked for).
            Corrupt: it holds some, but none of them is complete.
        """
        rank: int | None = kwargs.get("rank")
        path = self.path / metadata_name(rank)
        if not path.exists():
            raise errors.NotFound(
                "there is no such region" if self.path.is_dir() else "there is no such folder",
                operation="load",
                path=str(path),
                advice="give the folder to which RegionWriter saved",
            )
        with read_only(path, small=True) as store:
            chosen = self._choose(store)
            text = document_bytes(store, chosen)
        metadata = decode(text, str(path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._chosen, self._alone = chosen, rank is not None
        self.sequence, self.step = chosen.sequence, chosen.step
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks."""
        if metadata.storage_data is None:
            raise errors.InvalidArgument("the metadata does not say where data is stored", operation="load")
        self._storage = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """All ranks: says which checkpoint this rank has chosen."""
        chosen = None if self._chosen is None or self._alone else self._chosen.save_id
        return dataclasses.replace(plan, storage_data=chosen)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The coordinator: refuses to load pieces of different checkpoints.

        Raises:
            InvalidState: a writer has published a checkpoint between one rank's look and another's.
        """
        if len({plan.storage_data for plan in plans}) > 1:
            raise errors.InvalidState(
                "the ranks found different newest checkpoints: one was published meanwhile",
                operation="load",
                path=str(self.path),
                advice="load again, or name the checkpoint with RegionReader(step=...)",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """All ranks: fills the tensors. On failure they hold unspecified bytes.

        Raises:
            Corrupt: stored bytes are damaged.
            Reclaimed: a live writer has overwritten the checkpoint meanwhile.
        """
        if self._chosen is None:
            raise errors.InvalidState("read_metadata comes first", operation="load", path=str(self.path))
        by_region: dict[str, list[tuple[ReadItem, Stored]]] = {}
        for item in plan.items:
            stored = self._storage[item.storage_index]
            by_region.setdefault(stored.part.region, []).append((item, stored))
        for region, items in by_region.items():
            try:
                with read_only(self.path / region) as store, open_part(store, self._chosen, region) as part:
                    read_items(part, items, planner, self._read_bytes)
            except errors.Corrupt as why:
                # A planner's own errors, which concern no byte of a region, know better.
                if why.offset is not None or not why.advice:
                    older = f"RegionReader(older_than={self.sequence}) loads the checkpoint before, where one is kept"
                    why.advice = older
                raise
            except (errors.Reclaimed, errors.NotFound) as why:
                why.advice = "load again: a writer goes on in this folder; a larger keep leaves more time"
                raise
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _choose(self, store: Store) -> Published:
        for attempt in range(_ATTEMPTS):
            found, self.rejected = published(store)
            for candidate in found:
                if self._wanted_step is not None and candidate.step != self._wanted_step:
                    continue
                if self._older_than is not None and candidate.sequence >= self._older_than:
                    continue
                why = incomplete(self.path, candidate, verify=self._verify)
                if why is None:
                    if self.rejected:
                        warnings.warn(
                            f"{self.path}: loading save {candidate.sequence}: {'; '.join(self.rejected)}",
                            stacklevel=2,
                        )
                    return candidate
                self.rejected.append(why)
            newest = store.checkpoints()
            if not newest or (found and newest[0].generation == found[0].generation) or attempt == _ATTEMPTS - 1:
                break
        raise self._none_found(store, found)

    def _none_found(self, store: Store, found: list[Published]) -> errors.PccheckError:
        if self.rejected:
            return errors.Corrupt(
                f"no published checkpoint is complete: {'; '.join(self.rejected)}",
                operation="load",
                path=str(self.path),
                advice="put the missing files back",
            )
        have = ", ".join(f"save {p.sequence}" + ("" if p.step is None else f" of step {p.step}") for p in found)
        return errors.NotFound(
            f"expected a published checkpoint{self._wanted()}, found {have or 'none'}",
            operation="load",
            path=store.path,
        )

    def _wanted(self) -> str:
        step = "" if self._wanted_step is None else f" of step {self._wanted_step}"
        return step + ("" if self._older_than is None else f" older than save {self._older_than}")
