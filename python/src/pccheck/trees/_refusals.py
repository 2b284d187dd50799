"""Why a value is refused, and what its owner can do about it."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import types
from typing import Any

from ._format import loaded

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.GeneratorType,
    type,
)

_BASES: tuple[type, ...] = (
    collections.OrderedDict,
    collections.Counter,
    collections.defaultdict,
    collections.deque,
    dict,
    list,
    tuple,
    set,
    frozenset,
    str,
    bytes,
    int,
    float,
    complex,
)


def type_name(value: Any) -> str:
    """The full name of a value's type, as messages show it."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def refusal(value: Any) -> str:
    """What `value`, of a type that has no encoding, is, and what to put in its place."""
    name = type_name(value)
    found = f"a value of type {name} cannot be stored"
    if isinstance(value, enum.Enum):
        return f"{found}: enum members are code; store its .name or .value"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{found}: namedtuples are code; convert it to a dict (._asdict()) or a tuple"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{found}: dataclass instances are code; convert it with dataclasses.asdict()"
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return f"{found}; convert it to a dict with vars()"
    if isinstance(value, datetime.timedelta):
        return f"{found}; store .total_seconds(), or its days, seconds and microseconds"
    if isinstance(value, (datetime.date, datetime.time)):
        return f"{found}; store .isoformat()"
    if isinstance(value, bytearray):
        return f"{found}; convert it with bytes()"
    if isinstance(value, _CODE):
        return f"{found}: code is never stored; store a name, and look the object up by it when you restore"
    return _foreign_refusal(value, found) or _general_refusal(value, found)


def _foreign_refusal(value: Any, found: str) -> str | None:
    torch, numpy = loaded("torch"), loaded("numpy")
    if torch is not None:
        if isinstance(value, torch.Tensor):
            return f"{found}: it is a subclass of torch.Tensor; store the plain tensors it is made of"
        if isinstance(value, torch.Generator):
            return f"{found}; store .get_state()"
        if isinstance(value, torch.Size):
            return f"{found}; convert it to a tuple"
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return f"{found}: it is a subclass of numpy.ndarray; convert it with numpy.array()"
        if isinstance(value, numpy.generic):
            return f"{found}: dtype {value.dtype} is not the same everywhere; convert it to a Python number"
        if isinstance(value, (numpy.random.Generator, numpy.random.BitGenerator, numpy.random.RandomState)):
            return f"{found}; store its state dict (.bit_generator.state, .state or .get_state())"
    return None


def _general_refusal(value: Any, found: str) -> str:
    for base in _BASES:
        if isinstance(value, base):
            return (
                f"{found}: it is a subclass of {base.__name__} and would not come back as one; "
                f"convert it with {base.__name__}()"
            )
    if callable(getattr(value, "state_dict", None)):
        return f"{found}; store its .state_dict()"
    if hasattr(value, "__array_interface__") or hasattr(value, "__dlpack__"):
        return f"{found}: it looks like an array; convert it with numpy.asarray(), or name it with is_tensor="
    return f"{found}; convert it to numbers, strings, lists, dicts and tensors, or leave it out"
