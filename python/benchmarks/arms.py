"""The ways to checkpoint that are compared. Each saves model, optimizer, schedule and place in the data.

Every arm holds to its own rules for correct snapshots: what is staged in the background is waited for before the
next update, and a new save waits for the one before where the library demands it. Each always has a complete
checkpoint on the disk.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

import pccheck.torch

KEPT = 2


@dataclass
class Training:
    """What an arm checkpoints, and where."""

    folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data: Any
    every: int

    def state(self, step: int) -> dict[str, Any]:
        """All of it as torch's own savers take it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
        }


@dataclass
class SaveTime:
    """When a save began and became durable, by time.monotonic(); None: it never did."""

    step: int
    began: float
    durable: float | None = None


class Arm:
    """No checkpoints. Subclasses override what they need; all but `close()` runs in the trainer's thread."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.saves: list[SaveTime] = []
        training.optimizer.register_step_pre_hook(lambda *_: self.before_update())

    def before_update(self) -> None:
        """Waits for what must not be overtaken by the update."""

    def step(self, step: int) -> None:
        """After every update: saves where one is due."""

    def pool_bytes(self) -> int | None:
        """Memory that the arm was told to stage in; None where it takes what it needs."""
        return None

    def close(self) -> None:
        """Returns when every save is durable and what the arm started has ended."""


class _FolderArm(Arm):
    """Torch's savers write one file or folder per checkpoint; old ones are deleted by a thread of their own."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._old: queue.Queue[Path | None] = queue.Queue()
        self._paths: list[Path] = []
        self._janitor = threading.Thread(target=self._delete, name="janitor", daemon=True)
        self._janitor.start()

    def _delete(self) -> None:
        while (path := self._old.get()) is not None:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def step(self, step: int) -> None:
        if step % self.training.every == 0:
            self.saves.append(SaveTime(step, time.monotonic()))
            self._save(step, self.training.folder / f"step-{step}", self.saves[-1])

    def _save(self, step: int, path: Path, save: SaveTime) -> None:
        raise NotImplementedError

    def _durable(self, save: SaveTime, path: Path) -> None:
        save.durable = time.monotonic()
        self._paths.append(path)
        if len(self._paths) > KEPT:
            self._old.put(self._paths.pop(0))

    def close(self) -> None:
        self._old.put(None)
        self._janitor.join()


class TorchSave(_FolderArm):
    """torch.save, fsync, rename, fsync of the folder: the trainer waits for all of it."""

    def _save(self, step: int, path: Path, save: SaveTime) -> None:
        partial = path.with_suffix(".partial")
        with partial.open("wb") as stream:
            torch.save(self.training.state(step), stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._durable(save, path)


class DcpAsync(_FolderArm):
    """dcp.async_save as it comes: staged in the call, written by a thread."""

    _stager: DefaultStager | None = None
    _kind = AsyncCheckpointerType.THREAD
    _no_dist = True

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._uploading: Future[Any] | None = None
        self._staging: Future[Any] | None = None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def _save(self, step: int, path: Path, save: SaveTime) -> None:
        # As torch's own recipe does: not more than one at a time, or memory grows without bound.
        if self._uploading is not None:
            self._uploading.result()
        response = async_save(
            self.training.state(step),
            checkpoint_id=path,
            async_stager=self._stager,
            async_checkpointer_type=self._kind,
            no_dist=self._no_dist,
        )
        if isinstance(response, Future):
            self._uploading = response
        else:
            self._uploading, self._staging = response.upload_completion, response.staging_completion
        self._uploading.add_done_callback(lambda done: self._durable(save, path) if not done.exception() else None)

    def before_update(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def close(self) -> None:
        if self._uploading is not None:
            self._uploading.result()
        if self._stager is not None:
            self._stager.close()
        super().close()


class DcpCached(DcpAsync):
    """dcp.async_save with one stager for the whole run, which keeps its memory from save to save."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))


class DcpOverlap(DcpAsync):
    """As `DcpCached`, and staging itself runs in a thread beside forward and backward."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._stager = DefaultStager(StagingOptions(False, False, use_async_staging=True, use_non_blocking_copy=False))


class DcpProcess(DcpAsync):
    """As `DcpOverlap`, staged in shared memory and written by a second process."""

    _kind = AsyncCheckpointerType.PROCESS
    _no_dist = False

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        rendezvous = training.folder / "rendezvous"
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        self._stager = DefaultStager(StagingOptions(False, True, use_async_staging=True, use_non_blocking_copy=False))

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()


class Pccheck(Arm):
    """pccheck.torch.Checkpointer with its defaults."""

    def __init__(self, training: Training) -> None:
        # Before the base class: the checkpointer waits in a hook of its own, and has none of the arm's.
        self._checkpointer = pccheck.torch.Checkpointer(
            training.folder / "region.pcc",
            model=training.model,
            optimizer=training.optimizer,
            scheduler=training.scheduler,
            data=training.data,
            every=training.every,
        )
        self._checkpointer.restore()
        self._begun: list[tuple[SaveTime, pccheck.Save, float]] = []
        super().__init__(training)

    def step(self, step: int) -> None:
        called = time.monotonic()
        save = self._checkpointer.step(step)
        if save is not None:
            self.saves.append(SaveTime(step, called))
            self._begun.append((self.saves[-1], save, time.monotonic()))

    def pool_bytes(self) -> int | None:
        return self._checkpointer.store.got().staging_bytes

    def close(self) -> None:
        self._checkpointer.wait()
        for time_of, save, begun in self._begun:
            # The engine counts from its own begin, which was before the call returned: at most too long.
            time_of.durable = begun + save.durable(0).durable_seconds
        self._checkpointer.close()
        if self._checkpointer.failures:
            raise RuntimeError(f"{self._checkpointer.failures} saves failed: {self._checkpointer.last_error}")


ARMS: dict[str, Callable[[Training], Arm]] = {
    "none": Arm,
    "pccheck": Pccheck,
    "dcp": DcpAsync,
    "dcp-cached": DcpCached,
    "dcp-overlap": DcpOverlap,
    "dcp-process": DcpProcess,
    "torch.save": TorchSave,
}
