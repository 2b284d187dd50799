"""What the machine can do at best. Shares no code with the engine: Python's own pwrite and pread from threads.

The bytes lie in huge pages already, so that not even a copy stands between them and the device.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..state import State
from .base import System

HUGE_PAGE_BYTES = 2 << 20
#: operations in flight and bytes of each that are tried; the fastest is the ceiling
MODES = (
    (1, 16 << 20),
    (2, 4 << 20),
    (2, 16 << 20),
    (4, 4 << 20),
    (4, 16 << 20),
    (8, 1 << 20),
    (8, 4 << 20),
    (32, 1 << 20),
)
TRIALS = 3
#: of the state, at most, in each trial
TRIAL_BYTES = 256 << 20

Mode = tuple[int, int]


def huge_block(size: int) -> torch.Tensor:
    """Bytes in touched pages of 2 MiB, where the kernel gives them."""
    block = mmap.mmap(-1, size + 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.from_numpy(np.frombuffer(block, dtype=np.uint8))
    start = -everything.data_ptr() % HUGE_PAGE_BYTES
    found = everything[start : start + size]
    found.zero_()
    return found


class _Plain(System):
    """The state's bytes, one tensor after another, in one block."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._bytes = -(-state.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = folder / "plain"
        self.block: torch.Tensor | None = None

    def _pieces(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert self.block is not None
        pieces, at = [], 0
        for tensor in tensors.values():
            pieces.append((self.block[at : at + tensor.nbytes].view(torch.float32).view(tensor.shape), tensor))
            at += tensor.nbytes
        return pieces

    def changed(self) -> None:
        # The trainer's own memory is the block, so that no copy is measured.
        for inside, tensor in self._pieces(self.state.tensors):
            inside.copy_(tensor)


class PlainDirect(_Plain):
    """O_DIRECT into a file that is allocated and written already, at its best queue depth, then fdatasync."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._write_mode = self._read_mode = MODES[0]

    def open(self) -> None:
        self.block = huge_block(self._bytes)
        self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        os.posix_fallocate(self._fd, 0, self._bytes)
        self._pool = ThreadPoolExecutor(max(depth for depth, _ in MODES))
        # Allocated extents are slower until they were written once.
        self._move(os.pwritev, MODES[0], self._bytes)
        os.fsync(self._fd)
        self._write_mode = self._fastest(os.pwritev)

    def _fastest(self, call: Callable[..., int]) -> Mode:
        size = min(self._bytes, TRIAL_BYTES)
        took: dict[Mode, float] = {}
        for _ in range(TRIALS):
            for mode in MODES:
                began = time.monotonic()
                self._move(call, mode, size)
                took[mode] = min(took.get(mode, 1e9), time.monotonic() - began)
        return min(took, key=lambda mode: took[mode])

    def _move(self, call: Callable[..., int], mode: Mode, size: int) -> None:
        assert self.block is not None
        depth, piece = mode
        memory = self.block.numpy().data
        offsets = iter(range(0, size, piece))

        def one_after_another() -> None:
            # The iterator is shared: each offset goes to one thread.
            for offset in offsets:
                end = min(offset + piece, size)
                moved = call(self._fd, [memory[offset:end]], offset)
                if moved != end - offset:
                    raise OSError(f"{self._file}: moved {moved} bytes at {offset}, expected {end - offset}")

        for done in [self._pool.submit(one_after_another) for _ in range(depth)]:
            done.result()

    def save(self, step: int) -> None:
        self._move(os.pwritev, self._write_mode, self._bytes)
        os.fdatasync(self._fd)

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def reopen(self) -> None:
        self.block = huge_block(self._bytes)
        self._fd = os.open(self._file, os.O_RDONLY | os.O_DIRECT)
        self._pool = ThreadPoolExecutor(max(depth for depth, _ in MODES))
        self._read_mode = self._fastest(os.preadv)
        self.block.zero_()

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        self._move(os.preadv, self._read_mode, self._bytes)
        return step, {name: inside for name, (inside, _) in zip(target, self._pieces(target), strict=True)}

    def facts(self) -> dict[str, Any]:
        depth, piece = self._write_mode
        return {"write_depth": depth, "write_bytes": piece}


class PlainCopy(_Plain):
    """A plain copy into a mapped file on tmpfs by as many threads as there are cores: what memory can do at best."""

    durability = "process"

    def open(self) -> None:
        self._map()
        for inside, _ in self._pieces(self.state.tensors):
            inside.fill_(-1.0)

    def _map(self) -> None:
        with self._file.open("a+b") as file:
            file.truncate(self._bytes)
            mapping = mmap.mmap(file.fileno(), self._bytes)
        self.block = torch.from_numpy(np.frombuffer(mapping, dtype=np.uint8))

    def save(self, step: int) -> None:
        for inside, tensor in self._pieces(self.state.tensors):
            inside.copy_(tensor)

    def changed(self) -> None:
        """Its block is where it saves to."""

    def reopen(self) -> None:
        self._map()

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        for inside, tensor in self._pieces(target):
            tensor.copy_(inside)
        return step, target

    def close(self) -> None:
        self.block = None
