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
from operator import attrgetter
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
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_TENSOR = frozenset((torch.Tensor,))
# What is asked of hundreds of tensors at once, without a line of Python per tensor.
_nbytes_of, _version_of = attrgetter("nbytes"), attrgetter("_version")
_dtype_of, _device_of, _layout_of = map(attrgetter, ("dtype", "device", "layout"))
_is_nested, _requires_grad = attrgetter("is_nested"), attrgetter("requires_grad")
_STRIDED = frozenset((torch.strided,))
# No conjugates and nothing quantized.
_ORDINARY = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    + (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
)


@dataclass
class Snapshot:
    """A state that is about to be saved."""

    #: the tree without its tensors
    json: str
    #: what the engine reads
    tensors: dict[str, Any]
    #: name -> how it was sharded
    shardings: dict[str, Any]
    #: tensors that must not change before they are copied
    live: Live = field(default_factory=lambda: Live())
    #: some of them may change as soon as the trainer goes on: wait until all is copied
    urgent: bool = False

    def changed(self) -> list[str]:
        """Names of tensors that were changed since, as far as version counters (and hashes, where made) tell."""
        return self.live.changed()

    @property
    def private(self) -> bool:
        """True where nothing of the trainer's own memory is read."""
        return not self.live.tensors and not self.urgent

    def release(self) -> None:
        """Lets go of all tensors: they are copied."""
        self.live.clear()
        self.tensors.clear()


class Live:
    """Tensors that the engine reads where they are."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        #: their version counters when the snapshot was taken, and hashes where they are made
        self.versions: list[int] = []
        self._crcs: list[int] = []

    def watch(self, names: list[str], tensors: list[torch.Tensor], *, hashes: bool) -> None:
        """Notes how these look."""
        self.names, self.tensors = names, tensors
        self.versions = list(map(_version_of, tensors))
        self._crcs = list(map(_crc, tensors)) if hashes else []

    def changed(self) -> list[str]:
        """Names of those that look otherwise now."""
        try:
            versions = list(map(_version_of, self.tensors))
        except RuntimeError:
            versions = list(map(_version, self.tensors))
        found = set[int]()
        if versions != self.versions:
            found = {at for at, version in enumerate(versions) if version != self.versions[at]}
        found |= {at for at, crc in enumerate(self._crcs) if at not in found and _crc(self.tensors[at]) != crc}
        return [self.names[at] for at in sorted(found)]

    def clear(self) -> None:
        self.watch([], [], hashes=False)


def _version(tensor: torch.Tensor) -> int:
    """No tensor's where it was exchanged (``swap_tensors``) for one that has none, of inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def take(tree: Any, steady: Iterable[torch.Tensor], *, hashes: bool, known: trees.Known | None = None) -> Snapshot:
    """Takes a snapshot of a tree. ``steady``: tensors that change in the update alone.

    ``hashes``: also hash what is not captured, so that changes that bypass version counters are found; slow.
    ``known``: of the snapshots before.
    """
    flat = trees.flatten(tree, is_tensor=lambda value: isinstance(value, torch.Tensor), known=known)
    addresses = _addresses(list(steady))
    snapshot = Snapshot(flat.json, {}, {})
    found = flat.tensors
    for name in [name for name, kind in zip(found, map(type, found.values()), strict=True) if kind not in _PLAIN]:
        value = found[name]
        if not isinstance(value, torch.Tensor):
            snapshot.tensors[name] = _numpy_copy(found.pop(name))
            continue
        sharding = sharding_of(value)
        if sharding is not None:
            snapshot.shardings[name] = sharding
        found[name] = local_part(value)
    names, tensors = list(found), list(found.values())
    # Plain tensors serve as they are: they have the memory and the version counters that detached ones would have. But
    # hashes look at their memory later, and what led to them by autograd must not be kept alive.
    if hashes or not _TENSOR.issuperset(map(type, tensors)) or any(map(_requires_grad, tensors)):
        tensors = [tensor.detach() for tensor in tensors]
    in_place = _readable(tensors)
    if not all(in_place):
        for name, tensor, readable in zip(names, tensors, in_place, strict=True):
            if not readable:
                _check(tensor, name)
    sizes = list(map(_nbytes_of, tensors))
    budget = max(_CAPTURE_BYTES, sum(sizes) // _CAPTURE_SHARE)
    captured, watched = _Captured(), list[int]()
    for at, (readable, nbytes, address) in enumerate(
        zip(in_place, sizes, map(torch.Tensor.data_ptr, tensors), strict=True)
    ):
        if readable and nbytes > _SCALAR_BYTES:
            if address in addresses:
                watched.append(at)
                continue
            if nbytes > budget:
                snapshot.urgent = True
                continue
        if captured.add(names[at], tensors[at], readable, address, nbytes) and readable:
            # What cannot be read in place costs its memory anyhow.
            budget -= nbytes
    snapshot.live.watch([names[at] for at in watched], [tensors[at] for at in watched], hashes=hashes)
    snapshot.tensors.update(zip(names, tensors, strict=True))
    snapshot.tensors |= captured.copies()
    return snapshot


def _addresses(tensors: list[torch.Tensor]) -> set[int]:
    """Where the memory of tensors is."""
    if _PLAIN.issuperset(map(type, tensors)):
        return set(map(torch.Tensor.data_ptr, tensors)) - {0}
    return {local_part(tensor).data_ptr() for tensor in tensors} - {0}


def _readable(tensors: list[torch.Tensor]) -> list[bool]:
    """Whether the engine can read tensors where they are. Most states are made of ordinary tensors that at worst are
    not contiguous: of all of them at once it takes no time to see that."""
    ordinary = (
        _TENSOR.issuperset(map(type, tensors))
        and _ORDINARY.issuperset(map(_dtype_of, tensors))
        and all(map(_is_read, set(map(_device_of, tensors))))
        and _STRIDED.issuperset(map(_layout_of, tensors))
        and not any(map(_is_nested, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_inference, tensors))
    )
    return list(map(torch.Tensor.is_contiguous if ordinary else _is_readable, tensors))


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

    def add(self, name: str, tensor: torch.Tensor, in_place: bool, address: int, nbytes: int) -> bool:
        """Takes a tensor in. False where one with the same memory was."""
        key: Any = name
        if nbytes:
            key = (address, tensor.shape, tensor.dtype)
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
