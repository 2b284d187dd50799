"""DeepSpeed's FastFileWriter (FastPersist): torch.save through pinned buffers and O_DIRECT by libaio; it syncs itself.

Driven as its FastCheckpointEngine does, with a buffer of the size of PCcheck's default staging pool. DeepSpeed's CPU
accelerator lacks the small operator by which the writer views tensors as bytes; DeepSpeed's general one is used there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.io import FastFileWriter, FastFileWriterConfig, fast_file_writer
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.utils import UtilsBuilder

from ..durability import sync_folder
from .base import FilePerSave, copy_into

BUFFER_BYTES = 256 << 20
BLOCK_BYTES = 16 << 20
QUEUE_DEPTH = 32


class FastFile(FilePerSave):
    """Two halves of one buffer, filled and written in turn."""

    def open(self) -> None:
        fast_file_writer.UtilsBuilder = UtilsBuilder
        # Compiled long ago, but loaded by the first one who asks.
        UtilsBuilder().load()
        self._aio = (
            AsyncIOBuilder()
            .load()
            .aio_handle(
                block_size=BLOCK_BYTES,
                queue_depth=QUEUE_DEPTH,
                single_submit=False,
                overlap_events=True,
                intra_op_parallelism=1,
            )
        )
        self._buffer = self._aio.new_cpu_locked_tensor(BUFFER_BYTES, torch.empty(0, dtype=torch.uint8))

    def save(self, step: int) -> None:
        config = FastFileWriterConfig(dnvme_handle=self._aio, pinned_tensor=self._buffer, double_buffer=True)
        writer = FastFileWriter(file_path=str(self.path(step)), config=config)
        torch.save(self.state.tensors, writer, _use_new_zipfile_serialization=False)
        writer.close()
        sync_folder(self.folder)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        copy_into(target, torch.load(self.path(step), weights_only=True))
        return step, target

    def close(self) -> None:
        if hasattr(self, "_buffer"):
            self._aio.free_cpu_locked_tensor(self._buffer)

    def facts(self) -> dict[str, Any]:
        return {"buffer_bytes": BUFFER_BYTES, "block_bytes": BLOCK_BYTES, "queue_depth": QUEUE_DEPTH}
