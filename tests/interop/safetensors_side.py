"""The other side of tests/interop.rs: reads and writes safetensors files with Python's own package.

read FILE    print what the package finds in FILE
write FILE   write a tensor of every dtype that the package can write, with metadata; print what it holds

Both print one JSON object: metadata, and per tensor its dtype, shape and bytes (hexadecimal).
"""

import json
import sys

import numpy
from safetensors import TensorSpec, deserialize, safe_open, serialize_file
from safetensors.numpy import load_file

# What the package calls its dtypes when it writes; bytes of one element.
WRITABLE = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex64": 8,
}
# What the package hands out as numpy arrays.
NUMPY = {"F64", "F32", "F16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "C64"}


def read(path):
    with open(path, "rb") as file:
        found = dict(deserialize(file.read()))
    arrays = {}
    with safe_open(path, framework="numpy") as opened:
        metadata = opened.metadata() or {}
        assert set(opened.keys()) == set(found)
        for name in opened.keys():
            piece = opened.get_slice(name)
            assert piece.get_dtype() == found[name]["dtype"], name
            assert list(piece.get_shape()) == list(found[name]["shape"]), name
            if found[name]["dtype"] in NUMPY:
                arrays[name] = opened.get_tensor(name)
    for name, array in arrays.items():
        assert array.tobytes() == bytes(found[name]["data"]), name
        assert list(array.shape) == list(found[name]["shape"]), name
    if len(arrays) == len(found):
        loaded = load_file(path)
        assert all(loaded[name].tobytes() == array.tobytes() for name, array in arrays.items())
    tensors = {
        name: {"dtype": tensor["dtype"], "shape": list(tensor["shape"]), "hex": bytes(tensor["data"]).hex()}
        for name, tensor in found.items()
    }
    return {"metadata": metadata, "tensors": tensors, "arrays": len(arrays)}


def write(path):
    random = numpy.random.default_rng(20250101)
    shapes = {"scalar": (), "empty": (0, 5), "vector": (13,), "cube": (2, 3, 4)}
    specs, keep = {}, []
    for dtype, size in WRITABLE.items():
        for kind, shape in shapes.items():
            if dtype == "float4_e2m1fn_x2" and shape == ():
                continue  # Pairs: half of one has no whole byte.
            count = int(numpy.prod(shape, dtype=numpy.int64))
            data = random.integers(0, 2 if dtype == "bool" else 256, max(count, 1) * size, dtype=numpy.uint8)
            keep.append(data)
            specs[f"{dtype}/{kind} \u00e9\"\\"] = TensorSpec(
                dtype=dtype, shape=shape, data_ptr=data.ctypes.data, data_len=count * size
            )
    serialize_file(specs, path, metadata={"format": "np", "note": "\u00fcber \"all\"\n\\"})
    return read(path)


if __name__ == "__main__":
    json.dump({"read": read, "write": write}[sys.argv[1]](sys.argv[2]), sys.stdout)
