"""Filling a load plan's tensors from one rank's checkpoint, with bounded extra memory.

What lies in storage as it is wanted, and is wanted in contiguous host memory, is read in place. Everything else (parts
of rows, other dtypes, other devices) is read into a buffer of bounded size first and copied from there.
"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from .. import errors
from ..checkpoint import Checkpoint
from ._document import Stored, dtype_named

__all__ = ["read_items", "spans"]


@dataclass(frozen=True, slots=True)
class Span:
    """A contiguous run of a stored, row-major tensor, and the box of it that is wanted."""

    #: first element of the run
    first: int
    #: shape of the run
    shape: tuple[int, ...]
    #: of the box in the run
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    #: of the box in what is wanted altogether; its leading dimensions are single indices where the run lacks them
    at: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements of the run."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """All of the run is wanted."""
        return self.shape == self.lengths


def spans(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[Span]:
    """The runs that cover a box of a row-major tensor, each of at most ``limit`` elements unless wanted whole."""
    if math.prod(lengths) == 0:
        return
    if len(shape) == 0:
        yield Span(0, (), (), (), ())
        return
    row = math.prod(shape[1:])
    rows_are_whole = tuple(shape[1:]) == tuple(lengths[1:])
    if rows_are_whole or row <= limit:
        step = lengths[0] if rows_are_whole else max(1, limit // row)
        for done in range(0, lengths[0], step):
            rows = min(step, lengths[0] - done)
            yield Span(
                (offsets[0] + done) * row,
                (rows, *shape[1:]),
                (0, *offsets[1:]),
                (rows, *lengths[1:]),
                (done,),
            )
        return
    for index in range(lengths[0]):
        for inner in spans(shape[1:], offsets[1:], lengths[1:], limit):
            yield Span(
                (offsets[0] + index) * row + inner.first,
                inner.shape,
                inner.offsets,
                inner.lengths,
                (index, *inner.at),
            )


@dataclass(slots=True)
class _Unit:
    """One range to be read and what is done with it."""

    item: ReadItem
    stored: Stored
    offset: int
    nbytes: int
    #: the tensor to be filled, or the part of it; None: bytes
    target: torch.Tensor | None
    span: Span | None
    #: what is handed to the planner when this, the item's last unit, is done
    commit: torch.Tensor | None
    direct: bool = False
    buffer: Any = None


def read_items(
    checkpoint: Checkpoint, items: list[tuple[ReadItem, Stored]], planner: LoadPlanner, read_bytes: int
) -> None:
    """Fills what the planner resolves for the items, a batch of at most ``read_bytes`` after the other.

    Raises:
        StateMismatch: a target's size is not what its item says.
        Corrupt, Reclaimed: see :meth:`RegionReader.read_data`.
    """
    first_byte = {name: tensor.payload_offset for name, tensor in checkpoint.tensors.items()}
    for _, stored in items:
        if stored.tensor not in first_byte:
            raise errors.Corrupt(
                f"its metadata names a tensor {stored.tensor!r} that the rank's checkpoint lacks",
                operation="load",
                path=checkpoint.path,
            )
    items.sort(key=lambda pair: first_byte[pair[1].tensor] + pair[1].offset)
    batch = _Batch(checkpoint, planner)
    for item, stored in items:
        for unit in _units(item, stored, planner, read_bytes):
            if batch.nbytes and batch.nbytes + unit.nbytes > read_bytes:
                batch.read()
            batch.add(unit)
    batch.read()


def _units(item: ReadItem, stored: Stored, planner: LoadPlanner, read_bytes: int) -> Iterator[_Unit]:
    if item.type == LoadItemType.BYTE_IO or stored.dtype is None:
        yield _Unit(item, stored, stored.offset, stored.nbytes, None, None, None)
        return
    target = planner.resolve_tensor(item).detach()
    if tuple(target.size()) != tuple(item.lengths):
        raise errors.StateMismatch(
            "a tensor does not have the size that its plan says",
            mismatched=[f"{item.dest_index.fqn}: expected {tuple(item.lengths)}, found {tuple(target.size())}"],
        )
    itemsize = dtype_named(stored.dtype).itemsize
    limit = max(1, read_bytes // itemsize)
    pieces = list(spans(stored.shape, tuple(item.storage_offsets), tuple(item.lengths), limit))
    if len(pieces) == 1 and pieces[0].whole and not _in_place(target, stored):
        # Wanted whole but not in place: through buffers of bounded size.
        pieces = list(_split(pieces[0], limit))
    for number, span in enumerate(pieces):
        part = _part(target, span)
        yield _Unit(
            item,
            stored,
            stored.offset + span.first * itemsize,
            span.count * itemsize,
            part,
            span,
            target if number == len(pieces) - 1 else None,
        )
    if not pieces:
        planner.commit_tensor(item, target)


def _split(span: Span, limit: int) -> Iterator[Span]:
    if span.count <= limit or not span.shape:
        yield span
        return
    row = math.prod(span.shape[1:])
    if row <= limit:
        rows = max(1, limit // row)
        for done in range(0, span.shape[0], rows):
            shape = (min(rows, span.shape[0] - done), *span.shape[1:])
            yield Span(span.first + done * row, shape, (0,) * len(shape), shape, (done,))
        return
    for index in range(span.shape[0]):
        inner = Span(span.first + index * row, span.shape[1:], (0,) * (len(span.shape) - 1), span.shape[1:], (0,))
        for part in _split(inner, limit):
            yield Span(part.first, part.shape, part.offsets, part.lengths, (index, *part.at))


def _part(target: torch.Tensor, span: Span) -> torch.Tensor:
    """The view of the target that a span fills."""
    if not span.at:
        return target
    for index in span.at[:-1]:
        target = target[index]
    return target.narrow(0, span.at[-1], span.lengths[0]) if span.lengths else target[span.at[-1]]


def _in_place(target: torch.Tensor, stored: Stored) -> bool:
    plain = type(target).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    lazy = target.is_conj() or target.is_neg()
    same = stored.dtype is not None and target.dtype == dtype_named(stored.dtype)
    return plain and not lazy and same and target.is_cpu and target.is_contiguous()


class _Batch:
    """Units that are read in one parallel, verified read."""

    def __init__(self, checkpoint: Checkpoint, planner: LoadPlanner) -> None:
        self.nbytes = 0
        self._checkpoint = checkpoint
        self._planner = planner
        self._units: list[_Unit] = []
        # Memory that is read into in place, as disjoint [first, end) by first: tied tensors are
        # not filled twice by one read.
        self._taken: list[tuple[int, int]] = []

    def add(self, unit: _Unit) -> None:
        """One more to be read."""
        target = unit.target
        if target is None:
            unit.buffer = bytearray(unit.nbytes)
        elif unit.span is not None and unit.span.whole and _in_place(target, unit.stored):
            if not self._take(target):
                self.read()
                self._take(target)
            unit.buffer = target.reshape(-1).view(torch.uint8)
            unit.direct = True
        else:
            unit.buffer = torch.empty(unit.nbytes, dtype=torch.uint8)
        self._units.append(unit)
        self.nbytes += unit.nbytes

    def read(self) -> None:
        """Reads all that was added, hands it on, and is empty again."""
        units, self._units, self._taken, self.nbytes = self._units, [], [], 0
        self._checkpoint.read_ranges([(u.stored.tensor, u.offset, u.buffer) for u in units if u.nbytes])
        for unit in units:
            if unit.target is None:
                self._planner.load_bytes(unit.item, io.BytesIO(unit.buffer))
                continue
            if not unit.direct and unit.span is not None and unit.stored.dtype is not None:
                found = unit.buffer.view(dtype_named(unit.stored.dtype)).reshape(unit.span.shape)
                for dimension, (offset, length) in enumerate(zip(unit.span.offsets, unit.span.lengths, strict=True)):
                    found = found.narrow(dimension, offset, length)
                unit.target.copy_(found)
            unit.buffer = None
            if unit.commit is not None:
                self._planner.commit_tensor(unit.item, unit.commit)

    def _take(self, target: torch.Tensor) -> bool:
        first = target.data_ptr()
        end = first + target.numel() * target.element_size()
        at = bisect.bisect_left(self._taken, (first, end))
        clear_before = at == 0 or self._taken[at - 1][1] <= first
        clear_after = at == len(self._taken) or self._taken[at][0] >= end
        if clear_before and clear_after:
            self._taken.insert(at, (first, end))
            return True
        return False
