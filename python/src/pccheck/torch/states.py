"""State trees in checkpoints: what a save is given, and what a checkpoint holds, as values of Python and torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from .. import dtypes, errors, trees
from ..checkpoint import Checkpoint
from .restoring import TREE_KEY

__all__ = ["MapLocation", "as_kind", "host_tensors", "read_state"]

#: As ``torch.load`` knows it: a device, a mapping of device names, or a function of storage and device name.
MapLocation = Any


def host_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors as the engine takes them: contiguous and in host memory, copied only where they are not.

    What shared all of its memory does so afterwards, so that it is stored once.

    Raises:
        UnsupportedValue: of a tensor without values or plain memory, naming it.
    """
    copies: dict[Any, Any] = {}
    return {name: _on_host(name, value, copies) for name, value in tensors.items()}


def _on_host(name: str, value: Any, copies: dict[Any, Any]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value if value.flags.c_contiguous else value.copy(order="C")
    tensor = value.detach()
    if tensor.is_meta:
        raise errors.UnsupportedValue("a tensor on the meta device has no values; materialise it first", at=name)
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise errors.UnsupportedValue(f"a {kind} tensor cannot be stored; save its plain parts", at=name)
    flags = (tensor.is_conj(), tensor.is_neg())
    if tensor.device.type == "cpu" and tensor.is_contiguous() and flags == (False, False):
        return tensor
    key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), flags)
    if key not in copies:
        # The original is kept too: its address must not be given to another tensor meanwhile.
        copies[key] = (tensor, tensor.resolve_conj().resolve_neg().cpu().contiguous())
    return copies[key][1]


def read_state(checkpoint: Checkpoint, map_location: MapLocation = None) -> Any:
    """The tree that an open checkpoint holds, in new memory; of one without a tree, a dict of its tensors.

    Every byte is verified. Tensors that shared memory when they were saved share it again.

    Raises:
        Corrupt: stored bytes are damaged.
    """
    text = checkpoint.metadata.get(TREE_KEY)
    kinds: dict[str, str] = dict.fromkeys(checkpoint.tensors, "torch")
    if text is not None:
        with suppress(ImportError):
            # A tree may hold numpy's values, which cannot be made without it.
            import numpy  # noqa: F401
        kinds = {}
        trees.unflatten(text, kinds.setdefault)
    tensors = _read(checkpoint, kinds)
    if map_location is not None:
        move = _mover(map_location)
        moved = {id(base): move(base) for base in tensors.values() if isinstance(base, torch.Tensor)}
        tensors = {name: moved.get(id(value), value) for name, value in tensors.items()}
    if text is None:
        return tensors
    return trees.unflatten(text, lambda name, kind: as_kind(tensors[name], kind))


def _read(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Tensors by name; names that shared memory get one object."""
    stored: dict[Any, Any] = {}
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    for name, kind in kinds.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise errors.Corrupt(f"the tree names a tensor {name!r} that the checkpoint lacks", path=checkpoint.path)
        array = kind == "numpy"
        key = (info.tied_to or name, info.dtype, info.shape, array)
        if key not in stored:
            stored[key] = wanted[name] = _empty(info.dtype, info.shape, array)
        found[name] = stored[key]
    checkpoint.read_into(wanted)
    return found


def _empty(dtype: str, shape: tuple[int, ...], array: bool) -> Any:
    if array:
        import numpy as np

        return np.empty(shape, dtypes.to_numpy(dtype))
    return torch.empty(shape, dtype=dtypes.to_torch(dtype))


def as_kind(value: Any, kind: str) -> Any:
    """A tensor, or array, as the kind that :mod:`pccheck.trees` calls for."""
    if kind == "numpy":
        return value.numpy() if isinstance(value, torch.Tensor) else value
    # A name each, and one memory, as two tensors that share it.
    tensor = value.detach()
    if kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
    return tensor


def _mover(map_location: MapLocation) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ``torch.load`` would do with tensors that were saved on the host."""
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu", "cpu")
    if not callable(map_location):
        return lambda tensor: tensor.to(map_location)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        storage = map_location(tensor.untyped_storage(), "cpu")
        return tensor if storage is None else tensor.to(storage.device)

    return move
