"""Restoring: which stored tensor is read into which memory, decided before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import dtypes, errors
from ..checkpoint import Checkpoint, TensorInfo

__all__ = ["Leaf", "ReadPlan", "describe", "local_part"]


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
    #: (address, bytes) -> stored tensor that is read there
    _targets: dict[tuple[int, int], str] = field(default_factory=dict)
    #: (stored tensor, shape) -> the new tensor that it is read into, so that what was tied is tied again
    _made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Whether a partial restore includes this name."""
        return not self.only or any(name == p or name.startswith(p if p.endswith(".") else f"{p}.") for p in self.only)

    def mismatch(self, name: str, reason: str) -> None:
        self.mismatched.append(f"{name}: {reason}")

    def fill(self, saved: Any, live: Any, where: str) -> Any:
        """``saved`` with leaves replaced by tensors to read into: those of ``live`` at the same place, or new ones."""
        if isinstance(saved, Leaf):
            return self._tensor(saved, live if isinstance(live, torch.Tensor) else None, where)
        if isinstance(saved, Mapping):
            known = live if isinstance(live, Mapping) else {}
            filled = {key: self.fill(value, known.get(key), f"{where}.{key}") for key, value in saved.items()}
            if type(saved) is dict:
                return filled
            # OrderedDict, Counter, defaultdict: keep the type and its own settings.
            same = saved.copy()  # type: ignore[attr-defined]
            same.clear()
            same.update(filled)
            return same
        if type(saved) in (list, tuple):
            beside = live if isinstance(live, Sequence) and len(live) == len(saved) else [None] * len(saved)
            parts = [
                self.fill(value, part, f"{where}.{i}")
                for i, (value, part) in enumerate(zip(saved, beside, strict=True))
            ]
            return parts if type(saved) is list else tuple(parts)
        return saved

    def _tensor(self, leaf: Leaf, live: torch.Tensor | None, where: str) -> Any:
        info = leaf.info
        if leaf.kind == "numpy":
            import numpy as np

            array = np.empty(info.shape, dtypes.to_numpy(info.dtype))
            self._reads.append(_Read(info, array))
            return array
        dtype = dtypes.to_torch(info.dtype)
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
        if tuple(part.shape) != info.shape:
            self.mismatch(where, f"shape {list(part.shape)} here, {list(info.shape)} in the checkpoint")
        elif part.dtype != dtype and self.strict:
            self.mismatch(where, f"{part.dtype} here, {dtype} in the checkpoint")
        elif sharding_of(live) != leaf.sharding:
            self.mismatch(where, f"sharded as {sharding_of(live)} here, as {leaf.sharding} in the checkpoint")
        elif part.is_meta:
            if part is not live:
                self.mismatch(where, "a sharded tensor on the meta device; materialise it with to_empty() first")
            made = torch.empty(info.shape, dtype=part.dtype, device=self.device)
            self._read(info, made, where)
            return made
        else:
            self._read(info, part, where)
        return live

    def _read(self, info: TensorInfo, target: torch.Tensor, where: str) -> None:
        """Reads straight into the target where that can be; else into new memory that is copied afterwards."""
        target = target.detach()
        dtype = dtypes.to_torch(info.dtype)
        direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
        direct = direct and not target.is_conj() and not target.is_neg()
        if not direct:
            fresh = torch.empty(info.shape, dtype=dtype)
            self._reads.append(_Read(info, fresh))
            self._copies.append((target, fresh))
        elif info.nbytes:
            place, stored = (target.data_ptr(), info.nbytes), info.tied_to or info.name
            if place not in self._targets:
                self._targets[place] = stored
                self._reads.append(_Read(info, target, place))
            elif self._targets[place] != stored:
                other = self._targets[place]
                self.mismatch(where, f"tied to another tensor here; {other} and {stored} differ in the checkpoint")

    def raise_mismatches(self, path: str) -> None:
        """Raises StateMismatch where something does not fit. Nothing was changed."""
        missing, unexpected = (self.missing, self.unexpected) if self.strict else ([], [])
        if missing or unexpected or self.mismatched:
            raise errors.StateMismatch(
                "the checkpoint is not of this state",
                path=path,
                missing=missing,
                unexpected=unexpected,
                mismatched=self.mismatched,
                advice="is it the region of another model? strict=False restores what fits",
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
                target, read.target, read.place = read.target, torch.empty_like(read.target), None
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


def describe(value: Any) -> str:
    """What kind of thing it is, for errors."""
    return "a tensor" if isinstance(value, (Leaf, torch.Tensor)) else f"a {type(value).__name__}"
