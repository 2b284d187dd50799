"""The items of a save plan as the tensors of one checkpoint, with bounded extra memory.

CPU tensors that are contiguous are saved from where they are. What has to be copied first (other devices, other
strides) is copied whole as long as the copies stay below a limit; beyond it, the items are written as one stream of
bytes, one after the other, through copies of bounded size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from .. import dtypes, errors
from ..region import payload_bytes
from ..save import Save
from ..store import Store
from ._document import dtype_name

__all__ = ["Item", "NamedPayload", "StreamedPayload", "payload_of"]

# The engine allows 4096 bytes.
_LONGEST_NAME = 4000
# How much of a tensor is copied at once where it is streamed.
_PIECE_BYTES = 32 << 20
# Items of a stream begin at multiples of this.
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Item:
    """Where one item of the plan is in the checkpoint."""

    item: WriteItem
    tensor: str
    offset: int
    nbytes: int
    dtype: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NamedPayload:
    """Every item as a tensor of its own."""

    items: list[Item]
    arrays: dict[str, Any]

    def payload_bytes(self, texts: dict[str, str]) -> int:
        """What a slot must hold."""
        return payload_bytes(self.arrays, texts)

    def begin(self, store: Store, step: int, texts: dict[str, str]) -> Save:
        """Begins the save; the memory of the arrays must not change before it is copied."""
        return store.save(step, self.arrays, texts, timeout=_slot_timeout(store))


@dataclass(frozen=True, slots=True)
class StreamedPayload:
    """All items one after the other in one tensor of bytes."""

    items: list[Item]
    total_bytes: int
    planner: SavePlanner
    #: item's place in the list -> its bytes, of those that are no tensors
    blobs: dict[int, io.BytesIO]

    def payload_bytes(self, texts: dict[str, str]) -> int:
        """What a slot must hold."""
        # Sizes only: the memory is never touched.
        return payload_bytes({"raw": torch.empty(0, dtype=torch.uint8)}, texts) + self.total_bytes + 4096

    def begin(self, store: Store, step: int, texts: dict[str, str]) -> Save:
        """Writes the whole stream: everything is copied on return."""
        with store.raw_save(step, self.total_bytes, texts, timeout=_slot_timeout(store)) as raw:
            end = 0
            for number, item in enumerate(self.items):
                if item.offset > end:
                    raw.write_at(end, bytes(item.offset - end))
                end = item.offset + item.nbytes
                at = item.offset
                for piece in self._pieces(number, item):
                    raw.write_at(at, piece)
                    at += len(piece) if isinstance(piece, memoryview) else piece.numel()
                if at != end:
                    raise errors.InvalidArgument(
                        f"{item.item.index.fqn}: the planner's plan says {item.nbytes} bytes, its data has "
                        f"{at - item.offset}",
                        operation="save",
                        advice="the planner must resolve data of the dtype and shape that it planned",
                    )
            return raw.commit()

    def _pieces(self, number: int, item: Item) -> Iterator[Any]:
        if number in self.blobs:
            yield self.blobs[number].getbuffer()
            return
        data = self.planner.resolve_data(item.item)
        yield from (_as_bytes(_plain(part)) for part in _parts(_tensor_of(item.item, data)))


def payload_of(items: list[WriteItem], planner: SavePlanner, copy_bytes: int) -> NamedPayload | StreamedPayload:
    """The items ready to be saved. At most ``copy_bytes`` of host memory are taken for copies of tensors."""
    placed: list[Item] = []
    arrays: dict[str, Any] = {}
    copied = 0
    for number, item in enumerate(items):
        data = planner.resolve_data(item)
        name = _name_of(item, number, arrays)
        if item.type == WriteItemType.BYTE_IO:
            view = _blob_of(item, data).getbuffer()
            arrays[name] = view
            placed.append(Item(item, name, 0, view.nbytes, None, (view.nbytes,)))
            continue
        tensor = _tensor_of(item, data)
        if not _is_plain(tensor):
            copied += tensor.numel() * tensor.element_size()
            if copied > copy_bytes:
                arrays.clear()
                return _streamed(items, planner)
            tensor = _plain(tensor)
        storable = str(tensor.dtype).removeprefix("torch.") in _STORABLE
        arrays[name] = tensor if storable else _as_bytes(tensor)
        nbytes = tensor.numel() * tensor.element_size()
        placed.append(Item(item, name, 0, nbytes, dtype_name(tensor.dtype), tuple(tensor.shape)))
    return NamedPayload(placed, arrays)


def _slot_timeout(store: Store) -> float | None:
    # Waiting for a slot helps only where one is being written; the staging pool always empties.
    return None if store.stats().claimable_slots else 0.0


def _storable() -> frozenset[str]:
    names = []
    for name in dtypes.CODE:
        try:
            names.append(dtype_name(dtypes.to_torch(name)))
        except (errors.Unsupported, KeyError):
            continue
    return frozenset(names)


_STORABLE = _storable()


def _streamed(items: list[WriteItem], planner: SavePlanner) -> StreamedPayload:
    placed: list[Item] = []
    blobs: dict[int, io.BytesIO] = {}
    at = 0
    for number, item in enumerate(items):
        dtype: str | None = None
        if item.type == WriteItemType.BYTE_IO:
            blobs[number] = _blob_of(item, planner.resolve_data(item))
            nbytes = blobs[number].getbuffer().nbytes
            shape: tuple[int, ...] = (nbytes,)
        else:
            planned = item.tensor_data
            if planned is None:
                raise errors.UnsupportedValue("the plan has no size for it", at=item.index.fqn)
            shape = tuple(planned.chunk.sizes)
            nbytes = math.prod(shape) * planned.properties.dtype.itemsize
            dtype = dtype_name(planned.properties.dtype)
        at = -(-at // _ALIGN) * _ALIGN
        placed.append(Item(item, "raw", at, nbytes, dtype, shape))
        at += nbytes
    return StreamedPayload(placed, at, planner, blobs)


def _name_of(item: WriteItem, number: int, taken: dict[str, Any]) -> str:
    index = item.index
    name = index.fqn
    if item.type == WriteItemType.SHARD and index.offset is not None:
        name = f"{name}@{','.join(map(str, index.offset))}"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        length = 0
    if not 0 < length <= _LONGEST_NAME or "\0" in name or name.startswith(("pccheck.", "__")):
        name = f"item {number}"
    while name in taken:
        name = f"{name} #{number}"
    return name


def _blob_of(item: WriteItem, data: Any) -> io.BytesIO:
    if not isinstance(data, io.BytesIO):
        raise errors.UnsupportedValue(f"the planner gave {type(data).__name__}, not io.BytesIO", at=item.index.fqn)
    return data


def _tensor_of(item: WriteItem, data: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise errors.UnsupportedValue(f"the planner gave {type(data).__name__}, not a tensor", at=item.index.fqn)
    tensor = data.detach()
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise errors.UnsupportedValue(
            f"a tensor of layout {tensor.layout} and dtype {tensor.dtype} has no plain bytes; save its plain parts",
            at=item.index.fqn,
        )
    return tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    own = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return own and tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if _is_plain(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of the tensor, in row-major order, of which each takes little memory."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return
    if nbytes <= _PIECE_BYTES or _is_plain(tensor):
        yield tensor
        return
    rows = max(1, _PIECE_BYTES * tensor.shape[0] // nbytes)
    for first in range(0, tensor.shape[0], rows):
        part = tensor.narrow(0, first, min(rows, tensor.shape[0] - first))
        # One row may itself be large.
        yield from _parts(part[0]) if part.shape[0] == 1 and part.dim() > 1 else (part,)
