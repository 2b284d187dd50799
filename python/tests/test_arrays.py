"""Prevents: an array whose memory is misread (strides, byte order, laziness, masks), or refused though it is plain.

Every kind of array that is accepted goes through a real save and comes back byte for byte.
"""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OpenStore, RunPython

import pccheck
from pccheck import dtypes, errors

NUMPY_DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
ML_DTYPES = [
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
]


def round_trip(store: pccheck.Store, value: Any) -> tuple[Any, pccheck.TensorInfo]:
    """The bytes of a value after a save, and what the checkpoint says of it."""
    store.save(1, {"x": value}).durable(30)
    with store.open() as checkpoint:
        info = checkpoint.tensors["x"]
        back = bytearray(info.nbytes)
        checkpoint.read_bytes("x", 0, back)
        return bytes(back), info


def refused(store: pccheck.Store, value: Any, text: str, kind: type[errors.PccheckError]) -> None:
    with pytest.raises(kind, match=text) as why:
        store.save(1, {"the name": value})
    assert "'the name'" in str(why.value)
    assert store.stats().saves_begun == 0


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_dtypes(store: pccheck.Store, name: str) -> None:
    value = np.random.default_rng(1).integers(0, 2, (3, 5)).astype(name)
    back, info = round_trip(store, value)
    assert back == value.tobytes() and info.shape == (3, 5)
    assert dtypes.to_numpy(info.dtype) == value.dtype
    with store.open() as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"], value)
        assert checkpoint["x"].dtype == value.dtype


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes(store: pccheck.Store, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    value = np.array([[0.5, 1, 2], [4, 8, 16]]).astype(getattr(ml_dtypes, name))
    back, info = round_trip(store, value)
    assert back == value.tobytes() and dtypes.to_numpy(info.dtype) == value.dtype
    with store.open() as checkpoint:
        assert checkpoint["x"].dtype == value.dtype and checkpoint["x"].tobytes() == value.tobytes()


@pytest.mark.parametrize("name", [*NUMPY_DTYPES, *ML_DTYPES])
def test_torch_dtypes(store: pccheck.Store, name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    value = torch.tensor([[0, 1], [1, 1]], dtype=torch.float32).to(dtype)
    back, info = round_trip(store, value)
    assert dtypes.to_torch(info.dtype) == dtype and info.shape == (2, 2)
    assert back == bytes(value.view(torch.uint8).numpy().tobytes())
    target = torch.zeros((2, 2), dtype=torch.float32).to(dtype)
    store.restore({"x": target}).close()
    assert torch.equal(target.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("name", [*NUMPY_DTYPES, *ML_DTYPES])
def test_jax_dtypes(store: pccheck.Store, name: str) -> None:
    jax = pytest.importorskip("jax")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with jax.enable_x64(True):
        plain = np.array([[0, 1], [1, 2]]).astype(getattr(ml_dtypes, name, None) or name)
        value = jax.numpy.asarray(plain)
        assert value.dtype == plain.dtype
        back, info = round_trip(store, value)
    assert back == plain.tobytes() and info.shape == (2, 2) and dtypes.to_numpy(info.dtype) == plain.dtype


def test_jax_arrays_are_saved_once_they_are_computed(store: pccheck.Store) -> None:
    jax = pytest.importorskip("jax")

    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: y @ x / 300.0 + 1.0, x))
    x = jax.numpy.ones((300, 300), "float32")
    slow(x).block_until_ready()
    # The result is promised, not computed, when it is handed over.
    back, _ = round_trip(store, slow(x))
    assert back == np.asarray(slow(x)).tobytes()


def test_jax_arrays_cannot_be_restored_into(store: pccheck.Store) -> None:
    jax = pytest.importorskip("jax")
    value = jax.numpy.ones(3)
    store.save(1, {"x": value}).durable(30)
    with pytest.raises(errors.InvalidArgument, match="'x'.*immutable"):
        store.restore({"x": value})


def test_a_deleted_jax_array_is_refused(store: pccheck.Store) -> None:
    jax = pytest.importorskip("jax")
    value = jax.numpy.ones(3)
    value.delete()
    refused(store, value, "no DLPack capsule", errors.InvalidArgument)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (2, 1, 3), (1,) * 20])
def test_shapes(store: pccheck.Store, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    value = np.arange(int(np.prod(shape)), dtype="float32").reshape(shape)
    for kind in (value, torch.from_numpy(value), jax.numpy.asarray(value)):
        back, info = round_trip(store, kind)
        assert (back, info.shape, info.dtype) == (value.tobytes(), shape, "F32")
        target = np.full(shape, -1, "float32")
        store.restore({"x": target}).close()
        np.testing.assert_array_equal(target, value)


def test_non_contiguous_memory_is_refused(store: pccheck.Store) -> None:
    torch = pytest.importorskip("torch")
    base = np.arange(24, dtype="int32").reshape(4, 6)
    plain = torch.arange(24).reshape(4, 6)
    for value in (base.T, base[:, ::2], base[::-1], np.broadcast_to(base[0], (4, 6)), np.asfortranarray(base)):
        refused(store, value, "strides", errors.InvalidArgument)
    view: Any = memoryview
    refused(store, view(base)[::2], "strides", errors.InvalidArgument)
    for tensor in (plain.T, plain[:, ::2], plain[:1].expand(4, 6)):
        refused(store, tensor, "strides", errors.InvalidArgument)
    # Views that are contiguous are plain memory.
    assert round_trip(store, base[1:3])[0] == base[1:3].tobytes()
    assert round_trip(store, plain[2])[0] == plain[2].numpy().tobytes()


class Exporter:
    """An object of a library that numpy does not know, with one protocol only."""

    def __init__(self, **protocol: Any) -> None:
        self.__dict__ |= protocol


def test_foreign_numpy_values_are_refused(store: pccheck.Store) -> None:
    pair = np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])
    for value in (
        *(np.arange(3, dtype=">f4"), np.arange(3, dtype=">i8"), pair, pair.view(np.recarray)),
        *(np.array(["a"]), np.array([b"a"]), np.array([object()]), np.zeros(2, "datetime64[s]")),
        *(np.zeros(2, "timedelta64[s]"), np.zeros(2, "V4"), np.longdouble(1), np.zeros(2, "longdouble")),
    ):
        refused(store, value, "numpy dtype", errors.InvalidArgument)
    refused(store, np.ma.masked_array([1.0, 2.0], [True, False]), "mask", errors.InvalidArgument)
    # One field of a structured array has strides.
    refused(store, pair["a"], "strides", errors.InvalidArgument)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    refused(store, np.zeros(2, ml_dtypes.int4), "int4", errors.InvalidArgument)


def test_what_is_no_array_is_refused(store: pccheck.Store) -> None:
    for value in (1, 1.5, None, "text", [1.0], (1,), {"a": 1}, object(), (i for i in range(3)), int):
        refused(store, value, "is no array", errors.InvalidArgument)
    for tensors in ([("a", np.zeros(1))], (i for i in range(3)), None, 5, np.zeros(3)):
        with pytest.raises(errors.InvalidArgument, match="mapping"):
            store.save(1, tensors)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgument, match="mapping"):
            store.restore(tensors)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgument, match="mapping"):
            pccheck.payload_bytes(tensors)  # type: ignore[arg-type]


def test_numpy_scalars_are_saved_but_not_restored_into(store: pccheck.Store) -> None:
    for scalar in (np.float32(1.5), np.bool_(True), np.int64(-3), np.complex128(1j)):
        back, info = round_trip(store, scalar)
        assert back == scalar.tobytes() and info.shape == ()
        with pytest.raises(errors.InvalidArgument, match="scalar, which is immutable"):
            store.restore({"x": scalar})


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_numpy_subclasses_are_plain_memory(store: pccheck.Store, tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "m", dtype="int16", mode="w+", shape=(10,))
    mapped[:] = np.arange(10)
    assert round_trip(store, mapped)[0] == np.arange(10, dtype="int16").tobytes()
    assert round_trip(store, np.asmatrix(np.eye(3)))[1].shape == (3, 3)


def test_buffers(store: pccheck.Store) -> None:
    value: Any
    shared = mmap.mmap(-1, 4096)
    shared[:3] = b"abc"
    rows: Any = (ctypes.c_int32 * 3 * 2)()
    rows[1][2] = 6
    for value, dtype, shape in (
        (b"bytes", "U8", (5,)),
        (b"", "U8", (0,)),
        (bytearray(b"xyz"), "U8", (3,)),
        (shared, "U8", (4096,)),
        (array.array("d", [1, 2]), "F64", (2,)),
        (array.array("l", [1, 2]), f"I{8 * array.array('l').itemsize}", (2,)),
        (memoryview(bytes(range(24))).cast("f", (2, 3)), "F32", (2, 3)),
        (memoryview(b"a").cast("?"), "BOOL", (1,)),
        (memoryview(b"abcd").cast("c"), "U8", (4,)),
        (rows, "I32", (2, 3)),
        (ctypes.c_double(2.5), "F64", ()),
        (ctypes.c_bool(True), "BOOL", ()),
        ((ctypes.c_long * 2)(7, 8), f"I{8 * ctypes.sizeof(ctypes.c_long)}", (2,)),
    ):
        back, info = round_trip(store, value)
        assert (info.dtype, info.shape) == (dtype, shape)
        assert back == bytes(memoryview(value).cast("B") if shape else memoryview(value).tobytes())
        if memoryview(value).readonly:
            with pytest.raises(errors.InvalidArgument, match="read-only"):
                store.restore({"x": value})
        else:
            store.restore({"x": value}).close()
    assert rows[1][2] == 6

    class Pair(ctypes.Structure):
        _fields_ = [("a", ctypes.c_int32), ("b", ctypes.c_float)]

    for value in (Pair(1, 2), (ctypes.c_void_p * 2)(), ctypes.c_int32.__ctype_be__(1), array.array("u", "ab")):
        with pytest.raises(errors.InvalidArgument, match="format"):
            store.save(1, {"x": value})


def test_a_buffer_cannot_go_while_it_is_saved(store: pccheck.Store) -> None:
    shared, growing = mmap.mmap(-1, 4096), bytearray(4096)
    save = store.save(1, {"a": shared, "b": growing}, confirm=True)
    # Until somebody has learnt that it is copied.
    with pytest.raises(BufferError):
        shared.close()
    with pytest.raises(BufferError):
        growing.append(1)
    save.copied(30)
    shared.close()
    growing.append(1)


def test_readonly_arrays_are_saved_but_not_restored_into(store: pccheck.Store) -> None:
    value = np.arange(4.0)
    value.flags.writeable = False
    assert round_trip(store, value)[0] == value.tobytes()
    with pytest.raises(errors.InvalidArgument, match="'x'.*read-only"):
        store.restore({"x": value})
    with store.open() as checkpoint, pytest.raises(errors.InvalidArgument, match="read-only"):
        checkpoint.read_payload(0, b"1234")


def test_array_interface(store: pccheck.Store) -> None:
    base = np.arange(6, dtype="int32").reshape(2, 3)
    value = Exporter(__array_interface__=base.__array_interface__, base=base)
    back, info = round_trip(store, value)
    assert (back, info.shape, info.dtype) == (base.tobytes(), (2, 3), "I32")
    base[:] = 0
    store.restore({"x": value}).close()
    assert base[1, 2] == 5

    class Ambiguous(ctypes.c_int32 * 6):  # type: ignore[misc]
        """Its buffer, which numpy prefers, is other memory than its interface names."""

        __array_interface__ = base.__array_interface__

    with pytest.raises(errors.InvalidArgument, match="copy"):
        store.restore({"x": Ambiguous()})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_without_plain_memory_are_refused(store: pccheck.Store) -> None:
    torch = pytest.importorskip("torch")
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    for tensor, text, kind in memoryless(torch):
        refused(store, tensor, text, kind)
    with fake.FakeTensorMode() as mode:
        refused(store, mode.from_tensor(torch.ones(3)), "no plain memory", errors.InvalidArgument)


def memoryless(torch: Any) -> list[tuple[Any, str, type[errors.PccheckError]]]:
    dense = torch.eye(3)
    freed, cut = torch.ones(64), torch.ones(64)
    freed.untyped_storage().resize_(0)
    cut.untyped_storage().resize_(128)
    return [
        (torch.ones(3, device="meta"), "meta", errors.Unsupported),
        (dense.to_sparse(), "layout", errors.InvalidArgument),
        (dense.to_sparse_csr(), "layout", errors.InvalidArgument),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "no plain memory", errors.InvalidArgument),
        (torch.ones(2, dtype=torch.complex64).conj(), "lazy", errors.InvalidArgument),
        (torch._neg_view(dense), "lazy", errors.InvalidArgument),
        (torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8), "dtype|quint8", errors.InvalidArgument),
        (torch.ones(2, dtype=torch.complex32), "complex32", errors.InvalidArgument),
        (freed, "storage holds 0 bytes", errors.InvalidArgument),
        (cut, "storage holds 128 bytes", errors.InvalidArgument),
    ]


def test_torch_tensors_with_plain_memory(store: pccheck.Store) -> None:
    torch = pytest.importorskip("torch")

    class Named(torch.Tensor):  # type: ignore[misc,name-defined]
        pass

    grad = torch.arange(6.0, requires_grad=True)
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    with torch.inference_mode():
        inferred = torch.arange(6.0)
    resolved = torch.ones(2, dtype=torch.complex64).conj().resolve_conj()
    graph = grad * 2
    for tensor in (grad, parameter, graph, inferred, resolved, torch.arange(6.0).as_subclass(Named), torch.empty(0, 3)):
        back, info = round_trip(store, tensor)
        assert back == tensor.detach().numpy().tobytes() and info.shape == tuple(tensor.shape)
    store.save(2, {"p": parameter, "g": grad}).durable(30)
    target = torch.nn.Parameter(torch.zeros(2, 3))
    store.restore({"p": target}).close()
    assert torch.equal(target, parameter)


def test_memory_of_a_tensor_that_gets_other_data_stays_until_it_is_copied(store: pccheck.Store) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(1000)
    storage = tensor.untyped_storage()._weak_ref()
    save = store.save(1, {"x": tensor}, confirm=True)
    tensor.data = torch.zeros(5)
    assert not torch.UntypedStorage._expired(storage)
    save.copied(30)
    assert torch.UntypedStorage._expired(storage)


def test_overlapping_arrays(store: pccheck.Store) -> None:
    base = np.arange(10, dtype="uint8")
    store.save(1, {"all": base, "head": base[:5], "tail": base[3:]}).durable(30)
    with store.open() as checkpoint:
        assert checkpoint["tail"].tolist() == list(range(3, 10))
    with pytest.raises(errors.InvalidArgument, match="overlap"):
        store.restore({"all": base, "head": base[:5]})
    assert base.tolist() == list(range(10))


def dlpack(shape: list[int], strides: list[int] | None, **changes: Any) -> Any:
    """A DLPack exporter of 24 bytes with a capsule of our own, that counts how often it was freed."""
    from pccheck.arrays import _DLTensor

    data = ctypes.create_string_buffer(bytes(range(24)), 24)
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    steps = (ctypes.c_int64 * max(1, len(shape)))(*(strides or []))
    fields: dict[str, Any] = {
        "code": 2,
        "bits": 32,
        "lanes": 1,
        "byte_offset": 0,
        "device_type": 1,
        "name": b"dltensor",
    } | changes
    tensor = _DLTensor(
        data=ctypes.addressof(data),
        device_type=fields["device_type"],
        ndim=len(shape),
        code=fields["code"],
        bits=fields["bits"],
        lanes=fields["lanes"],
        shape=sizes,
        strides=steps if strides is not None else None,
        byte_offset=fields["byte_offset"],
    )
    destructor_of = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    freed: list[int] = []
    destructor = destructor_of(lambda _capsule: freed.append(1))
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, destructor_of)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    made = Exporter(freed=freed, memory=(data, sizes, steps, tensor, destructor, fields))

    class Exporting(Exporter):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (fields["device_type"], 0)

        def __dlpack__(self) -> Any:
            return new(ctypes.addressof(tensor), fields["name"], destructor)

    return Exporting(**made.__dict__)


def test_dlpack_capsules_live_until_the_save_is_copied(store: pccheck.Store) -> None:
    value = dlpack([2, 3], None)
    save = store.save(1, {"x": value}, confirm=True)
    assert value.freed == []
    save.copied(30)
    assert value.freed == [1]
    save.confirm()
    save.durable(30)
    back, info = round_trip(store, dlpack([2, 3], [3, 1]))
    assert (back, info.dtype, info.shape) == (bytes(range(24)), "F32", (2, 3))
    assert round_trip(store, dlpack([1, 5], [77, 1], byte_offset=4))[0] == bytes(range(4, 24))
    assert round_trip(store, dlpack([], None))[0] == bytes(range(4))
    assert round_trip(store, dlpack([0, 3], [9, 9]))[1].shape == (0, 3)


def test_dlpack_that_is_refused_is_freed(store: pccheck.Store) -> None:
    for value, text, kind in (
        (dlpack([2, 3], [1, 2]), "strides", errors.InvalidArgument),
        (dlpack([6], None, lanes=4), "cannot be stored", errors.InvalidArgument),
        (dlpack([6], None, code=3, bits=64), "cannot be stored", errors.InvalidArgument),
        (dlpack([6], None, code=0, bits=4), "cannot be stored", errors.InvalidArgument),
        (dlpack([6], None, name=b"used_dltensor"), "no DLPack capsule", errors.InvalidArgument),
    ):
        refused(store, value, text, kind)
        # The exception's frames held it.
        gc.collect()
        assert value.freed == [1]
    on_gpu = dlpack([6], None, device_type=2)
    refused(store, on_gpu, "device", errors.Unsupported)
    assert on_gpu.freed == []
    refused(store, Exporter(__dlpack__=None), "no DLPack capsule", errors.InvalidArgument)


def test_numpy_and_torch_are_not_imported_for_buffers(run_python: RunPython, tmp_path: Path) -> None:
    program = """
import sys, pccheck
path, state = sys.argv[1], {"x": bytearray(b"abc")}
pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
with pccheck.Store(path, staging_bytes=16 << 20, chunk_bytes=1 << 20) as store:
    store.save(1, state).durable()
    state["x"][:] = b"..."
    store.restore(state).close()
assert state["x"] == b"abc"
print(sorted({"numpy", "torch", "jax"} & set(sys.modules)))
"""
    assert run_python(program, tmp_path / "region").strip() == "[]"


def test_many_small_tensors(open_store: OpenStore) -> None:
    tensors = {f"layer.{i}.weight": np.full(3, i, "int32") for i in range(5000)}
    store = open_store()
    store.save(1, tensors).durable(60)
    targets = {name: np.zeros(3, "int32") for name in tensors}
    store.restore(targets).close()
    assert all((targets[name] == tensors[name]).all() for name in tensors)


def test_file_descriptors_of_mapped_arrays_may_close(store: pccheck.Store, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(8192))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert round_trip(store, mapped)[0] == path.read_bytes()
