"""Snapshots: which tensors the engine may read while training goes on, and which are captured at once.

Parameters and optimizer state change in the update alone, so that the engine copies them while forward and backward of
the next iteration run, and the update waits. Everything else (buffers, RNG, Python values) may change at any moment: it
is captured before the snapshot is returned, by a copy where it is small, else by waiting until the engine has it.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import trees
from ..errors import UnsupportedValue
from .planning import local_part, sharding_of

__all__ = ["Snapshot", "take"]

# Captured copies may take this share of the state, and at least this many bytes; beyond, the trainer waits instead.
_CAPTURE_SHARE = 50
_CAPTURE_BYTES = 4 << 20
# Scalars, such as an optimizer's step counters, are not worth reading in place.
_SCALAR_BYTES = 64
# Types that are nothing but memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass
class Snapshot:
    """A state that is about to be saved."""

    #: the tree without its tensors
    json: str
    #: what the engine reads
    tensors: dict[str, Any]
    #: name -> how it was sharded
    shardings: dict[str, Any]
    #: tensors that must not change before they are copied, with their version counters
    live: list[Live] = field(default_factory=list)
    #: some of them may change as soon as the trainer goes on: wait until all is copied
    urgent: bool = False

    def changed(self) -> list[str]:
        """Names of tensors that were changed since, as far as version counters (and hashes, where made) tell."""
        return [live.name for live in self.live if live.changed()]

    @property
    def private(self) -> bool:
        """True where nothing of the trainer's own memory is read."""
        return not self.live and not self.urgent

    def release(self) -> None:
        """Lets go of all tensors: they are copied."""
        self.live.clear()
        self.tensors.clear()


@dataclass(slots=True)
class Live:
    """A tensor that the engine reads where it is."""

    name: str
    tensor: torch.Tensor
    version: int
    crc: int | None

    def changed(self) -> bool:
        return self.tensor._version != self.version or (self.crc is not None and _crc(self.tensor) != self.crc)


def take(tree: Any, steady: Iterable[torch.Tensor], *, hashes: bool) -> Snapshot:
    """Takes a snapshot of a tree. ``steady``: tensors that change in the update alone.

    ``hashes``: also hash what is not captured, so that changes that bypass version counters are found; slow.
    """
    flat = trees.flatten(tree, is_tensor=lambda value: isinstance(value, torch.Tensor))
    addresses = {local_part(tensor).data_ptr() for tensor in steady}
    addresses.discard(0)
    snapshot = Snapshot(flat.json, {}, {})
    found: list[tuple[str, torch.Tensor, bool]] = []
    for name, value in flat.tensors.items():
        if not isinstance(value, torch.Tensor):
            snapshot.tensors[name] = _numpy_copy(value)
            continue
        sharding = None if type(value) in _PLAIN else sharding_of(value)
        if sharding is not None:
            snapshot.shardings[name] = sharding
        tensor = (value if type(value) in _PLAIN else local_part(value)).detach()
        in_place = _is_readable(tensor)
        if not in_place:
            _check(tensor, name)
        found.append((name, tensor, in_place))
    total = sum(tensor.nbytes for _, tensor, _ in found)
    budget = max(_CAPTURE_BYTES, total // _CAPTURE_SHARE)
    captured = _Captured()
    for name, tensor, in_place in found:
        nbytes = tensor.nbytes
        if in_place and nbytes > _SCALAR_BYTES and tensor.data_ptr() in addresses:
            snapshot.live.append(Live(name, tensor, tensor._version, _crc(tensor) if hashes else None))
        elif in_place and nbytes > max(budget, _SCALAR_BYTES):
            snapshot.urgent = True
        elif captured.add(name, tensor, in_place) and in_place:
            # What cannot be read in place costs its memory anyhow.
            budget -= nbytes
        snapshot.tensors[name] = tensor
    snapshot.tensors |= captured.copies()
    return snapshot


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether the engine can read a tensor where it is."""
    return (
        not _is_wrapper(tensor)
        and (tensor.is_cpu or (tensor.is_cuda and torch.version.cuda is not None))
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
    )


class _Captured:
    """Tensors that are to be copied, each memory once: tied tensors share one copy, so that they stay tied."""

    def __init__(self) -> None:
        self._tensors: dict[Any, torch.Tensor] = {}
        #: dtype, device, shape -> keys of those that fit together
        self._small: dict[Any, list[Any]] = {}
        self._keys: dict[str, Any] = {}

    def add(self, name: str, tensor: torch.Tensor, in_place: bool) -> bool:
        """Takes a tensor in. False where one with the same memory was."""
        nbytes = tensor.nbytes
        key: Any = name
        if nbytes:
            key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
            if not in_place:
                key += (tensor.stride(), tensor.is_conj(), tensor.is_neg())
        self._keys[name] = key
        if key in self._tensors:
            return False
        self._tensors[key] = tensor
        if in_place and 0 < nbytes <= _SCALAR_BYTES:
            self._small.setdefault((tensor.dtype, tensor.device, tensor.shape), []).append(key)
        return True

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies that the trainer does not know, by name. Small ones of a kind are made at once: step counters come by
        the hundreds.
        """
        copies: dict[Any, torch.Tensor] = {}
        with torch.no_grad():
            for keys in self._small.values():
                copies |= zip(keys, torch.stack([self._tensors[key] for key in keys]).unbind(), strict=True)
        copies |= {key: _capture(tensor) for key, tensor in self._tensors.items() if key not in copies}
        return {name: copies[key] for name, key in self._keys.items()}


def _check(tensor: torch.Tensor, name: str) -> None:
    if tensor.is_meta:
        raise UnsupportedValue("a tensor on the meta device has no values; materialise it first", at=name)
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or _is_wrapper(tensor):
        kind = "nested tensor" if tensor.is_nested else type(tensor).__name__
        raise UnsupportedValue(f"a {kind} of layout {tensor.layout} cannot be stored; save its plain parts", at=name)


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it has no memory of its own, but holds other tensors."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _is_read(device: torch.device) -> bool:
    """Whether the engine reads memory of that device."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.cuda is not None)


def _capture(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    if not _is_read(plain.device):
        plain = plain.to("cpu")
    return plain if plain.data_ptr() != tensor.data_ptr() or not plain.nbytes else plain.clone()


def _numpy_copy(array: Any) -> Any:
    numpy = sys.modules["numpy"]
    return numpy.array(array, copy=True, order="C")


def _crc(tensor: torch.Tensor) -> int:
    if not tensor.nbytes:
        return 0
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
