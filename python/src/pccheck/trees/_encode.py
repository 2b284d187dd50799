"""The writer: from a tree to JSON text and named tensors, by one table from exact type to encoding."""

from __future__ import annotations

import math
import pathlib
import struct
from binascii import b2a_base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from json.encoder import encode_basestring
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

# For asking at once whether all values are of a type.
_STRINGS, _INTS, _DICTS, _SIMPLE_KEYS = map(frozenset[type], ((str,), (int,), (dict,), (int, str)))
# Those of which two of a type that are equal have one text, which of floats is not so.
_SIMPLE_SCALARS = frozenset((type(None), bool, int, str))


def _tagged(tag: str, **members: str) -> str:
    """A JSON object with a tag; ``members`` are JSON texts."""
    rest = "".join(f',"{name}":{text}' for name, text in members.items())
    return f'{{"{TAG}":"{tag}"{rest}}}'


def _array(elements: Iterable[str]) -> str:
    return f"[{','.join(elements)}]"


def _tensor(kind: str, name: str) -> str:
    return _tagged("tensor", kind=f'"{kind}"', name=encode_basestring(name))


@dataclass(frozen=True)
class _Shape:
    """All that the text of a mapping tells, but for its place. Its values are all tensors, or all scalars, or all dicts
    of such."""

    keys: list[Any]
    #: of the dicts: how long they are, and their keys
    inner_sizes: list[int]
    inner_keys: list[str]
    kinds: list[type]
    scalars: list[Any]


@dataclass(frozen=True)
class _Written:
    """How such a mapping was named and written."""

    shape: _Shape
    names: list[str]
    body: dict[str, str]


class Known:
    """What one tree after another has in common: the names and texts of its mappings of tensors, or of scalars."""

    def __init__(self) -> None:
        #: by what their names begin with
        self.mappings: dict[str, _Written] = {}


class Encoder:
    """Writes one tree."""

    def __init__(self, is_tensor: Callable[[Any], bool] | None, prefix: str, known: Known | None = None) -> None:
        self.tensors: dict[str, Any] = {}
        self._is_tensor = is_tensor
        self._prefix = prefix
        self._path: list[Any] = []
        self._open: set[int] = set()  # the containers around the value at hand, by id
        self._hashing = 0  # how many keys and sets the value at hand is in
        self._table, self._tensor_types = _table()
        self._str(prefix)
        self._names = Names(prefix)
        self._known = known
        self._seen: dict[str, _Written] = {}

    def text(self, tree: Any) -> str:
        """The JSON text of `tree`; its tensors are in `self.tensors` afterwards."""
        text = self._value(tree)
        if self._known is not None:
            self._known.mappings = self._seen
        return f'{{"{VERSION_MEMBER}":{VERSION},"{ROOT_MEMBER}":{text}}}'

    def _value(self, value: Any) -> str:
        return self._table.get(type(value), Encoder._unknown)(self, value)

    def _refuse(self, message: str) -> NoReturn:
        place = show_path(self._prefix, self._path)
        within = "in a key or a set there, " if self._hashing else ""
        raise UnsupportedValue(f"{within}{message}", at=place)

    # Scalars

    def _none(self, value: None) -> str:
        return "null"

    def _bool(self, value: bool) -> str:
        return "true" if value else "false"

    def _int(self, value: int) -> str:
        return int.__repr__(value) if _INT_MIN <= value <= _INT_MAX else _tagged("int", v=f'"{hex(value)}"')

    def _float(self, value: float) -> str:
        if math.isfinite(value):
            return float.__repr__(value)
        return _tagged("float", v=f'"{struct.pack(">d", value).hex()}"')

    def _complex(self, value: complex) -> str:
        return _tagged("complex", v=_array((self._float(value.real), self._float(value.imag))))

    def _str(self, value: str) -> str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                self._refuse(
                    "a string with a lone surrogate cannot be stored, as it is not valid Unicode; "
                    "store its bytes: .encode('utf-8', 'surrogatepass')"
                )
        return encode_basestring(value)

    def _bytes(self, value: bytes) -> str:
        return _tagged("bytes", v=f'"{b2a_base64(value, newline=False).decode()}"')

    def _pure_path(self, value: pathlib.PurePath) -> str:
        return _tagged("path", **{"class": f'"{_PATH_NAMES[type(value)]}"', "v": self._str(str(value))})

    # Containers

    def _enter(self, value: Any) -> None:
        if id(value) in self._open:
            self._refuse("this container contains itself; a tree must not refer back to what it is part of")
        if len(self._open) >= DEPTH_LIMIT:
            self._refuse(f"more than {DEPTH_LIMIT} containers are inside each other; flatten the nesting")
        self._open.add(id(value))

    def _leave(self, value: Any) -> None:
        self._open.remove(id(value))

    def _elements(self, value: Collection[Any]) -> str:
        self._enter(value)
        texts = _plain_ints(value)
        if texts is None:
            path, encoding = self._path, self._table.get
            texts = []
            for index, element in enumerate(value):
                path.append(index)
                texts.append(encoding(type(element), Encoder._unknown)(self, element))
                path.pop()
        self._leave(value)
        return _array(texts)

    def _hashables(self, value: Collection[Any]) -> list[str]:
        texts = _plain_ints(value)
        if texts is None:
            self._hashing += 1
            texts = [self._value(element) for element in value]
            self._hashing -= 1
        return texts

    def _list(self, value: list[Any]) -> str:
        return self._elements(value)

    def _tuple(self, value: tuple[Any, ...]) -> str:
        return _tagged("tuple", v=self._elements(value))

    def _deque(self, value: deque[Any]) -> str:
        maxlen = "null" if value.maxlen is None else f"{value.maxlen}"
        return _tagged("deque", maxlen=maxlen, v=self._elements(value))

    def _set(self, value: set[Any] | frozenset[Any]) -> str:
        self._enter(value)
        elements = self._hashables(value)
        self._leave(value)
        elements.sort()  # equal sets give equal texts
        return _tagged(type(value).__name__, v=_array(elements))

    def _mapping(self, value: dict[Any, Any]) -> dict[str, str]:
        """The two forms of a mapping's contents: a JSON object for string keys, two lists for others."""
        found = self._shape_of(value) if self._known is not None else None
        if found is None or self._known is None:
            return self._members(value)
        shape, tensors = found
        head, numbered, named = self._names.head(self._path), self._names.numbered, len(self.tensors)
        written = self._known.mappings.get(head)
        if written is not None and written.shape == shape and self._names.take(written.names):
            self.tensors.update(zip(written.names, tensors, strict=True))
        else:
            body = self._members(value)
            written = _Written(shape, list(islice(self.tensors, named, None)), body)
        # Numbers depend on all that was named before.
        if self._names.numbered == numbered:
            self._seen[head] = written
        return written.body

    def _shape_of(self, value: dict[Any, Any]) -> tuple[_Shape, list[Any]] | None:
        """The shape of a mapping, and its tensors; None for those of other kinds."""
        # Neither kind goes deeper than two containers. Equal keys of other types have other texts.
        if not value or not _SIMPLE_KEYS.issuperset(map(type, value)) or len(self._open) + 2 > DEPTH_LIMIT:
            return None
        parts = value.values()
        leaves, inner_sizes, inner_keys = list(parts), list[int](), list[str]()
        if _DICTS.issuperset(map(type, leaves)):
            inner_sizes, inner_keys = list(map(len, parts)), list(chain.from_iterable(parts))
            leaves = list(chain.from_iterable(map(dict.values, parts)))
            if not _STRINGS.issuperset(map(type, inner_keys)):
                return None
        kinds = list(map(type, leaves))
        if self._tensor_types.issuperset(kinds):
            return _Shape(list(value), inner_sizes, inner_keys, kinds, []), leaves
        if _SIMPLE_SCALARS.issuperset(kinds):
            return _Shape(list(value), inner_sizes, inner_keys, kinds, leaves), []
        return None

    def _members(self, value: dict[Any, Any]) -> dict[str, str]:
        self._enter(value)
        path, encoding = self._path, self._table.get
        texts = []
        if _STRINGS.issuperset(map(type, value)):
            for key, element in value.items():
                if not key.isascii():
                    self._hashables((key,))
                path.append(key)
                texts.append(f"{encode_basestring(key)}:{encoding(type(element), Encoder._unknown)(self, element)}")
                path.pop()
            body = {"of": f"{{{','.join(texts)}}}"}
        else:
            keys = self._hashables(value)
            for key, element in value.items():
                path.append(key)
                texts.append(encoding(type(element), Encoder._unknown)(self, element))
                path.pop()
            body = {"k": _array(keys), "v": _array(texts)}
        self._leave(value)
        return body

    def _dict(self, value: dict[Any, Any]) -> str:
        body = self._mapping(value)
        return body["of"] if "of" in body and TAG not in value else _tagged("dict", **body)

    def _attributes(self, value: Any, known: set[str]) -> dict[str, Any]:
        attributes: dict[str, Any] = vars(value)
        unknown = attributes.keys() - known
        if unknown:
            self._refuse(
                f"the attributes {sorted(unknown)} of this {type(value).__name__} cannot be stored; "
                "delete them, or store their values as entries"
            )
        return attributes

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> str:
        encoded = self._mapping(value)
        # The state dicts of torch's modules carry their version numbers in this attribute.
        attributes = self._attributes(value, {"_metadata"})
        if attributes:
            self._enter(attributes)
            self._path.append("_metadata")
            encoded["_metadata"] = self._value(attributes["_metadata"])
            self._path.pop()
            self._leave(attributes)
        return _tagged("OrderedDict", **encoded)

    def _counter(self, value: Counter[Any]) -> str:
        self._attributes(value, set())
        return _tagged("Counter", **self._mapping(value))

    def _defaultdict(self, value: defaultdict[Any, Any]) -> str:
        factory = value.default_factory
        if factory is not None and not (isinstance(factory, type) and factory in _FACTORY_NAMES):
            self._refuse(
                f"a defaultdict can be stored with the factory None, {', '.join(FACTORIES)}, "
                f"not with {shown_value(factory)}; convert it with dict()"
            )
        name = "null" if factory is None else f'"{_FACTORY_NAMES[factory]}"'
        return _tagged("defaultdict", factory=name, **self._mapping(value))

    # Tensors, and other packages' values

    def _leaf(self, value: Any, kind: str) -> str:
        if self._hashing:
            self._refuse("a tensor as a key or in a set cannot be stored; use a number or a name for it")
        name = self._names.name(self._path)
        self.tensors[name] = value
        return _tensor(kind, name)

    def _torch_tensor(self, value: Any) -> str:
        return self._leaf(value, "torch")

    def _parameter(self, value: Any) -> str:
        return self._leaf(value, "parameter")

    def _numpy_array(self, value: Any) -> str:
        dtype = value.dtype
        numbers = dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)
        # Kind V is also what extensions such as ml_dtypes give their number types.
        if not numbers and not (dtype.kind == "V" and dtype.type is not loaded("numpy").void):
            self._refuse(
                f"a numpy array of dtype {dtype} cannot be stored; convert it to an array of numbers, "
                "or to a list with .tolist()"
            )
        return self._leaf(value, "numpy")

    def _numpy_scalar(self, value: Any) -> str:
        numpy = loaded("numpy")
        code = value.dtype.newbyteorder("<").str
        if not NUMPY_SCALAR.fullmatch(code):
            self._refuse(refusal(value))
        content = numpy.asarray(value).astype(code).tobytes().hex()
        return _tagged("numpy", dtype=f'"{code}"', v=f'"{content}"')

    def _numpy_str(self, value: str) -> str:
        # str(value) would drop NULs at the end.
        return _tagged("numpy.str", v=self._str(str.__str__(value)))

    def _numpy_bytes(self, value: bytes) -> str:
        return _tagged("numpy.bytes", v=f'"{b2a_base64(value, newline=False).decode()}"')

    def _torch_size(self, value: Any) -> str:
        return _tagged("torch.Size", v=_array(map(int.__repr__, value)))

    def _torch_dtype(self, value: Any) -> str:
        return _tagged("torch.dtype", v=encode_basestring(str(value).removeprefix("torch.")))

    def _torch_device(self, value: Any) -> str:
        return _tagged("torch.device", v=encode_basestring(str(value)))

    def _unknown(self, value: Any) -> str:
        if self._is_tensor is None or not self._is_tensor(value):
            self._refuse(refusal(value))
        torch, numpy = loaded("torch"), loaded("numpy")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._leaf(value, "parameter" if isinstance(value, torch.nn.Parameter) else "torch")
        is_numpy = numpy is not None and isinstance(value, numpy.ndarray)
        return self._leaf(value, "numpy" if is_numpy else "array")


def _plain_ints(value: Collection[Any]) -> list[str] | None:
    """The texts of integers; None where there is anything else, or one that takes a tag. They come by the hundreds, in
    generators' states and in groups of parameters."""
    if value and _INTS.issuperset(map(type, value)) and min(value) >= _INT_MIN and max(value) <= _INT_MAX:
        return list(map(int.__repr__, value))
    return None


_Table = dict[type, Callable[[Encoder, Any], str]]

_BUILTIN: _Table = {
    type(None): Encoder._none,
    bool: Encoder._bool,
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

_tables: dict[tuple[bool, bool], tuple[_Table, frozenset[type]]] = {}


def _table() -> tuple[_Table, frozenset[type]]:
    """The encoding of each type, with those of numpy and torch where they are loaded; and which are torch's tensors."""
    numpy, torch = loaded("numpy"), loaded("torch")
    key = (numpy is not None, torch is not None)
    if key not in _tables:
        table, tensors = dict(_BUILTIN), frozenset[type]()
        if numpy is not None:
            table.update(dict.fromkeys(numpy.sctypeDict.values(), Encoder._numpy_scalar))
            table[numpy.str_] = Encoder._numpy_str
            table[numpy.bytes_] = Encoder._numpy_bytes
            table[numpy.ndarray] = Encoder._numpy_array
        if torch is not None:
            table[torch.Tensor] = Encoder._torch_tensor
            table[torch.nn.Parameter] = Encoder._parameter
            tensors = frozenset((torch.Tensor, torch.nn.Parameter))
            table[torch.Size] = Encoder._torch_size
            table[torch.dtype] = Encoder._torch_dtype
            table[torch.device] = Encoder._torch_device
        _tables[key] = table, tensors
    return _tables[key]
