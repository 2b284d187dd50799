"""Orbax's AsyncCheckpointer on the CPU, without compression. Its arrays cannot change: it keeps them, copies none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ..durability import files, sync_file, sync_folder
from ..state import State, TorchState
from .base import FilePerSave


class JaxState(State):
    """The same values as arrays of JAX."""

    immutable = True

    def fill(self, state_bytes: int, seed: int) -> None:
        source = TorchState(state_bytes, seed).tensors
        for name in list(source):
            # A copy: JAX may otherwise share torch's memory.
            self.tensors[name] = jnp.array(source.pop(name).numpy(), copy=True).block_until_ready()

    def change(self) -> None:
        for name in self.tensors:
            self.tensors[name] = (self.tensors[name] + 1.0).block_until_ready()

    def target(self) -> dict[str, Any]:
        # What is known of them: JAX restores into new arrays.
        return dict(jax.eval_shape(lambda tensors: tensors, self.tensors))

    def differing(self, restored: Mapping[str, Any]) -> int:
        def bits(array: Any) -> np.ndarray[Any, Any]:
            return np.asarray(array).view(np.int32)

        return sum(
            name not in restored or not np.array_equal(bits(array), bits(restored[name]))
            for name, array in self.tensors.items()
        )


class Orbax(FilePerSave):
    """AsyncCheckpointer over a PyTree of arrays."""

    state_class = JaxState

    def open(self) -> None:
        self._step = 0
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    reopen = open

    def save(self, step: int) -> None:
        self._step = step
        self._checkpointer.save(self.path(step).absolute(), args=ocp.args.PyTreeSave(self.state.tensors))

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()
        # It syncs the arrays' files, but not all the small ones beside them.
        for path in files(self.path(self._step)):
            sync_file(path)
        for folder in (*(path for path in self.path(self._step).rglob("*") if path.is_dir()), self.path(self._step)):
            sync_folder(folder)
        sync_folder(self.folder)

    def restore(self, step: int, target: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        kinds = {name: ocp.ArrayRestoreArgs(sharding=place) for name in target}
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=kinds)
        restored = self._checkpointer.restore(self.path(step).absolute(), args=arguments)
        for array in restored.values():
            array.block_until_ready()
        return step, restored

    def close(self) -> None:
        self._checkpointer.close()
