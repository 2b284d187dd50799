"""Systems with faults that the comparison must find; `benches` is on the path."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from comparison.systems.base import FilePerSave
from comparison.systems.plain_files import TorchSave

SLOW_SECONDS = 0.4


class Slow(TorchSave):
    """Durable later than it could be."""

    def wait(self) -> None:
        time.sleep(SLOW_SECONDS)


class Unsynced(FilePerSave):
    """Says durable while the bytes are in the page cache."""

    def save(self, step: int) -> None:
        torch.save(self.state.tensors, self.path(step))

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        return step, torch.load(self.path(step))


class Uncopied(TorchSave):
    """Lets the trainer go on before it has copied anything."""

    def save(self, step: int) -> None:
        self._step = step

    def wait(self) -> None:
        super().save(self._step)


class Forgetful(TorchSave):
    """Restores one wrong bit."""

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        found = super().restore(step, target)
        target["embedding"].view(torch.int32)[-1] ^= 1
        return found


class Broken(TorchSave):
    """Cannot save."""

    def save(self, step: int) -> None:
        raise RuntimeError("planted: cannot save")
