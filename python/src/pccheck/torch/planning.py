"""Restoring: which stored tensor is read into which memory, decided before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import dtypes, errors
from ..checkpoint import Checkpoint, TensorInfo

__all__ = ["Leaf", "ReadPlan", "describe", "laid_out_as", "local_part", "sharding_of"]


@dataclass(frozen=True)
class Leaf:
    """A stored tensor's place in a saved tree."""

    info: TensorInfo
    #: "torch", "parameter", "numpy" or "array"
    kind: str
    #: how it was sharded, where it was a DTensor
    sharding: Any = None


@dataclass
class ReadPlan:
    """Collects reads and everything that does not fit.

    Args:
        device: where parameters on the meta device get their memory.
        strict: whether dtypes must be equal; shapes always must.
        only: prefixes of names; empty means everything.
    """

    device: torch.device
    strict: bool = True
    only: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    _reads: list[_Read] = field(default_factory=list)
    #: (target, what was read), to be copied after the read
    _copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: memory, as device, address, dtype, shape and strides -> stored tensor that is read there
    _targets: dict[Any, str] = field(default_factory=dict)
    #: prefixes of ``only`` that named something
    _found: set[str] = field(default_factory=set)
    #: (stored tensor, shape) -> the new tensor that it is read into, so that what was tied is tied again
    _made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Whether a partial restore includes this name."""
        found = [p for p in self.only if name == p or name.startswith(p if p.endswith(".") else f"{p}.")]
        self._found.update(found)
        return not self.only or bool(found)

    def mismatch(self, name: str, reason: str) -> None:
        self.mismatched.append(f"{name}: {reason}")

    def fill(self, saved: Any, live: Any, where: str, *, like: torch.Tensor | None = None) -> Any:
        """``saved`` with leaves replaced by tensors to read into: those of ``live`` at the same place, or new ones.

        ``like``: new tensors are sharded as this one, where they were when they were saved.
        """
        if isinstance(saved, Leaf):
            if saved.kind == "numpy":
                return self._array(saved.info, live)
            return self._tensor(saved, live if isinstance(live, torch.Tensor) else None, where, like)
        if isinstance(saved, Mapping):
            known = live if isinstance(live, Mapping) else {}
            filled = {
                key: self.fill(value, known.get(key), f"{where}.{key}", like=like) for key, value in saved.items()
            }
            if type(saved) is dict:
                return filled
            # OrderedDict, Counter, defaultdict: keep the type and its own settings, such as versions of modules.
            same: Any = copy.copy(saved)
            same.clear()
            same.update(filled)
            return same
        if type(saved) in (list, tuple):
            beside = live if isinstance(live, Sequence) and len(live) == len(saved) else [None] * len(saved)
            parts = [
                self.fill(value, part, f"{where}.{i}", like=like)
                for i, (value, part) in enumerate(zip(saved, beside, strict=True))
            ]
            return parts if type(saved) is list else tuple(parts)
        return saved

    def _array(self, info: TensorInfo, live: Any) -> Any:
        """A numpy array to read into: that of ``live`` where it fits."""
        import numpy as np

        dtype = dtypes.to_numpy(info.dtype)
        fits = type(live) is np.ndarray and (live.dtype, live.shape) == (dtype, info.shape)
        if not (fits and live.flags.c_contiguous and live.flags.writeable):
            live = np.empty(info.shape, dtype)
        place = (live.__array_interface__["data"][0], info.nbytes) if info.nbytes else None
        self._reads.append(_Read(info, live, place))
        return live

    def _tensor(self, leaf: Leaf, live: torch.Tensor | None, where: str, like: torch.Tensor | None) -> Any:
        info = leaf.info
        dtype = dtypes.to_torch(info.dtype)
        if live is None and leaf.sharding is not None:
            live = _sharded_like(like, leaf, dtype)
            if live is None:
                self.mismatch(where, f"nothing here that is {_shown(leaf.sharding)}, as it is in the checkpoint")
                return None
        if live is None:
            key = (info.tied_to or info.name, info.shape)
            made = self._made.get(key)
            if made is None:
                made = torch.empty(info.shape, dtype=dtype)
                self._read(info, made, where)
                if leaf.kind == "parameter":
                    made = torch.nn.Parameter(made, requires_grad=dtype.is_floating_point or dtype.is_complex)
                self._made[key] = made
            return made
        part = local_part(live)
        if sharding_of(live) != leaf.sharding:
            here, there = _shown(sharding_of(live)), _shown(leaf.sharding)
            self.mismatch(where, f"{here} here, {there} in the checkpoint; pccheck.dcp can reshard, this cannot")
        elif tuple(part.shape) != info.shape:
            self.mismatch(where, f"shape {list(part.shape)} here, {list(info.shape)} in the checkpoint")
        elif part.dtype != dtype and self.strict:
            self.mismatch(where, f"{part.dtype} here, {dtype} in the checkpoint")
        elif part.is_meta and part is not live:
            self.mismatch(where, "a sharded tensor on the meta device; materialise it with to_empty() first")
        elif part.is_meta:
            made = torch.empty(info.shape, dtype=part.dtype, device=self.device)
            self._read(info, made, where)
            return made
        else:
            self._read(info, part, where)
        return live

    def _read(self, info: TensorInfo, target: torch.Tensor, where: str) -> None:
        """Reads straight into the target where that can be; else into new memory that is copied afterwards."""
        target = target.detach()
        if not info.nbytes:
            return
        dtype = dtypes.to_torch(info.dtype)
        memory = (target.device, target.data_ptr(), target.dtype, target.shape, target.stride(), target.is_conj())
        stored = info.tied_to or info.name
        other = self._targets.get(memory)
        if other is not None:
            if other != stored:
                self.tied(where, other, stored)
            return
        self._targets[memory] = stored
        on_gpu = target.device.type == "cuda" and torch.version.cuda is not None
        direct = (target.device.type == "cpu" or on_gpu) and target.is_contiguous() and target.dtype == dtype
        if direct and not target.is_conj() and not target.is_neg():
            self._reads.append(_Read(info, target, (target.data_ptr(), info.nbytes)))
        else:
            fresh = torch.empty(info.shape, dtype=dtype)
            self._reads.append(_Read(info, fresh))
            self._copies.append((target, fresh))

    def tied(self, name: str, one: str, other: str) -> None:
        """Two stored tensors are to be read into one memory."""
        self.mismatch(name, f"tied to another tensor here; {one} and {other} differ in the checkpoint")

    def raise_mismatches(self, path: str) -> None:
        """Raises StateMismatch where something does not fit, InvalidArgument where ``only`` names nothing.

        Nothing was changed.
        """
        unknown = [prefix for prefix in self.only if prefix not in self._found]
        if unknown:
            raise errors.InvalidArgument(
                f"only={unknown!r}: neither the state nor the checkpoint has such names", operation="restore", path=path
            )
        missing, unexpected = (self.missing, self.unexpected) if self.strict else ([], [])
        if missing or unexpected or self.mismatched:
            raise errors.StateMismatch(
                "the checkpoint is not of this state",
                path=path,
                missing=missing,
                unexpected=unexpected,
                mismatched=self.mismatched,
                advice="is it the region of another model?"
                + (" strict=False leaves out what is missing or unexpected" if missing or unexpected else ""),
            )

    def read(self, checkpoint: Checkpoint) -> None:
        """Reads everything in one parallel, verified read."""
        self._part_overlapping()
        checkpoint.read_ranges([(read.info.name, 0, read.target) for read in self._reads])
        with torch.no_grad():
            for target, fresh in self._copies:
                target.copy_(fresh)

    def _part_overlapping(self) -> None:
        """Views of one buffer may overlap in part, which one read may not write twice: read those beside it."""
        end = 0
        for read in sorted((r for r in self._reads if r.place is not None), key=lambda r: r.place or (0, 0)):
            address, nbytes = read.place or (0, 0)
            if address < end:
                target = read.target
                if not isinstance(target, torch.Tensor):
                    # An array of numpy, of any dtype: its bytes.
                    target = torch.from_numpy(target.reshape(-1).view("uint8"))
                read.target, read.place = torch.empty_like(target), None
                self._copies.append((target, read.target))
            end = max(end, address + nbytes)


@dataclass
class _Read:
    info: TensorInfo
    target: Any
    #: (address, bytes) of memory that others may share
    place: tuple[int, int] | None = None


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def sharding_of(tensor: torch.Tensor) -> Any:
    """How a DTensor is laid out, as plain values; None for plain tensors."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return {
        "shape": list(tensor.shape),
        "mesh": mesh.mesh.tolist(),
        "coordinate": list(mesh.get_coordinate() or []),
        "placements": [repr(p) for p in placements],
    }


def laid_out_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, moved to the memory format of its parameter (such as channels_last) where it is of the same shape.

    Optimizers make their state so, and fused ones go by memory, not by index: with another layout they would pair the
    wrong elements, without a word.
    """
    plain = sharding_of(parameter) is None and sharding_of(tensor) is None
    if not plain or tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def _sharded_like(like: torch.Tensor | None, leaf: Leaf, dtype: torch.dtype) -> torch.Tensor | None:
    """An empty tensor laid out as the leaf was, on the mesh of ``like``; None where that is laid out otherwise."""
    layout = sharding_of(like) if like is not None else None
    if layout is None or layout | {"shape": leaf.sharding["shape"]} != leaf.sharding:
        return None
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    shape = torch.Size(leaf.sharding["shape"])
    local = torch.empty(leaf.info.shape, dtype=dtype, device=like.to_local().device)
    stride = torch.empty(shape, device="meta").stride()
    made: torch.Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
    return made


def _shown(sharding: Any) -> str:
    if sharding is None:
        return "not sharded"
    return f"{' '.join(sharding['placements'])} of {sharding['shape']} over ranks {sharding['mesh']}"


def describe(value: Any) -> str:
    """What kind of thing it is, for errors."""
    return "a tensor" if isinstance(value, (Leaf, torch.Tensor)) else f"a {type(value).__name__}"
