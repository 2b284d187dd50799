"""The reader: from JSON text and a source of tensors to a tree. It trusts nothing that it reads."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import struct
from base64 import b64decode
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NoReturn

from pccheck.errors import Corrupt, UnsupportedValue

from ._format import (
    DEPTH_LIMIT,
    FACTORIES,
    KINDS,
    NUMPY_SCALAR,
    PATHS,
    ROOT_MEMBER,
    TAG,
    VERSION,
    VERSION_MEMBER,
    loaded,
    show_path,
)

# A container takes two levels of JSON at most; the text's outermost object and a tagged scalar take the rest.
_NESTING_LIMIT = 2 * DEPTH_LIMIT + 4

_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_HEX_BYTES = re.compile(r"([0-9a-f]{2})*")
_DEVICE = re.compile(r"[a-z][a-z0-9_]*(:[0-9]{1,3})?")
_SURROGATE_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")

_ESCAPES = re.compile(rb"\\.", re.DOTALL)
_STRINGS = re.compile(rb'"[^"]*"')
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord('"'): 0}


def _nesting(text: bytes) -> int:
    """How deep brackets are inside each other. JSON readers recurse, so it is looked at before one runs."""
    if b"\\" in text:
        text = _ESCAPES.sub(b"", text)
    structure = _STRINGS.sub(b"", text.translate(None, _NOT_STRUCTURE))
    return max(accumulate(map(_STEP.__getitem__, structure)), default=0)


def _damaged(reason: str) -> Corrupt:
    return Corrupt(f"the state's tree is damaged: {reason}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _damaged("a JSON object has two members of one name")
    return members


def _constant(token: str) -> NoReturn:
    raise _damaged(f"{token} is not JSON")


class Decoder:
    """Reads one tree."""

    def __init__(self, tensors: Callable[[str, str], Any]) -> None:
        self._tensors = tensors
        self._path: list[Any] = []
        self._depth = 0
        self._hashing = 0  # how many keys and sets the value at hand is in
        self._names: set[str] = set()

    def tree(self, text: str) -> Any:
        """The tree that `text` describes."""
        top = _parsed(text)
        if type(top) is not dict or VERSION_MEMBER not in top:
            raise _damaged(f"expected a JSON object with a member {VERSION_MEMBER!r}")
        version = top[VERSION_MEMBER]
        if type(version) is not int or version != VERSION:
            raise Corrupt(
                f"the state's tree has version {version!r:.40}, this pccheck reads version {VERSION}; "
                "if a newer pccheck wrote it, upgrade"
            )
        if top.keys() != {VERSION_MEMBER, ROOT_MEMBER}:
            raise _damaged(f"expected the members {VERSION_MEMBER!r} and {ROOT_MEMBER!r}")
        return self._value(top[ROOT_MEMBER])

    def _refuse(self, message: str) -> NoReturn:
        raise Corrupt(f"the state's tree is damaged at {show_path('', self._path)}: {message}")

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind is dict:
            return self._tagged(value) if TAG in value else self._members(value)
        if kind is list:
            return self._elements(value)
        if kind is float and not math.isfinite(value):
            self._refuse("a number is out of range")
        return value

    def _tagged(self, value: dict[str, Any]) -> Any:
        tag = value[TAG]
        known = _TAGS.get(tag) if type(tag) is str else None
        if known is None:
            self._refuse(f"unknown tag {tag!r:.40}; if a newer pccheck wrote it, upgrade")
        shapes, decode = known
        if value.keys() not in shapes:
            self._refuse(f"wrong members for the tag {tag!r}")
        return decode(self, value)

    # Scalars

    def _text(self, value: Any) -> str:
        if type(value) is not str:
            self._refuse(f"expected a string, found {value!r:.40}")
        return value

    def _hex_bytes(self, value: Any, length: int) -> bytes:
        text = self._text(value)
        if len(text) != 2 * length or not _HEX_BYTES.fullmatch(text):
            self._refuse(f"expected {length} bytes in hexadecimal digits, found {text!r:.40}")
        return bytes.fromhex(text)

    def _base64(self, value: Any) -> bytes:
        try:
            return b64decode(self._text(value), validate=True)
        except ValueError:
            self._refuse("expected base64")

    def _int(self, value: dict[str, Any]) -> int:
        text = self._text(value["v"])
        if not _HEX_INT.fullmatch(text):
            self._refuse(f"expected an integer in hexadecimal digits, found {text!r:.40}")
        return int(text, 16)

    def _float(self, value: dict[str, Any]) -> float:
        number: float = struct.unpack(">d", self._hex_bytes(value["v"], 8))[0]
        return number

    def _complex(self, value: dict[str, Any]) -> complex:
        parts = value["v"]
        if type(parts) is not list or len(parts) != 2:
            self._refuse("expected a real and an imaginary part")
        real, imaginary = map(self._value, parts)
        if type(real) is not float or type(imaginary) is not float:
            self._refuse("expected two floats")
        return complex(real, imaginary)

    def _bytes(self, value: dict[str, Any]) -> bytes:
        return self._base64(value["v"])

    def _pure_path(self, value: dict[str, Any]) -> pathlib.PurePath:
        name = self._text(value["class"])
        if name not in PATHS:
            self._refuse(f"unknown class of path {name!r:.40}")
        if name == ("PosixPath" if os.name == "nt" else "WindowsPath"):
            name = f"Pure{name}"  # paths of the other system exist here, but files at them do not
        return PATHS[name](self._text(value["v"]))

    # Containers

    def _enter(self, value: Any, kind: type) -> None:
        if type(value) is not kind:
            self._refuse(f"expected a JSON {'array' if kind is list else 'object'}, found {value!r:.40}")
        self._deeper()

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            self._refuse(f"more than {DEPTH_LIMIT} containers are inside each other")

    def _elements(self, value: Any) -> list[Any]:
        self._enter(value, list)
        path = self._path
        elements = []
        for index, element in enumerate(value):
            path.append(index)
            elements.append(self._value(element))
            path.pop()
        self._depth -= 1
        return elements

    def _members(self, value: Any) -> dict[Any, Any]:
        self._enter(value, dict)
        path = self._path
        members = {}
        for key, element in value.items():
            path.append(key)
            members[key] = self._value(element)
            path.pop()
        self._depth -= 1
        return members

    def _hashables(self, value: Any) -> list[Any]:
        self._enter(value, list)
        self._hashing += 1
        elements = [self._value(element) for element in value]
        self._hashing -= 1
        self._depth -= 1
        try:
            distinct = len(set(elements)) == len(elements)
        except TypeError:
            self._refuse("a key or an element of a set is mutable")
        if not distinct:
            self._refuse("a key or an element of a set occurs twice")
        return elements

    def _mapping(self, value: dict[str, Any]) -> dict[Any, Any]:
        if "of" in value:
            return self._members(value["of"])
        keys = self._hashables(value["k"])
        self._enter(value["v"], list)
        if len(keys) != len(value["v"]):
            self._refuse(f"{len(keys)} keys have {len(value['v'])} values")
        members = {}
        for key, element in zip(keys, value["v"], strict=True):
            self._path.append(key)
            members[key] = self._value(element)
            self._path.pop()
        self._depth -= 1
        return members

    def _tuple(self, value: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(self._elements(value["v"]))

    def _set(self, value: dict[str, Any]) -> set[Any]:
        return set(self._hashables(value["v"]))

    def _frozenset(self, value: dict[str, Any]) -> frozenset[Any]:
        return frozenset(self._hashables(value["v"]))

    def _deque(self, value: dict[str, Any]) -> deque[Any]:
        elements = self._elements(value["v"])
        limit = value["maxlen"]
        if limit is not None and (type(limit) is not int or not len(elements) <= limit < 1 << 63):
            self._refuse(f"{limit!r:.40} cannot be the limit of a deque of {len(elements)} elements")
        return deque(elements, limit)

    def _ordered_dict(self, value: dict[str, Any]) -> OrderedDict[Any, Any]:
        members = OrderedDict(self._mapping(value))
        if "_metadata" in value:
            self._deeper()
            self._path.append("_metadata")
            members._metadata = self._value(value["_metadata"])  # type: ignore[attr-defined]
            self._path.pop()
            self._depth -= 1
        return members

    def _counter(self, value: dict[str, Any]) -> Counter[Any]:
        return Counter(self._mapping(value))

    def _defaultdict(self, value: dict[str, Any]) -> defaultdict[Any, Any]:
        name = value["factory"]
        if name is not None and self._text(name) not in FACTORIES:
            self._refuse(f"unknown factory {name!r:.40}")
        return defaultdict(None if name is None else FACTORIES[name], self._mapping(value))

    # Tensors, and other packages' values

    def _tensor(self, value: dict[str, Any]) -> Any:
        name, kind = self._text(value["name"]), self._text(value["kind"])
        if self._hashing:
            self._refuse("a tensor is in a key or a set")
        if not name or name in self._names:
            self._refuse(f"the tensor name {name!r:.80} is empty or occurs twice")
        if kind not in KINDS:
            self._refuse(f"unknown kind of tensor {kind!r:.40}")
        self._names.add(name)
        return self._tensors(name, kind)

    def _package(self, name: str) -> Any:
        package = loaded(name)
        if package is None:
            place = show_path("", self._path)
            raise UnsupportedValue(f"a value of {name}; import {name} before you read it", at=place)
        return package

    def _numpy_scalar(self, value: dict[str, Any]) -> Any:
        numpy = self._package("numpy")
        code = self._text(value["dtype"])
        if not NUMPY_SCALAR.fullmatch(code):
            self._refuse(f"unknown dtype of a numpy scalar {code!r:.40}")
        dtype = numpy.dtype(code)
        content = self._hex_bytes(value["v"], dtype.itemsize)
        if dtype.kind == "b" and content > b"\x01":
            self._refuse("a bool is neither true nor false")
        return numpy.frombuffer(content, dtype)[0]

    def _numpy_str(self, value: dict[str, Any]) -> Any:
        return self._package("numpy").str_(self._text(value["v"]))

    def _numpy_bytes(self, value: dict[str, Any]) -> Any:
        return self._package("numpy").bytes_(self._base64(value["v"]))

    def _torch_size(self, value: dict[str, Any]) -> Any:
        torch = self._package("torch")
        sizes = value["v"]
        if type(sizes) is not list or not all(type(n) is int and -1 << 63 <= n < 1 << 63 for n in sizes):
            self._refuse("a torch.Size is not a list of integers")
        return torch.Size(sizes)

    def _torch_dtype(self, value: dict[str, Any]) -> Any:
        torch = self._package("torch")
        name = self._text(value["v"])
        # Not getattr: some of torch's attributes are imported when they are asked for.
        dtype = vars(torch).get(name)
        if type(dtype) is not torch.dtype:
            self._refuse(f"this version of torch has no dtype {name!r:.40}")
        return dtype

    def _torch_device(self, value: dict[str, Any]) -> Any:
        torch = self._package("torch")
        name = self._text(value["v"])
        if not _DEVICE.fullmatch(name):
            self._refuse(f"{name!r:.40} is not a torch device")
        try:
            return torch.device(name)
        except (RuntimeError, ValueError):
            self._refuse(f"this version of torch has no device {name!r:.40}")


def _parsed(text: str) -> Any:
    try:
        if _nesting(text.encode()) > _NESTING_LIMIT:
            raise _damaged(f"more than {_NESTING_LIMIT} JSON arrays and objects are inside each other")
        if "\\u" in text and _SURROGATE_ESCAPE.search(text):
            raise _damaged("a string has a surrogate as an escape")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except ValueError as error:
        raise _damaged(f"it is not JSON: {error}") from error


_Shapes = tuple[frozenset[str], ...]


def _shapes(*shapes: str) -> _Shapes:
    return tuple(frozenset([TAG, *shape.split()]) for shape in shapes)


_V = _shapes("v")
_MAPPING = _shapes("of", "k v")

_TAGS: dict[str, tuple[_Shapes, Callable[[Decoder, dict[str, Any]], Any]]] = {
    "int": (_V, Decoder._int),
    "float": (_V, Decoder._float),
    "complex": (_V, Decoder._complex),
    "bytes": (_V, Decoder._bytes),
    "path": (_shapes("class v"), Decoder._pure_path),
    "tuple": (_V, Decoder._tuple),
    "set": (_V, Decoder._set),
    "frozenset": (_V, Decoder._frozenset),
    "deque": (_shapes("maxlen v"), Decoder._deque),
    "dict": (_MAPPING, Decoder._mapping),
    "OrderedDict": ((*_MAPPING, *_shapes("of _metadata", "k v _metadata")), Decoder._ordered_dict),
    "Counter": (_MAPPING, Decoder._counter),
    "defaultdict": (_shapes("factory of", "factory k v"), Decoder._defaultdict),
    "tensor": (_shapes("kind name"), Decoder._tensor),
    "numpy": (_shapes("dtype v"), Decoder._numpy_scalar),
    "numpy.str": (_V, Decoder._numpy_str),
    "numpy.bytes": (_V, Decoder._numpy_bytes),
    "torch.Size": (_V, Decoder._torch_size),
    "torch.dtype": (_V, Decoder._torch_dtype),
    "torch.device": (_V, Decoder._torch_device),
}
