"""One file per checkpoint, written while the trainer waits, then fsync of the file and of its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..durability import sync_file, sync_folder
from .base import FilePerSave, copy_into


class TorchSave(FilePerSave):
    """torch.save."""

    def save(self, step: int) -> None:
        with self.path(step).open("wb") as stream:
            torch.save(self.state.tensors, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(self.folder)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        copy_into(target, torch.load(self.path(step), weights_only=True))
        return step, target


class Safetensors(FilePerSave):
    """safetensors.torch.save_file."""

    def save(self, step: int) -> None:
        save_file(self.state.tensors, self.path(step))
        sync_file(self.path(step))
        sync_folder(self.folder)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        copy_into(target, load_file(self.path(step)))
        return step, target
