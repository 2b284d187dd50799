"""What every measured system does. One checkpoint is on the disk before an older one goes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..state import State, TorchState


class System:
    """One way to save a state into a folder, in the order `open`, then `save` and `wait` in turn, then `close`.

    A new object of the class, in the same folder, does `reopen`, `restore` and `close`.
    """

    #: what it survives: "power", or "process" where it writes to memory only
    durability: ClassVar[str] = "power"
    #: the arrays that it takes
    state_class: ClassVar[type[State]] = TorchState

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.state = state

    def open(self) -> None:
        """All that is done once before the first save."""

    def changed(self) -> None:
        """The state has changed and is to be saved next; not measured."""

    def save(self, step: int) -> None:
        """Returns as soon as the trainer may change the state."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when what was saved survives what `durability` says."""

    def reopen(self) -> None:
        """What a restarted trainer opens before it can restore."""

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """Brings the checkpoint of a step, or one that the system chooses instead, into the trainer's tensors.

        Returns its step and the tensors: those of `target`, where they can be changed.
        """
        raise NotImplementedError

    def forget(self, step: int) -> None:
        """Removes the checkpoint of an older step; not measured."""

    def close(self) -> None:
        """Ends what `open` started."""

    def facts(self) -> dict[str, Any]:
        """What it got and how it was driven, for the report."""
        return {}


class FilePerSave(System):
    """A new file or folder for every checkpoint."""

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def forget(self, step: int) -> None:
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def copy_into(target: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """What a trainer does with tensors that were loaded beside its own."""
    for name, tensor in target.items():
        tensor.copy_(loaded[name])
