"""The ways to save a state on a GPU that are compared, each beside a training loop.

Every arm keeps to its own rules for correct snapshots, and keeps at least one complete checkpoint.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

import pccheck.torch

_SPARE_SLOTS = 2


class Arm:
    """No checkpoints. All methods run in the trainer's thread."""

    def __init__(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state's tensors on the GPU."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{key}": value for key, value in state.items() if torch.is_tensor(value)}
        return named

    def before_update(self) -> None:
        """Waits for what the update must not overtake."""

    def save(self, step: int) -> None:
        """After an update: saves."""

    def finish(self) -> None:
        """Returns when every save is durable."""

    def close(self) -> None:
        """Gives everything back."""


class Pccheck(Arm):
    """pccheck.torch.Checkpointer."""

    snapshot = "staging"
    flag_waits = False
    pool_bytes: int | None = None
    in_flight = 2

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        state = sum(tensor.nbytes for tensor in self.tensors().values())
        # Room for the whole state, and a little more.
        pool = None if self.pool_bytes is None else state + self.pool_bytes
        self.checkpointer = pccheck.torch.Checkpointer(
            self.folder / "region.pcc",
            model=self.model,
            optimizer=self.optimizer,
            snapshot=self.snapshot,
            flag_waits=self.flag_waits,
            staging_bytes=pool,
            max_in_flight=self.in_flight,
            durability="process",
            on_error="raise",
            slot_timeout=600.0,
        )

    def before_update(self) -> None:
        self.checkpointer.before_update()

    def save(self, step: int) -> None:
        self.checkpointer.save(step)

    def finish(self) -> None:
        self.checkpointer.wait()

    def close(self) -> None:
        self.checkpointer.close()


class PccheckPool(Pccheck):
    """The same with a staging pool that holds the state."""

    pool_bytes = 64 << 20


class PccheckSpare(Pccheck):
    """The same by way of spare memory of the GPU."""

    snapshot = "spare"


class PccheckFlags(Pccheck):
    """The same with its small pool; not the host waits for it before an update, but the stream."""

    flag_waits = True


class TorchSave(Arm):
    """torch.save, fsync, rename: the trainer waits for all of it."""

    def save(self, step: int) -> None:
        partial = self.folder / "partial"
        with partial.open("wb") as stream:
            torch.save(
                {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}, stream
            )
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.folder / f"checkpoint-{step % _SPARE_SLOTS}.pt")


class _KeptStager(DefaultStager):
    """Keeps its pinned memory: that of torch 2.11 gives it up after every save, and fails at the next one."""

    def __init__(self, options: StagingOptions) -> None:
        super().__init__(options)
        self._give_up, self._state_dict_stager.close = self._state_dict_stager.close, lambda: None

    def close(self) -> None:
        super().close()
        self._give_up()


class DcpPinned(Arm):
    """dcp.async_save, staged in pinned memory beside forward and backward, its memory kept from save to save."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._stager = _KeptStager(StagingOptions(True, False, use_async_staging=True, use_non_blocking_copy=True))
        self._uploading: Future[Any] | None = None
        self._staging: Future[Any] | None = None

    def save(self, step: int) -> None:
        self.finish()
        response: Any = async_save(
            {"step": step, **self.tensors()},
            checkpoint_id=self.folder / f"checkpoint-{step % _SPARE_SLOTS}",
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            no_dist=True,
        )
        self._uploading, self._staging = response.upload_completion, response.staging_completion

    def before_update(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def finish(self) -> None:
        if self._uploading is not None:
            self._uploading.result()
            self._uploading = None

    def close(self) -> None:
        self.finish()
        self._stager.close()


class CheckFreq(Arm):
    """CheckFreq's way (Mohan et al., FAST 2021): a snapshot in pinned memory, copied beside forward and backward, which
    a thread writes to a file; one at a time.
    """

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self._stream = torch.cuda.Stream()
        self._kept = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            for name, tensor in self.tensors().items()
        }
        self._copied: torch.cuda.Event | None = None
        self._writer: threading.Thread | None = None

    def save(self, step: int) -> None:
        self.finish()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in self.tensors().items():
                self._kept[name].copy_(tensor, non_blocking=True)
            self._copied = self._stream.record_event()
        self._writer = threading.Thread(target=self._write, args=(self._copied, step))
        self._writer.start()

    def _write(self, copied: torch.cuda.Event, step: int) -> None:
        copied.synchronize()
        partial = self.folder / "partial"
        with partial.open("wb") as stream:
            torch.save(self._kept, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.folder / f"checkpoint-{step % _SPARE_SLOTS}.pt")

    def before_update(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        self.finish()
        self._kept.clear()


class Gpm(Arm):
    """GPM's way (Pandey et al., ASPLOS 2022): the GPU itself stores the state into the mapped file, while training
    stands still; then it is made durable.
    """

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        import cupy

        self._cupy = cupy
        self._store = cupy.ElementwiseKernel("T x", "T y", "y = x", "store_out")
        size = sum(-(-tensor.nbytes // 256) * 256 for tensor in self.tensors().values())
        self._maps: list[tuple[mmap.mmap, Any, int]] = []
        for index in range(_SPARE_SLOTS):
            file = os.open(self.folder / f"mapped-{index}", os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(file, 0, size)
            mapped = mmap.mmap(file, size)
            os.close(file)
            address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
            cupy.cuda.runtime.hostRegister(address, size, 0)
            memory = cupy.cuda.UnownedMemory(address, size, mapped)
            self._maps.append((mapped, cupy.ndarray((size,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0)), address))

    def save(self, step: int) -> None:
        cupy = self._cupy
        mapped, target, _ = self._maps[step % _SPARE_SLOTS]
        torch.cuda.synchronize()
        at = 0
        for tensor in self.tensors().values():
            source = cupy.asarray(tensor.reshape(-1).view(torch.uint8))
            words = cupy.uint32 if tensor.nbytes % 4 == 0 else cupy.uint8
            self._store(source.view(words), target[at : at + tensor.nbytes].view(words))
            at += -(-tensor.nbytes // 256) * 256
        cupy.cuda.get_current_stream().synchronize()
        mapped.flush()

    def close(self) -> None:
        for mapped, _, address in self._maps:
            self._cupy.cuda.runtime.hostUnregister(address)
            del mapped
        self._maps.clear()


ARMS: dict[str, Callable[..., Arm]] = {
    "none": Arm,
    "pccheck": Pccheck,
    "pccheck-pool": PccheckPool,
    "pccheck-spare": PccheckSpare,
    "pccheck-flags": PccheckFlags,
    "torch.save": TorchSave,
    "dcp-pinned": DcpPinned,
    "checkfreq": CheckFreq,
    "gpm": Gpm,
}


class Timed:
    """Seconds of the trainer's thread in an arm's calls."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.saves: list[float] = []

    def wait(self, arm: Arm) -> None:
        began = time.perf_counter()
        arm.before_update()
        self.waits.append(time.perf_counter() - began)

    def save(self, arm: Arm, step: int) -> None:
        began = time.perf_counter()
        arm.save(step)
        self.saves.append(time.perf_counter() - began)
