"""State trees stored at paths, for frameworks whose interface is save(state, path), load(path) and remove(path).

>>> import tempfile, torch
>>> folder = tempfile.mkdtemp()
>>> with PathStore(folder) as store:
...     store.save({"weights": torch.ones(3), "epoch": 4}, f"{folder}/epoch-4.ckpt", step=40)
...     state = store.load(f"{folder}/epoch-4.ckpt")
>>> state["epoch"], state["weights"].sum().item()
(4, 3.0)

The data are in the region ``folder/.pccheck/region-<rank>.pccheck``; what stands at the path is a small reference file
(see :mod:`pccheck.torch.references`), which appears when the checkpoint is durable. A process that dies before that
leaves what was at the path before.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from .. import errors, trees
from ..checkpoint import Checkpoint
from ..store import Store
from . import references
from .folders import REFERENCE_KEY, FolderOptions, RegionFolder
from .references import Reference
from .restoring import TREE_KEY
from .states import MapLocation, host_tensors, read_state

__all__ = ["PathStore", "load_reference", "opened_reference"]

OnError = Literal["raise", "warn"]


def default_rank() -> int:
    """This process's rank in its group; 0 without one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


class PathStore:
    """Saves state trees at paths below a folder, at the cost of copying them. A context manager.

    Path stores of one folder in one process share its open region. Two processes cannot save to one folder under one
    rank; any number can load.

    Args:
        folder: below which all paths are; made where it lacks.
        rank: names the region; the default is that of ``torch.distributed``, else ``RANK``, else 0.
        on_error: what happens when a save fails because of the medium: ``"raise"`` raises at the call, or, for what
            fails after it has returned, at the next call of this object; ``"warn"`` warns at that time and goes on.
            A state that cannot be represented always raises.
        slots: of a new region: checkpoints that will be kept at once, and 3 more. More are added when they are needed,
            which copies the region; each takes the room of one state.
        max_in_flight: saves that may be unfinished before the next one waits.
        durability: ``"power"`` or ``"process"``, see :class:`pccheck.Store`; ``medium``, ``staging_bytes`` and
            ``lock_timeout`` likewise.
        timeout: seconds that a save waits for earlier ones at most; None waits for ever.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int | None = None,
        on_error: OnError = "raise",
        slots: int = 6,
        max_in_flight: int = 2,
        durability: str = "power",
        medium: str = "auto",
        staging_bytes: int | None = None,
        timeout: float | None = 600.0,
        lock_timeout: float | None = 10.0,
    ) -> None:
        if on_error not in ("raise", "warn"):
            raise errors.InvalidArgument(f"on_error={on_error!r}: expected 'raise' or 'warn'")
        self.folder = Path(os.path.realpath(folder))
        self.rank = default_rank() if rank is None else rank
        self.on_error = on_error
        #: saves and removals that failed, since this object was made
        self.failures = 0
        options = FolderOptions(slots, max_in_flight, durability, medium, staging_bytes, timeout, lock_timeout)
        self._options = options
        self._lock = threading.Lock()
        self._unreported: list[BaseException] = []
        self._region: RegionFolder | None = RegionFolder.acquire(self.folder, self.rank, options)

    def save(
        self,
        state: Any,
        path: str | os.PathLike[str],
        *,
        step: int = 0,
        wait: Literal["copied", "durable"] = "copied",
    ) -> None:
        """Saves ``state`` at ``path``, replacing what is there.

        Args:
            state: a tree of containers, numbers, texts and tensors, as :mod:`pccheck.trees` knows them.
            path: below the folder.
            step: the trainer's iteration number, kept with the checkpoint.
            wait: ``"copied"`` returns when the state may change again; the checkpoint becomes durable, and the file
                appears at ``path``, later (see :meth:`wait`). ``"durable"`` returns after that.

        Raises:
            UnsupportedValue: of something in the state, naming where it is. Nothing was saved.
            PccheckError: why this save or an earlier one failed, unless ``on_error="warn"``. What was at the path is
                still there.
        """
        region = self._open_region()
        at = self._path(path)
        flat = trees.flatten(state)
        tensors = host_tensors(flat.tensors)
        self._report()
        try:
            region.save(tensors, {TREE_KEY: flat.json}, at, step, self._failed)
            if wait == "durable":
                region.wait(at)
        except errors.InvalidArgument:
            # Of the state, not of the medium.
            raise
        except (errors.PccheckError, OSError) as why:
            self._failed(why)
        if wait == "durable" or self._unreported:
            self._report()

    def load(self, path: str | os.PathLike[str], map_location: MapLocation = None) -> Any:
        """The state that was saved at ``path``: every value as it was, every byte verified, tensors in new host memory.

        Tensors that shared memory when they were saved do again. A save to ``path`` that this process has in flight is
        waited for.

        Args:
            path: a reference file, or a link to one.
            map_location: where tensors go instead, as for ``torch.load``; each counts as saved on ``"cpu"``.

        Raises:
            NotFound: there is no file, or its checkpoint is gone.
            NotARegion: the file is something else.
            Corrupt: stored bytes, or the reference, are damaged.
        """
        region = self._open_region()
        region.wait(_lexical(Path(os.path.realpath(path))))
        region.wait(_lexical(path))
        reference = references.read(path)
        with region.entered():
            store = region.opened(reference.region_uuid)
            if store is not None:
                with _checked(store, path, reference) as checkpoint:
                    return read_state(checkpoint, map_location)
        return load_reference(path, map_location)

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Removes the file at ``path``, and frees its checkpoint, once every earlier save is durable.

        A removal that follows a failed save is put off until a save succeeds: what was to take its place is not there.

        Raises:
            NotFound: there is no file, and no save to the path is in flight.
            NotARegion: the file is no reference; it is left.
        """
        region = self._open_region()
        self._report()
        at = self._path(path)
        if not region.pending(at) and not at.is_symlink():
            references.read(at)
        try:
            region.remove(at, self._failed)
        except (errors.PccheckError, OSError) as why:
            self._failed(why)
            self._report()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all saves are durable and removals done.

        Raises:
            TimedOut: they go on.
            PccheckError: why one failed, unless ``on_error="warn"``.
        """
        self._open_region().wait(timeout=timeout)
        self._report()

    def close(self, timeout: float | None = None) -> None:
        """As :meth:`wait`; then the region is closed, unless another path store of this process uses it.

        Raises:
            TimedOut: the saves that were not durable in time are cancelled, and later removals with them.
            PccheckError: why a save failed, unless ``on_error="warn"``. The region is closed.
        """
        region, self._region = self._region, None
        if region is None:
            return
        try:
            region.release(timeout)
        finally:
            self._report()

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._region is None

    def __enter__(self) -> PathStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
            return
        # The block's own exception is the one to raise.
        with suppress(errors.PccheckError):
            self.close()

    def __repr__(self) -> str:
        return f"<pccheck.torch.paths.PathStore {str(self.folder)!r}{' closed' if self.closed else ''}>"

    def _open_region(self) -> RegionFolder:
        if self._region is None:
            raise errors.InvalidState(f"the path store of {self.folder} is closed")
        return self._region

    def _path(self, path: str | os.PathLike[str]) -> Path:
        at = _lexical(path)
        if self.folder not in at.parents or references.FOLDER in at.relative_to(self.folder).parts:
            raise errors.InvalidArgument(
                f"{path} is not below {self.folder}",
                path=str(path),
                advice="a reference must be below the folder that holds its region",
            )
        return at

    def _failed(self, why: BaseException) -> None:
        with self._lock:
            self.failures += 1
            self._unreported.append(why)

    def _report(self) -> None:
        with self._lock:
            unreported, self._unreported = self._unreported, []
        if not unreported:
            return
        if self.on_error == "raise":
            raise unreported[0]
        more = f" (and {len(unreported) - 1} more)" if len(unreported) > 1 else ""
        text = f"a checkpoint below {self.folder} was not saved or removed{more}: {unreported[0]}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _lexical(path: str | os.PathLike[str]) -> Path:
    """One name per file: links in the folders above are followed, a link at the path itself is a file of its own."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() follows the last link
    return Path(os.path.realpath(path.parent)) / path.name


def load_reference(path: str | os.PathLike[str], map_location: MapLocation = None) -> Any:
    """The state that the reference at ``path`` names; see :meth:`PathStore.load`. Works beside a live writer."""
    with opened_reference(path) as checkpoint:
        return read_state(checkpoint, map_location)


@contextmanager
def opened_reference(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """The open checkpoint that the reference at ``path`` names, as every process can read it."""
    reference = references.read(path)
    others = []
    for region in references.region_candidates(path, reference):
        with Store(region, read_only=True, durability="process") as store:
            uuid = store.got().region_uuid
            if uuid == reference.region_uuid:
                with _checked(store, path, reference) as checkpoint:
                    yield checkpoint
                return
            others.append(f"{region} is region {uuid}")
    found = "; ".join(others) or f"no folder above has {references.FOLDER}/{reference.region}"
    raise errors.NotFound(
        f"{path} refers to region {reference.region_uuid} ({reference.region}), which is not there: {found}",
        operation="load",
        path=str(path),
        advice=f"keep the reference below the folder whose {references.FOLDER} holds the region",
    )


def _checked(store: Store, path: str | os.PathLike[str], reference: Reference) -> Checkpoint:
    """The checkpoint that is meant, and no other of the same generation."""
    try:
        checkpoint = store.open(generation=reference.generation, verify=False)
    except errors.NotFound as why:
        raise errors.NotFound(
            f"{path} refers to generation {reference.generation} (step {reference.step}) of {store.path}, "
            f"which is not there any more: {why.message}",
            operation="load",
            path=str(path),
            advice=f"remove the reference; python -m pccheck list {store.path} shows what there is",
        ) from None
    note = checkpoint.metadata.get(REFERENCE_KEY, "")
    if f'"{reference.id}"' in note:
        return checkpoint
    checkpoint.close()
    raise errors.Corrupt(
        f"{path} refers to checkpoint {reference.id}; generation {reference.generation} of {store.path} is another",
        operation="load",
        path=str(path),
        advice="remove the reference: it does not belong to this region",
    )
