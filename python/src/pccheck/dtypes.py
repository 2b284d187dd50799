"""Element types: their safetensors spelling, their number in the C ABI, and what numpy and torch call them."""

from __future__ import annotations

from typing import Any

from . import errors
from ._abi import ffi, lib, string

__all__ = ["BITS", "CODE", "NAME", "from_numpy", "from_torch", "to_numpy", "to_torch"]

# As numpy, ml_dtypes and torch spell them.
_SPELLING = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
    # Dtypes of the package ml_dtypes, which JAX uses.
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_ML_DTYPES = frozenset(name for name in _SPELLING if name == "BF16" or name.startswith("F8_"))

#: safetensors name -> number in the C ABI
CODE: dict[str, int] = {}
for _code in range(1, 64):
    _text = lib.pcc_dtype_name(_code)
    if _text != ffi.NULL:
        CODE[string(_text)] = _code
#: number in the C ABI -> safetensors name
NAME: dict[int, str] = {code: name for name, code in CODE.items()}
#: safetensors name -> bits of one element
BITS: dict[str, int] = {name: int(lib.pcc_dtype_bits(code)) for name, code in CODE.items()}

_FROM_SPELLING = {spelling: name for name, spelling in _SPELLING.items()}


def from_numpy(dtype: Any) -> str:
    """The safetensors name of a numpy dtype (those of ml_dtypes included)."""
    name = _FROM_SPELLING.get(dtype.name)
    if name is None:
        raise errors.InvalidArgument(
            f"numpy dtype {dtype} cannot be stored; expected one of {', '.join(sorted(_FROM_SPELLING))}"
        )
    if not dtype.isnative:
        raise errors.InvalidArgument(f"numpy dtype {dtype} has foreign byte order; convert it to native byte order")
    return name


def to_numpy(name: str) -> Any:
    """The numpy dtype of a safetensors name; those that numpy lacks need the package ml_dtypes."""
    import numpy as np

    spelling = _SPELLING.get(name)
    if spelling is None:
        raise errors.Unsupported(f"numpy has no dtype for {name}; read the tensor's bytes instead")
    if name not in _ML_DTYPES:
        return np.dtype(spelling)
    try:
        import ml_dtypes
    except ImportError:
        raise errors.Unsupported(
            f"numpy itself has no dtype for {name}; install ml_dtypes, or read into a torch tensor"
        ) from None
    return np.dtype(getattr(ml_dtypes, spelling))


def from_torch(dtype: Any) -> str:
    """The safetensors name of a torch dtype."""
    spelling = str(dtype).removeprefix("torch.")
    name = _FROM_SPELLING.get(spelling)
    if name is None:
        raise errors.InvalidArgument(f"{dtype} cannot be stored; convert the tensor to a dtype that safetensors has")
    return name


def to_torch(name: str) -> Any:
    """The torch dtype of a safetensors name."""
    import torch

    dtype = getattr(torch, _SPELLING.get(name, ""), None)
    if dtype is None:
        raise errors.Unsupported(f"the installed torch has no dtype for {name}; read the tensor's bytes instead")
    return dtype
