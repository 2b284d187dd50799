"""torch.distributed.checkpoint on one rank. It syncs its files itself; the folder above them is synced here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ..durability import sync_folder
from .base import FilePerSave

warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Dcp(FilePerSave):
    """dcp.save with as many writing threads as there are cores."""

    def writer(self, step: int) -> FileSystemWriter:
        """A writer that uses all cores; torch's own default is one thread."""
        return FileSystemWriter(self.path(step), thread_count=os.cpu_count() or 1)

    def save(self, step: int) -> None:
        save(self.state.tensors, storage_writer=self.writer(step), no_dist=True)
        self.sync(step)

    def sync(self, step: int) -> None:
        """Makes the names durable."""
        sync_folder(self.path(step))
        sync_folder(self.folder)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        load(target, checkpoint_id=self.path(step), no_dist=True)
        return step, target


class DcpAsync(Dcp):
    """dcp.async_save with its defaults: staged in the call, written by one thread."""

    def open(self) -> None:
        self._saving: Future[Any] | None = None
        self._step = 0

    def options(self, step: int) -> dict[str, Any]:
        """What is not the default."""
        return {"checkpoint_id": self.path(step)}

    def save(self, step: int) -> None:
        response = async_save(self.state.tensors, no_dist=True, **self.options(step))
        if not isinstance(response, Future):
            response.staging_completion.result()
            response = response.upload_completion
        self._saving, self._step = response, step

    def wait(self) -> None:
        assert self._saving is not None
        self._saving.result()
        self.sync(self._step)


class DcpCached(DcpAsync):
    """dcp.async_save with a stager that keeps its memory from save to save, and a writing thread for every core."""

    _stager: DefaultStager | None = None

    def open(self) -> None:
        super().open()
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def options(self, step: int) -> dict[str, Any]:
        return {"storage_writer": self.writer(step), "async_stager": self._stager}

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
