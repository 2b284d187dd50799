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
    total = sum(getattr(tensor, "nbytes", 0) for tensor in flat.tensors.values())
    budget = max(_CAPTURE_BYTES, total // _CAPTURE_SHARE)
    captured: dict[Any, torch.Tensor] = {}
    keys: dict[str, Any] = {}
    for name, value in flat.tensors.items():
        if not isinstance(value, torch.Tensor):
            snapshot.tensors[name] = _numpy_copy(value)
            continue
        sharding = sharding_of(value)
        if sharding is not None:
            snapshot.shardings[name] = sharding
        tensor = local_part(value).detach()
        _check(tensor, name)
        readable = _is_read(tensor.device) and tensor.is_contiguous()
        readable = readable and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        if readable and tensor.nbytes > _SCALAR_BYTES and tensor.data_ptr() in addresses:
            snapshot.tensors[name] = tensor
            snapshot.live.append(Live(name, tensor, tensor._version, _crc(tensor) if hashes else None))
        elif readable and tensor.nbytes > max(budget, _SCALAR_BYTES):
            snapshot.tensors[name] = tensor
            snapshot.urgent = True
        else:
            # Tied tensors share one copy, so that they stay tied.
            key: Any = (
                tensor.data_ptr(),
                tensor.shape,
                tensor.dtype,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
            )
            if not tensor.nbytes:
                key = name
            if key not in captured:
                captured[key] = tensor
                # What cannot be read in place costs its memory anyhow.
                budget -= tensor.nbytes if readable else 0
            snapshot.tensors[name] = tensor
            keys[name] = key
    copies = _captured(captured)
    for name, key in keys.items():
        snapshot.tensors[name] = copies[key]
    return snapshot


def _captured(tensors: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Copies that the trainer does not know. Those of one kind are made at once: step counters come by the hundreds."""
    kinds: dict[Any, list[Any]] = {}
    for key, tensor in tensors.items():
        plain = _is_read(tensor.device) and tensor.is_contiguous() and 0 < tensor.nbytes <= _SCALAR_BYTES
        plain = plain and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        kinds.setdefault((tensor.dtype, tensor.device) if plain else None, []).append(key)
    copies = {key: _capture(tensors[key]) for key in kinds.pop(None, [])}
    for (dtype, device), keys in kinds.items():
        sources = [tensors[key] for key in keys]
        sizes = [source.numel() for source in sources]
        with torch.no_grad():
            parts = torch.split(torch.empty(sum(sizes), dtype=dtype, device=device), sizes)
            targets = [part.view(source.shape) for part, source in zip(parts, sources, strict=True)]
            torch._foreach_copy_(targets, sources)
        copies |= zip(keys, targets, strict=True)
    return copies


def _check(tensor: torch.Tensor, name: str) -> None:
    if tensor.is_meta:
        raise UnsupportedValue("a tensor on the meta device has no values; materialise it first", at=name)
    wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if tensor.layout is not torch.strided or tensor.is_quantized or wrapper:
        raise UnsupportedValue(
            f"a {type(tensor).__name__} of layout {tensor.layout} cannot be stored; save its plain parts", at=name
        )


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
