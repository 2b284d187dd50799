"""The writer: from a tree to JSON values and named tensors, by one table from exact type to encoding."""

from __future__ import annotations

import json
import math
import pathlib
import struct
from binascii import b2a_base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from pccheck.errors import UnsupportedValue

from ._format import (
    DEPTH_LIMIT,
    FACTORIES,
    NUMPY_SCALAR,
    PATHS,
    ROOT_MEMBER,
    TAG,
    VERSION,
    VERSION_MEMBER,
    loaded,
    show_path,
    shown_value,
)
from ._names import Names
from ._refusals import refusal

_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}
_PATH_NAMES = {cls: name for name, cls in PATHS.items()}

Json = Any


def _dump(value: Json) -> str:
    # No cycle can be left, and no NaN: both were looked at on the way here.
    return json.dumps(value, ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))


class Encoder:
    """Writes one tree."""

    def __init__(self, is_tensor: Callable[[Any], bool] | None, prefix: str) -> None:
        self.tensors: dict[str, Any] = {}
        self._is_tensor = is_tensor
        self._prefix = prefix
        self._path: list[Any] = []
        self._open: set[int] = set()  # the containers around the value at hand, by id
        self._hashing = 0  # how many keys and sets the value at hand is in
        self._table = _table()
        self._str(prefix)
        self._names = Names(prefix)

    def text(self, tree: Any) -> str:
        """The JSON text of `tree`; its tensors are in `self.tensors` afterwards."""
        return _dump({VERSION_MEMBER: VERSION, ROOT_MEMBER: self._value(tree)})

    def _value(self, value: Any) -> Json:
        return self._table.get(type(value), Encoder._unknown)(self, value)

    def _refuse(self, message: str) -> NoReturn:
        place = show_path(self._prefix, self._path)
        within = "in a key or a set there, " if self._hashing else ""
        raise UnsupportedValue(f"{within}{message}", at=place)

    # Scalars

    def _itself(self, value: Any) -> Json:
        return value

    def _int(self, value: int) -> Json:
        return value if _INT_MIN <= value <= _INT_MAX else {TAG: "int", "v": hex(value)}

    def _float(self, value: float) -> Json:
        return value if math.isfinite(value) else {TAG: "float", "v": struct.pack(">d", value).hex()}

    def _complex(self, value: complex) -> Json:
        return {TAG: "complex", "v": [self._float(value.real), self._float(value.imag)]}

    def _str(self, value: str) -> str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                self._refuse(
                    "a string with a lone surrogate cannot be stored, as it is not valid Unicode; "
                    "store its bytes: .encode('utf-8', 'surrogatepass')"
                )
        return value

    def _bytes(self, value: bytes) -> Json:
        return {TAG: "bytes", "v": b2a_base64(value, newline=False).decode()}

    def _pure_path(self, value: pathlib.PurePath) -> Json:
        return {TAG: "path", "class": _PATH_NAMES[type(value)], "v": self._str(str(value))}

    # Containers

    def _enter(self, value: Any) -> None:
        if id(value) in self._open:
            self._refuse("this container contains itself; a tree must not refer back to what it is part of")
        if len(self._open) >= DEPTH_LIMIT:
            self._refuse(f"more than {DEPTH_LIMIT} containers are inside each other; flatten the nesting")
        self._open.add(id(value))

    def _leave(self, value: Any) -> None:
        self._open.remove(id(value))

    def _elements(self, value: Iterable[Any]) -> list[Json]:
        self._enter(value)
        path, encoding = self._path, self._table.get
        elements = []
        for index, element in enumerate(value):
            path.append(index)
            elements.append(encoding(type(element), Encoder._unknown)(self, element))
            path.pop()
        self._leave(value)
        return elements

    def _hashables(self, value: Iterable[Any]) -> list[Json]:
        self._hashing += 1
        elements = [self._value(element) for element in value]
        self._hashing -= 1
        return elements

    def _list(self, value: list[Any]) -> Json:
        return self._elements(value)

    def _tuple(self, value: tuple[Any, ...]) -> Json:
        return {TAG: "tuple", "v": self._elements(value)}

    def _deque(self, value: deque[Any]) -> Json:
        return {TAG: "deque", "maxlen": value.maxlen, "v": self._elements(value)}

    def _set(self, value: set[Any] | frozenset[Any]) -> Json:
        self._enter(value)
        elements = self._hashables(value)
        self._leave(value)
        elements.sort(key=_dump)  # equal sets give equal texts
        return {TAG: type(value).__name__, "v": elements}

    def _mapping(self, value: dict[Any, Any]) -> dict[str, Json]:
        """The two forms of a mapping's contents: a JSON object for string keys, two lists for others."""
        self._enter(value)
        path, encoding = self._path, self._table.get
        body: dict[str, Json]
        if {str}.issuperset(map(type, value)):
            members = {}
            for key, element in value.items():
                if not key.isascii():
                    self._hashables((key,))
                path.append(key)
                members[key] = encoding(type(element), Encoder._unknown)(self, element)
                path.pop()
            body = {"of": members}
        else:
            body = {"k": self._hashables(value), "v": []}
            for key, element in value.items():
                path.append(key)
                body["v"].append(self._value(element))
                path.pop()
        self._leave(value)
        return body

    def _dict(self, value: dict[Any, Any]) -> Json:
        body = self._mapping(value)
        members = body.get("of")
        return {TAG: "dict", **body} if members is None or TAG in members else members

    def _attributes(self, value: Any, known: set[str]) -> dict[str, Any]:
        attributes: dict[str, Any] = vars(value)
        unknown = attributes.keys() - known
        if unknown:
            self._refuse(
                f"the attributes {sorted(unknown)} of this {type(value).__name__} cannot be stored; "
                "delete them, or store their values as entries"
            )
        return attributes

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> Json:
        encoded = {TAG: "OrderedDict", **self._mapping(value)}
        # The state dicts of torch's modules carry their version numbers in this attribute.
        attributes = self._attributes(value, {"_metadata"})
        if attributes:
            self._enter(attributes)
            self._path.append("_metadata")
            encoded["_metadata"] = self._value(attributes["_metadata"])
            self._path.pop()
            self._leave(attributes)
        return encoded

    def _counter(self, value: Counter[Any]) -> Json:
        self._attributes(value, set())
        return {TAG: "Counter", **self._mapping(value)}

    def _defaultdict(self, value: defaultdict[Any, Any]) -> Json:
        factory = value.default_factory
        if factory is not None and not (isinstance(factory, type) and factory in _FACTORY_NAMES):
            self._refuse(
                f"a defaultdict can be stored with the factory None, {', '.join(FACTORIES)}, "
                f"not with {shown_value(factory)}; convert it with dict()"
            )
        name = None if factory is None else _FACTORY_NAMES[factory]
        return {TAG: "defaultdict", "factory": name, **self._mapping(value)}

    # Tensors, and other packages' values

    def _leaf(self, value: Any, kind: str) -> Json:
        if self._hashing:
            self._refuse("a tensor as a key or in a set cannot be stored; use a number or a name for it")
        name = self._names.name(self._path)
        self.tensors[name] = value
        return {TAG: "tensor", "kind": kind, "name": name}

    def _torch_tensor(self, value: Any) -> Json:
        return self._leaf(value, "torch")

    def _parameter(self, value: Any) -> Json:
        return self._leaf(value, "parameter")

    def _numpy_array(self, value: Any) -> Json:
        dtype = value.dtype
        numbers = dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)
        # Kind V is also what extensions such as ml_dtypes give their number types.
        if not numbers and not (dtype.kind == "V" and dtype.type is not loaded("numpy").void):
            self._refuse(
                f"a numpy array of dtype {dtype} cannot be stored; convert it to an array of numbers, "
                "or to a list with .tolist()"
            )
        return self._leaf(value, "numpy")

    def _numpy_scalar(self, value: Any) -> Json:
        numpy = loaded("numpy")
        code = value.dtype.newbyteorder("<").str
        if not NUMPY_SCALAR.fullmatch(code):
            self._refuse(refusal(value))
        return {TAG: "numpy", "dtype": code, "v": numpy.asarray(value).astype(code).tobytes().hex()}

    def _numpy_str(self, value: str) -> Json:
        # str(value) would drop NULs at the end.
        return {TAG: "numpy.str", "v": self._str(str.__str__(value))}

    def _numpy_bytes(self, value: bytes) -> Json:
        return {TAG: "numpy.bytes", "v": b2a_base64(value, newline=False).decode()}

    def _torch_size(self, value: Any) -> Json:
        return {TAG: "torch.Size", "v": list(value)}

    def _torch_dtype(self, value: Any) -> Json:
        return {TAG: "torch.dtype", "v": str(value).removeprefix("torch.")}

    def _torch_device(self, value: Any) -> Json:
        return {TAG: "torch.device", "v": str(value)}

    def _unknown(self, value: Any) -> Json:
        if self._is_tensor is None or not self._is_tensor(value):
            self._refuse(refusal(value))
        torch, numpy = loaded("torch"), loaded("numpy")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._leaf(value, "parameter" if isinstance(value, torch.nn.Parameter) else "torch")
        is_numpy = numpy is not None and isinstance(value, numpy.ndarray)
        return self._leaf(value, "numpy" if is_numpy else "array")


_Table = dict[type, Callable[[Encoder, Any], Json]]

_BUILTIN: _Table = {
    type(None): Encoder._itself,
    bool: Encoder._itself,
    int: Encoder._int,
    float: Encoder._float,
    complex: Encoder._complex,
    str: Encoder._str,
    bytes: Encoder._bytes,
    list: Encoder._list,
    tuple: Encoder._tuple,
    dict: Encoder._dict,
    OrderedDict: Encoder._ordered_dict,
    Counter: Encoder._counter,
    defaultdict: Encoder._defaultdict,
    deque: Encoder._deque,
    set: Encoder._set,
    frozenset: Encoder._set,
    **dict.fromkeys(PATHS.values(), Encoder._pure_path),
}

_tables: dict[tuple[bool, bool], _Table] = {}


def _table() -> _Table:
    """The encoding of each type, with those of numpy and torch where they are loaded."""
    numpy, torch = loaded("numpy"), loaded("torch")
    key = (numpy is not None, torch is not None)
    if key not in _tables:
        table = dict(_BUILTIN)
        if numpy is not None:
            table.update(dict.fromkeys(numpy.sctypeDict.values(), Encoder._numpy_scalar))
            table[numpy.str_] = Encoder._numpy_str
            table[numpy.bytes_] = Encoder._numpy_bytes
            table[numpy.ndarray] = Encoder._numpy_array
        if torch is not None:
            table[torch.Tensor] = Encoder._torch_tensor
            table[torch.nn.Parameter] = Encoder._parameter
            table[torch.Size] = Encoder._torch_size
            table[torch.dtype] = Encoder._torch_dtype
            table[torch.device] = Encoder._torch_device
        _tables[key] = table
    return _tables[key]
