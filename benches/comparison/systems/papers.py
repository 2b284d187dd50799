"""Two published ways to save, made again from their papers for a state in host memory.

CheckFreq: Mohan, Phanishayee, Chidambaram, "CheckFreq: Frequent, Fine-Grained DNN Checkpointing", FAST 2021. A snapshot
of the state is taken into memory of its own (here: host memory, kept from save to save), then persisted in the
background while training goes on; there is one checkpoint at a time.

GPM: Pandey, Kamath, Basu, "GPM: Leveraging Persistent Memory from a GPU", ASPLOS 2022. The file is mapped; the
trainer's own threads copy the state into the mapping while training stalls, and make it durable before they go on. Two
places are written in turn, and a mark says which one is complete.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..durability import sync_folder
from ..state import State
from .base import FilePerSave, System, copy_into


class CheckFreq(FilePerSave):
    """Copied to a second host buffer by all of torch's threads, then torch.save and fsync in a thread."""

    def open(self) -> None:
        self._snapshot = {name: torch.full_like(tensor, -1.0) for name, tensor in self.state.tensors.items()}
        self._persisting: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int) -> None:
        copy_into(self._snapshot, self.state.tensors)
        self._persisting = threading.Thread(target=self._persist, args=(step,))
        self._persisting.start()

    def _persist(self, step: int) -> None:
        try:
            with self.path(step).open("wb") as stream:
                torch.save(self._snapshot, stream)
                stream.flush()
                os.fsync(stream.fileno())
            sync_folder(self.folder)
        except BaseException as why:
            self._failure = why

    def wait(self) -> None:
        assert self._persisting is not None
        self._persisting.join()
        if self._failure is not None:
            raise self._failure

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        copy_into(target, torch.load(self.path(step), weights_only=True))
        return step, target


class Gpm(System):
    """A mapped file of a header page and two places for the state; msync of the place, then of the header."""

    def __init__(self, folder: Path, state: State) -> None:
        super().__init__(folder, state)
        self._place_bytes = -(-state.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._path = folder / "mapped"

    def open(self) -> None:
        with self._path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE + 2 * self._place_bytes)
            os.fsync(file.fileno())
        sync_folder(self.folder)
        self.reopen()

    def reopen(self) -> None:
        with self._path.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        memory = torch.from_numpy(np.frombuffer(self._mapping, dtype=np.uint8))
        #: step of the last complete checkpoint in each place
        self._steps = memory[: mmap.PAGESIZE].view(torch.int64)
        self._places = []
        for place in range(2):
            found, at = {}, mmap.PAGESIZE + place * self._place_bytes
            for name, tensor in self.state.tensors.items():
                found[name] = memory[at : at + tensor.nbytes].view(torch.float32).view(tensor.shape)
                at += tensor.nbytes
            self._places.append(found)

    def save(self, step: int) -> None:
        place = step % 2
        copy_into(self._places[place], self.state.tensors)
        self._mapping.flush(mmap.PAGESIZE + place * self._place_bytes, self._place_bytes)
        self._steps[place] = step
        self._mapping.flush(0, mmap.PAGESIZE)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        newest = int(self._steps[:2].argmax())
        copy_into(target, self._places[newest])
        return int(self._steps[newest]), target

    def close(self) -> None:
        del self._steps, self._places, self._mapping
