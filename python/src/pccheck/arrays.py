"""Arrays of any library as memory: address, bytes, dtype and shape, without a copy.

Understood are torch tensors in host memory or on a GPU, numpy arrays, objects with ``__array_interface__``, with
DLPack's ``__dlpack__`` (JAX, CuPy's and TensorFlow's host arrays), and with the buffer protocol. They must be
contiguous and row-major: what is not would have to be copied, which is the caller's decision.
"""

from __future__ import annotations

import ctypes
import math
import operator
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import dtypes, errors
from ._abi import ffi, lib

__all__ = ["Memory", "Packer", "memories_of", "memory_of", "pack_pairs", "pack_tensors"]


@dataclass(frozen=True, slots=True)
class Memory:
    """A contiguous, row-major array; ``owner`` keeps it alive."""

    address: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    owner: Any
    #: index of the CUDA device that it is on; None: host memory
    gpu: int | None = None


def memories_of(tensors: Mapping[str, Any], *, write: bool = False) -> dict[str, Memory]:
    """:func:`memory_of` each of the named arrays, which may be on GPUs."""
    try:
        named = list(tensors.items())
    except (AttributeError, TypeError):
        raise errors.InvalidArgument(
            f"expected a mapping from names to arrays, found a {type(tensors).__name__}"
        ) from None
    return {name: memory_of(array, name, write=write, gpu=True) for name, array in named}


def memory_of(array: Any, name: str, *, write: bool = False, gpu: bool = False) -> Memory:
    """The memory of an array object; ``name`` says in errors which. ``write``: it will be written to. ``gpu``: it may
    be a torch tensor on a CUDA device.

    Raises:
        InvalidArgument: it is no array, not contiguous, read-only though it is to be written, or of a dtype that
            cannot be stored.
        Unsupported: it is on a device from which it cannot be taken.
    """
    try:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            return _of_torch(array, torch, gpu)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(array, (numpy.ndarray, numpy.generic)):
            return _of_numpy(array, write)
        if hasattr(array, "__array_interface__"):
            import numpy as np

            view = np.asarray(array)
            if write and view.__array_interface__["data"] != array.__array_interface__["data"]:
                raise errors.InvalidArgument(f"numpy sees a copy of this {type(array).__name__}; restore into numpy")
            return _of_numpy(view, write)
        if hasattr(array, "__dlpack__"):
            if write:
                raise errors.InvalidArgument(
                    f"a {type(array).__name__} may be immutable; restore into numpy or torch and convert"
                )
            return _of_dlpack(array)
        return _of_buffer(array, write)
    except errors.PccheckError as why:
        raise type(why)(f"tensor {name!r}: {why.message}") from None


def _of_torch(tensor: Any, torch: Any, gpu: bool) -> Memory:
    wrapper = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if tensor.layout is not torch.strided or tensor.is_nested or wrapper:
        raise errors.InvalidArgument(
            f"a {type(tensor).__name__} of layout {tensor.layout} has no plain memory; pass its plain parts"
        )
    if tensor.device.type == "meta":
        raise errors.Unsupported("it is on the device meta, which holds no data; pass a tensor that does")
    # HIP calls its devices cuda, too.
    on_gpu = gpu and tensor.device.type == "cuda" and torch.version.cuda is not None
    if tensor.device.type != "cpu" and not on_gpu:
        raise errors.Unsupported(f"it is on {tensor.device}; copy it to host memory first")
    if not tensor.is_contiguous():
        raise errors.InvalidArgument(_not_contiguous(tuple(tensor.stride())))
    if tensor.is_conj() or tensor.is_neg():
        raise errors.InvalidArgument("it is a lazy conjugate or negative; resolve it with resolve_conj().resolve_neg()")
    dtype, size = dtypes.from_torch(tensor.dtype), tensor.element_size()
    nbytes = tensor.numel() * size
    storage = tensor.untyped_storage()
    if nbytes and storage.nbytes() < tensor.storage_offset() * size + nbytes:
        raise errors.InvalidArgument(
            f"its storage holds {storage.nbytes()} bytes, less than the tensor's {nbytes}: it was resized (as sharded "
            "training does); gather the tensor first"
        )
    # The storage, not the tensor: `tensor.data = other` would let its memory go.
    return Memory(
        tensor.data_ptr(), nbytes, dtype, tuple(tensor.shape), storage, tensor.device.index if on_gpu else None
    )


def _of_numpy(array: Any, write: bool) -> Memory:
    import numpy as np

    if isinstance(array, np.ma.MaskedArray):
        raise errors.InvalidArgument("it is a masked array, whose mask would be lost; pass its data and its mask")
    if write and isinstance(array, np.generic):
        raise errors.InvalidArgument("it is a numpy scalar, which is immutable; pass an array of shape ()")
    array = np.asarray(array)
    if not array.flags.c_contiguous:
        raise errors.InvalidArgument(_not_contiguous(array.strides))
    if write and not array.flags.writeable:
        raise errors.InvalidArgument("it is read-only")
    address = array.__array_interface__["data"][0] if array.size else 0
    return Memory(address, array.nbytes, dtypes.from_numpy(array.dtype), array.shape, array)


def _not_contiguous(strides: tuple[int, ...]) -> str:
    return f"expected contiguous, row-major memory, found strides {strides}; pass a contiguous copy"


class _DLTensor(ctypes.Structure):
    """DLPack's DLTensor, first member of DLManagedTensor (dmlc/dlpack, include/dlpack/dlpack.h)."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


# DLPack's type codes and widths.
_DLPACK = {
    (0, 8): "I8", (0, 16): "I16", (0, 32): "I32", (0, 64): "I64",
    (1, 8): "U8", (1, 16): "U16", (1, 32): "U32", (1, 64): "U64",
    (2, 16): "F16", (2, 32): "F32", (2, 64): "F64",
    (4, 16): "BF16",
    (5, 64): "C64", (5, 128): "C128",
    (6, 8): "BOOL",
    (10, 8): "F8_E4M3", (11, 8): "F8_E4M3FNUZ", (12, 8): "F8_E5M2", (13, 8): "F8_E5M2FNUZ", (14, 8): "F8_E8M0",
}  # fmt: skip
# kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged
_DLPACK_HOST = (1, 3, 11, 13)


# Of our own: prototypes set on ctypes.pythonapi are shared with everybody.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _of_dlpack(array: Any) -> Memory:
    try:
        device_type, device_id = array.__dlpack_device__()
        if device_type not in _DLPACK_HOST:
            raise errors.Unsupported(
                f"it is on DLPack device ({int(device_type)}, {device_id}); copy it to host memory first"
            )
        capsule = array.__dlpack__()
        # The capsule is not consumed: it frees what it holds when `owner` is gone.
        address = _capsule_pointer(capsule, b"dltensor")
    except errors.PccheckError:
        raise
    except Exception as why:
        # Each library has exceptions of its own for arrays that it cannot export.
        raise errors.InvalidArgument(f"it gives no DLPack capsule: {type(why).__name__}: {why}") from None
    tensor = ctypes.cast(address, ctypes.POINTER(_DLTensor)).contents
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    name = _DLPACK.get((tensor.code, tensor.bits))
    if name is None or tensor.lanes != 1:
        raise errors.InvalidArgument(f"DLPack type ({tensor.code}, {tensor.bits}, {tensor.lanes}) cannot be stored")
    count = math.prod(shape)
    if tensor.strides and count > 0:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
        expected = 1
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            if size != 1 and stride != expected:
                raise errors.InvalidArgument(_not_contiguous(strides))
            expected *= size
    return Memory((tensor.data or 0) + tensor.byte_offset, count * tensor.bits // 8, name, shape, (array, capsule))


_BUFFER_KINDS = {"?": "BOOL", "e": "F", "f": "F", "d": "F", "Zf": "C", "Zd": "C", "c": "U"}
_BUFFER_KINDS |= dict.fromkeys("bhilqn", "I") | dict.fromkeys("BHILQN", "U")


def _of_buffer(array: Any, write: bool) -> Memory:
    try:
        view = memoryview(array)
    except TypeError:
        raise errors.InvalidArgument(
            f"a {type(array).__name__} is no array: expected torch, numpy, __array_interface__, DLPack or a buffer"
        ) from None
    if not view.c_contiguous:
        raise errors.InvalidArgument(_not_contiguous(view.strides or ()))
    if write and view.readonly:
        raise errors.InvalidArgument("it is read-only")
    kind = _BUFFER_KINDS.get(view.format.lstrip("@=<" if sys.byteorder == "little" else "@="))
    if kind is None:
        raise errors.InvalidArgument(f"buffer format {view.format!r} cannot be stored; expected plain numbers")
    dtype = kind if kind == "BOOL" else f"{kind}{view.itemsize * 8}"
    exported = ffi.from_buffer(array)
    address = int(ffi.cast("uintptr_t", exported)) if view.nbytes else 0
    return Memory(address, view.nbytes, dtype, tuple(view.shape or ()), (array, exported))


# struct pcc_tensor: struct_bytes, name, shape, data, bytes, dtype, rank, device, device_index
_TENSOR = struct.Struct("=QQQQQIIII")
_DATA, _DATA_AT = struct.Struct("=Q"), struct.calcsize("=QQQ")


@dataclass(frozen=True, slots=True)
class Packed:
    """A C array and what its pointers refer to."""

    array: Any
    count: int
    owners: tuple[Any, ...]
    #: CUDA devices that hold some of them
    gpus: tuple[int, ...] = ()


def pack_tensors(tensors: Mapping[str, Memory]) -> Packed:
    """``pcc_tensor[]`` of the named memories."""
    table = _Table(list(tensors))
    table.fill(list(tensors.values()))
    return table.packed(list(tensors.values()))


class Packer:
    """Packs the tensors of one save after another, of which most are where they were: those of torch that look as those
    of these names did before are not examined anew. Any thread may use it; two at once cost only speed.
    """

    def __init__(self) -> None:
        self._kept: _Table | None = None

    def pack(self, tensors: Mapping[str, Any]) -> Packed:
        """As :func:`pack_tensors` of :func:`memories_of`."""
        # Nobody else's meanwhile.
        table, self._kept = self._kept, None
        try:
            names, arrays = list(tensors.keys()), list(tensors.values())
        except (AttributeError, TypeError):
            return pack_tensors(memories_of(tensors))
        owners = table.update(arrays) if table is not None and table.names == names else None
        if table is None or owners is None:
            table = _Table(names)
            memories = [memory_of(array, name, gpu=True) for name, array in zip(names, arrays, strict=True)]
            table.fill(memories)
            table.remember(arrays)
            owners = [memory.owner for memory in memories]
        self._kept = table
        return table.packed(owners)


class _Table:
    """The ``pcc_tensor[]`` of some names, to be filled."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._texts = _Texts()
        self._name_at = [self._texts.add(name, "tensor name") for name in names]
        self._base = self._texts.address()
        self._bytes = bytearray(max(1, len(names)) * _TENSOR.size)
        self._gpus: list[int | None] = [None] * len(names)

    def fill(self, memories: list[Memory]) -> None:
        """Enters one memory for each name."""
        self._dimensions = [memory.shape for memory in memories]
        sizes = [size for shape in self._dimensions for size in shape]
        self._shapes = ffi.new("uint64_t[]", sizes or 1)
        shape = int(ffi.cast("uintptr_t", self._shapes))
        self._shape_at = []
        for at, memory in enumerate(memories):
            self._shape_at.append(shape)
            self._enter(at, memory)
            shape += 8 * len(memory.shape)

    def _enter(self, at: int, memory: Memory) -> None:
        code, rank = dtypes.CODE[memory.dtype], len(memory.shape)
        device = (lib.PCC_DEVICE_HOST, 0) if memory.gpu is None else (lib.PCC_DEVICE_CUDA, memory.gpu)
        name, shape = self._base + self._name_at[at], self._shape_at[at]
        entry = (_TENSOR.size, name, shape, memory.address, memory.nbytes, code, rank, *device)
        _TENSOR.pack_into(self._bytes, at * _TENSOR.size, *entry)
        self._gpus[at] = memory.gpu if memory.nbytes else None

    def remember(self, arrays: list[Any]) -> None:
        """Notes how arrays look; nothing is kept alive by it."""
        self._types = list(map(type, arrays))
        plain = _plain_types()
        self._plain = [at for at, kind in enumerate(self._types) if kind in plain]
        #: examined each time
        self._others = [at for at, kind in enumerate(self._types) if kind not in plain]
        self._looks = _Looks([arrays[at] for at in self._plain]) if self._plain else None

    def update(self, arrays: list[Any]) -> list[Any] | None:
        """Enters what is elsewhere than before; returns what keeps the memories alive. None where anything else is
        another than it was: then the table is of no use any more.
        """
        if list(map(type, arrays)) != self._types:
            return None
        owners = []
        if self._looks is not None:
            found = self._looks.again([arrays[at] for at in self._plain] if self._others else arrays)
            if found is None:
                return None
            storages, moved = found
            owners += storages
            for index, address in moved:
                _DATA.pack_into(self._bytes, self._plain[index] * _TENSOR.size + _DATA_AT, address)
        for at in self._others:
            memory = memory_of(arrays[at], self.names[at], gpu=True)
            if memory.shape != self._dimensions[at]:
                return None
            self._enter(at, memory)
            owners.append(memory.owner)
        return owners

    def packed(self, owners: list[Any]) -> Packed:
        """The array as it is now; ``owners`` keep alive what it points to."""
        content = bytearray(self._bytes)
        array = ffi.from_buffer("pcc_tensor[]", content)
        gpus = tuple(sorted(gpu for gpu in set(self._gpus) if gpu is not None))
        return Packed(array, len(self.names), (content, self._shapes, self._texts, owners), gpus)


def _plain_types() -> tuple[Any, ...]:
    """Types of torch's tensors that are nothing but memory."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.Tensor, torch.nn.Parameter)


_shape_of, _dtype_of, _device_of, _nbytes_of = map(operator.attrgetter, ("shape", "dtype", "device", "nbytes"))


class _Looks:
    """How plain tensors of torch that can be saved look, to see at little cost whether others look the same.

    Each thing is asked of all of them at once, without a line of Python per tensor. Nothing depends on which objects
    they are: the tensors of a ``state_dict()`` are new ones each time.
    """

    def __init__(self, tensors: list[Any]) -> None:
        torch = sys.modules["torch"]
        self._tensor, self._storage = torch.Tensor, torch.UntypedStorage
        self._shapes, self._dtypes = list(map(_shape_of, tensors)), list(map(_dtype_of, tensors))
        self._devices = list(map(_device_of, tensors))
        #: those that may be conjugates
        self._complex = [at for at, dtype in enumerate(self._dtypes) if dtype.is_complex]
        self._addresses = list(map(torch.Tensor.data_ptr, tensors))
        self._sizes = list(map(_nbytes_of, tensors))
        #: bytes that their storages must have
        offsets = map(torch.Tensor.storage_offset, tensors)
        triples = zip(offsets, self._dtypes, self._sizes, strict=True)
        self._needed = [offset * dtype.itemsize + size for offset, dtype, size in triples]

    def again(self, tensors: list[Any]) -> tuple[list[Any], list[tuple[int, int]]] | None:
        """The storages of tensors of the same types, and those that are elsewhere as indexes and addresses; None where
        any of them may be described by anything else than another address.
        """
        tensor = self._tensor
        try:
            # First, as all that has no memory of its own refuses it: sparse, nested and opaque tensors.
            storages = list(map(tensor.untyped_storage, tensors))
            same = (
                list(map(_shape_of, tensors)) == self._shapes
                and list(map(_dtype_of, tensors)) == self._dtypes
                and all(map(tensor.is_contiguous, tensors))
                and not any(map(tensor.is_neg, tensors))
                and not any([tensors[at].is_conj() for at in self._complex])
            )
            if not same:
                return None
            addresses = list(map(tensor.data_ptr, tensors))
        except (RuntimeError, NotImplementedError):
            return None
        moved = []
        if addresses != self._addresses:
            at_others = [at for at, same in enumerate(map(operator.eq, addresses, self._addresses)) if not same]
            others = [tensors[at] for at in at_others]
            # An address is of one device.
            if list(map(_device_of, others)) != [self._devices[at] for at in at_others]:
                return None
            for at, offset in zip(at_others, map(tensor.storage_offset, others), strict=True):
                self._needed[at] = offset * self._dtypes[at].itemsize + self._sizes[at]
                moved.append((at, addresses[at]))
            self._addresses = addresses
        if not all(map(operator.ge, map(self._storage.nbytes, storages), self._needed)):
            return None
        return storages, moved


def pack_pairs(metadata: Mapping[str, str] | None) -> Packed:
    """``pcc_pair[]`` of metadata."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise errors.InvalidArgument(f"metadata: expected a mapping of texts, found a {type(metadata).__name__}")
    texts = _Texts()
    at = [
        (texts.add(key, "metadata key"), texts.add(value, f"metadata value of {key!r}"))
        for key, value in (metadata or {}).items()
    ]
    base = texts.address()
    array = ffi.new("pcc_pair[]", max(1, len(at)))
    for pair, (key, value) in zip(array, at, strict=False):
        pair.key, pair.value = ffi.cast("char *", base + key), ffi.cast("char *", base + value)
    return Packed(array, len(at), (texts,))


class _Texts:
    """NUL-terminated UTF-8 texts in one buffer."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._exported: Any = None

    def add(self, text: str, what: str) -> int:
        if not isinstance(text, str):
            raise errors.InvalidArgument(f"{what}: expected str, found {type(text).__name__}")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as why:
            raise errors.InvalidArgument(f"{what} {text!r} is not valid Unicode: {why.reason}") from None
        if b"\0" in encoded:
            raise errors.InvalidArgument(f"{what} {text!r} contains a NUL character")
        at = len(self._bytes)
        self._bytes += encoded
        self._bytes.append(0)
        return at

    def address(self) -> int:
        if not self._bytes:
            self._bytes.append(0)
        self._exported = ffi.from_buffer(self._bytes)
        return int(ffi.cast("uintptr_t", self._exported))
