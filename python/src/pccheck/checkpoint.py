"""Durable checkpoints: what is known of them, and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import arrays, dtypes, errors, streams
from ._abi import Handle, check, ffi, lib, new_struct, string, text_of, whole

__all__ = ["Checkpoint", "CheckpointInfo", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One durable checkpoint."""

    #: its place in the order of all saves of the region, never used twice
    generation: int
    #: the trainer's step
    step: int
    run_id: int
    #: bytes of its payload, a complete safetensors file
    payload_bytes: int
    chunk_bytes: int
    #: wall-clock time of its commit in nanoseconds since 1970; for people, nothing is ordered by it
    unix_ns: int
    slot: int
    #: stored tensors, tied ones not counted
    tensor_count: int
    #: made by a raw save: its one tensor is called "raw"
    raw: bool
    #: kept until unpinned
    pinned: bool
    #: how many handles of this store have it open now
    readers: int
    #: newer candidates that were passed over when it was opened, because they are damaged; 0 in a list
    rejected: int

    @classmethod
    def of(cls, info: Any) -> CheckpointInfo:
        """From the C ABI's struct."""
        return cls(
            generation=info.generation,
            step=info.step,
            run_id=info.run_id,
            payload_bytes=info.payload_bytes,
            chunk_bytes=info.chunk_bytes,
            unix_ns=info.unix_ns,
            slot=info.slot,
            tensor_count=info.tensor_count,
            raw=bool(info.flags & lib.PCC_CHECKPOINT_RAW),
            pinned=bool(info.pinned),
            readers=info.readers,
            rejected=info.rejected,
        )


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    #: as safetensors spells it, such as "BF16"
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    #: the tensor that stores its bytes where it is tied to one
    tied_to: str | None
    #: its first byte in the payload
    payload_offset: int
    index: int


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint: a mapping from tensor names to numpy arrays, read and verified when they are asked for.

    Made by :meth:`pccheck.Store.open` and :meth:`pccheck.Store.restore`. It is not overwritten while it is open,
    unless the store is read-only: then a read raises :class:`pccheck.errors.Reclaimed` where the writer was faster.
    All methods may be called from any thread.
    """

    def __init__(self, handle: Handle, path: str) -> None:
        self._handle = handle
        self.path = path
        info = new_struct("pcc_checkpoint_info")
        with self._handle.use() as checkpoint:
            check(lib.pcc_checkpoint_get_info(checkpoint, info))
            self.info = CheckpointInfo.of(info)
            #: what was saved beside the tensors
            self.metadata: dict[str, str] = dict(self._read_metadata(checkpoint))
            #: name -> what is known of the tensor, in the order of the payload
            self.tensors: dict[str, TensorInfo] = {t.name: t for t in self._read_tensors(checkpoint)}
            #: why newer candidates were passed over, one per line; "" where none was
            self.rejected = text_of(lambda b, size: int(lib.pcc_checkpoint_rejected(checkpoint, b, size)))

    @property
    def step(self) -> int:
        return self.info.step

    @property
    def generation(self) -> int:
        return self.info.generation

    @staticmethod
    def handle() -> Handle:
        """For the library to store a checkpoint's pointer in."""
        return Handle("pcc_checkpoint", lib.pcc_checkpoint_close)

    @staticmethod
    def _read_metadata(checkpoint: Any) -> Iterator[tuple[str, str]]:
        key, value = ffi.new("char **"), ffi.new("char **")
        key_bytes, value_bytes = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        for index in range(lib.pcc_checkpoint_metadata_count(checkpoint)):
            check(lib.pcc_checkpoint_metadata_get(checkpoint, index, key, key_bytes, value, value_bytes))
            yield _utf8(key[0], key_bytes[0]), _utf8(value[0], value_bytes[0])

    @staticmethod
    def _read_tensors(checkpoint: Any) -> Iterator[TensorInfo]:
        info = new_struct("pcc_tensor_info")
        for index in range(lib.pcc_checkpoint_tensor_count(checkpoint)):
            check(lib.pcc_checkpoint_tensor_get(checkpoint, index, info))
            yield TensorInfo(
                name=_utf8(info.name, info.name_bytes),
                dtype=dtypes.NAME[info.dtype],
                shape=tuple(info.shape[i] for i in range(info.rank)),
                nbytes=info.bytes,
                tied_to=string(info.tied_to) if info.tied_to != ffi.NULL else None,
                payload_offset=info.payload_offset,
                index=index,
            )

    def __getitem__(self, name: str) -> Any:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, name: str, out: Any = None) -> Any:
        """One tensor as a new numpy array, or in ``out``, as by :meth:`read_into`. Returns the array.

        Dtypes that numpy lacks need the package ml_dtypes, or an ``out`` of torch.

        Raises:
            NotFound: there is no such tensor.
            Corrupt: its stored bytes are damaged.
        """
        tensor = self._tensor(name)
        if out is None:
            import numpy as np

            out = np.empty(tensor.shape, dtypes.to_numpy(tensor.dtype))
        self.read_into({name: out})
        return out

    def read_into(self, targets: Mapping[str, Any]) -> None:
        """Fills writable arrays with the tensors of these names, in one parallel, verified read.

        Each must be contiguous and of the tensor's dtype and shape. Tensors on GPUs are written to when torch's current
        streams are done with them. On failure they hold unspecified bytes, unless it
        is NotFound or InvalidArgument: then nothing was written.
        """
        memories = arrays.memories_of(targets, write=True)
        for name, memory in memories.items():
            tensor = self._tensor(name)
            if (memory.dtype, memory.shape) != (tensor.dtype, tensor.shape):
                raise errors.InvalidArgument(
                    f"tensor {name!r}: expected an array of {tensor.dtype} {list(tensor.shape)}, "
                    f"found {memory.dtype} {list(memory.shape)}"
                )
        self._read((self.tensors[name].index, 0, memory) for name, memory in memories.items())

    def read_bytes(self, name: str, offset: int, target: Any) -> None:
        """Fills a writable, contiguous array or buffer with the tensor's bytes from byte ``offset`` on.

        Only the chunks that hold those bytes are read and verified.
        """
        self.read_ranges([(name, offset, target)])

    def read_ranges(self, ranges: list[tuple[str, int, Any]]) -> None:
        """Several :meth:`read_bytes` (name, byte offset, target) in one parallel read; targets must not overlap."""
        self._read(
            (self._tensor(name).index, whole("offset", offset), arrays.memory_of(target, name, write=True, gpu=True))
            for name, offset, target in ranges
        )

    def _read(self, pieces: Any) -> None:
        wanted = list(pieces)
        reads = ffi.new("pcc_read[]", max(1, len(wanted)))
        for read, (index, offset, memory) in zip(reads, wanted, strict=False):
            read.struct_bytes = ffi.sizeof("pcc_read")
            read.index, read.offset, read.bytes = index, offset, memory.nbytes
            read.dst = ffi.cast("void *", memory.address)
            if memory.gpu is not None:
                read.device, read.device_index = lib.PCC_DEVICE_CUDA, memory.gpu
        streams.synchronize(sorted({memory.gpu for _, _, memory in wanted if memory.gpu is not None}))
        with self._handle.use() as checkpoint:
            check(lib.pcc_checkpoint_read(checkpoint, reads, len(wanted)))

    def read_payload(self, offset: int, target: Any) -> None:
        """Fills a writable buffer with the payload's bytes from ``offset`` on, verified.

        The whole payload (``info.payload_bytes``) is a complete safetensors file.
        """
        memory, offset = arrays.memory_of(target, "payload", write=True), whole("offset", offset)
        address = ffi.cast("void *", memory.address)
        with self._handle.use() as checkpoint:
            check(lib.pcc_checkpoint_read_payload(checkpoint, offset, address, memory.nbytes))

    def verify(self) -> None:
        """Reads and verifies every byte. Raises Corrupt where one is damaged."""
        with self._handle.use() as checkpoint:
            check(lib.pcc_checkpoint_verify(checkpoint))

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._handle.closed

    def close(self) -> None:
        """Lets the checkpoint be overwritten again. Arrays that were read stay valid."""
        self._handle.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pccheck.Checkpoint step={self.step} generation={self.generation} tensors={len(self)}>"

    # An open checkpoint is itself, not its contents.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _tensor(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise errors.NotFound(
                f"the checkpoint of step {self.step} has no tensor {name!r}; it has {len(self.tensors)} others",
                operation="read",
                path=self.path,
            ) from None


def _utf8(text: Any, size: int) -> str:
    return bytes(ffi.buffer(text, size)).decode()
