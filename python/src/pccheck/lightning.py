"""Lightning: checkpoints of the Trainer in a region, without waiting for the medium.

>>> from lightning.pytorch import Trainer
>>> trainer = Trainer(plugins=[RegionCheckpointIO()], logger=False)   # doctest: +SKIP

``ModelCheckpoint`` (``save_top_k``, ``save_last``), ``trainer.save_checkpoint`` and ``ckpt_path=`` work as ever; what
stands at their paths are small reference files, see :mod:`pccheck.torch.paths`. ``python -m pccheck convert a.ckpt
b.ckpt`` makes an ordinary checkpoint of one, for ``load_from_checkpoint`` and for other machines.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

try:
    from lightning.fabric.plugins import TorchCheckpointIO
except ImportError:
    from lightning_fabric.plugins import TorchCheckpointIO  # type: ignore[assignment]

from . import errors
from .torch import references
from .torch.paths import OnError, PathStore, load_reference

__all__ = ["RegionCheckpointIO"]


class RegionCheckpointIO(TorchCheckpointIO):
    """A ``CheckpointIO`` plugin that keeps the data of all checkpoints of a folder in one region.

    Saving returns when the state is copied; the file appears at the path when the checkpoint is durable, and what
    ``ModelCheckpoint`` removes goes after that. The end of ``fit`` waits for all of it. As with Lightning's
    ``AsyncCheckpointIO``, a file that is still being saved is not seen by ``ModelCheckpoint``, which numbers files of
    equal names apart: let names contain ``{step}``, or use ``wait="durable"``.

    Args:
        wait: ``"copied"``, or ``"durable"`` to return only when the checkpoint is at its path.
        on_error: ``"raise"`` lets training fail at the save after one that failed; ``"warn"`` lets it go on.
        options: of :class:`pccheck.torch.paths.PathStore`.
    """

    def __init__(
        self, *, wait: Literal["copied", "durable"] = "copied", on_error: OnError = "raise", **options: Any
    ) -> None:
        super().__init__()
        self._wait = wait
        self._options = {"on_error": on_error, **options}
        self._stores: dict[Path, PathStore] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Saves ``checkpoint``; see the class for what is true on return.

        Raises:
            UnsupportedValue: of hyperparameters or callback state that cannot be represented, naming where it is.
        """
        if storage_options is not None:
            raise errors.InvalidArgument(
                f"storage_options={storage_options!r}: a region has none", advice="pass options to RegionCheckpointIO()"
            )
        step = checkpoint.get("global_step", 0)
        self._store_of(path).save(checkpoint, path, step=step if isinstance(step, int) else 0, wait=self._wait)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at ``path``, verified, tensors in host memory. Ordinary ``.ckpt`` files are read as ever.

        Of a file that is no reference, only tensors and plain values are loaded unless ``weights_only=False``; a
        checkpoint in a region never holds anything else.
        """
        for store in self._stores.values():
            store.wait()
        if not references.is_reference(path) and Path(path).exists():
            trusted = True if weights_only is None else weights_only
            ordinary: dict[str, Any] = super().load_checkpoint(Path(path), map_location, trusted)
            return ordinary
        store_open = self._stores.get(self._folder_of(path))
        found: dict[str, Any] = (
            store_open.load(path, map_location) if store_open is not None else load_reference(path, map_location)
        )
        return found

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes the checkpoint at ``path`` once all earlier saves are durable; ordinary ones too."""
        store = self._store_of(path)
        try:
            store.remove(path)
        except errors.NotARegion:
            store.wait()
            super().remove_checkpoint(Path(path))
        except errors.NotFound:
            # As Lightning's own plugins: it is gone, which is what was wanted.
            pass

    def teardown(self) -> None:
        """Waits until every save is durable and every removal done, and closes the regions. Raises why one failed."""
        stores, self._stores = self._stores, {}
        failed: errors.PccheckError | OSError | None = None
        for store in stores.values():
            try:
                store.close()
            except (errors.PccheckError, OSError) as why:
                failed = failed or why
        if failed is not None:
            raise failed

    @staticmethod
    def _folder_of(path: str | os.PathLike[str]) -> Path:
        return Path(os.path.realpath(Path(path).parent))

    def _store_of(self, path: str | os.PathLike[str]) -> PathStore:
        if "://" in str(path):
            raise errors.Unsupported(
                f"{path} is not a local path; a region is a file or a device of this machine",
                advice="save to a local folder and copy what python -m pccheck convert makes of it",
            )
        folder = self._folder_of(path)
        if folder not in self._stores:
            self._stores[folder] = PathStore(folder, **self._options)
        return self._stores[folder]


# Lightning comes under two names; a Trainer of either takes the plugin.
with suppress(ImportError):
    importlib.import_module("lightning_fabric.plugins").CheckpointIO.register(RegionCheckpointIO)
