"""Trees of all that can be stored, and the measure of whether one came back: for the tests of trees."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest

from pccheck.trees import Flat, flatten, unflatten

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


T = torch.zeros(1)


def come_back(tree: Any, **options: Any) -> Any:
    flat = flatten(tree, **options)
    flat.json.encode()
    assert "\0" not in flat.json
    return put_together(flat)


def put_together(flat: Flat) -> Any:
    return unflatten(flat.json, lambda name, kind: flat.tensors[name])


def chain(link: Any, levels: int) -> Any:
    tree: Any = 1
    for _ in range(levels):
        tree = link(tree)
    return tree


def text(root: Any, version: Any = 1) -> str:
    return json.dumps({"pccheck.tree": version, "root": root})


def no_tensors(name: str, kind: str) -> Any:
    return (name, kind)


def bits(value: float) -> bytes:
    return struct.pack(">d", value)


def same(a: Any, b: Any) -> bool:
    """Equal in type, content, order and bits; tensors are the very same object."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return a is b
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, complex):
        return bits(a.real) == bits(b.real) and bits(a.imag) == bits(b.imag)
    if isinstance(a, np.str_):
        return str.__str__(a) == str.__str__(b)
    if isinstance(a, np.bytes_):
        return memoryview(a) == memoryview(b)
    if isinstance(a, np.generic):
        return bool(a.dtype == b.dtype and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        factory = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        attributes = same(getattr(a, "__dict__", None), getattr(b, "__dict__", None))
        return factory and attributes and same([*a], [*b]) and same([*a.values()], [*b.values()])
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (set, frozenset)):
        return a == b and sorted(map(repr, a)) == sorted(map(repr, b))
    return bool(a == b)


LONG_INT: int = -(3**20000)  # more digits than Python converts to decimal

SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**53 + 1,
    -(2**63),
    -(2**63) - 1,
    2**64 - 1,
    2**64,
    LONG_INT,
    0.0,
    -0.0,
    1.0,
    0.1,
    1e22,
    5e-324,
    sys.float_info.max,
    math.inf,
    -math.inf,
    math.nan,
    struct.unpack(">d", bytes.fromhex("fff8000000000000"))[0],
    struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0],
    1 - 2j,
    complex(-0.0, math.nan),
    "",
    "text",
    "NUL \0 inside, and \x1f\x7f",
    'quotes " and \\ and \\ud800 as text',
    "\u00e9\u2028\u2029\ufeff\uffff\U0001f600",
    "$",
    b"",
    b"\x00\xff\n",
    bytes(range(256)),
    pathlib.PurePosixPath("/a/b \u00e9"),
    pathlib.PureWindowsPath("C:\\a\\b"),
    pathlib.Path("relative/x"),
    np.float16(1.5),
    np.float32(0.1),
    np.float64(-0.0),
    np.float32("nan"),
    np.float64("-inf"),
    np.int8(-7),
    np.uint64(2**64 - 1),
    np.int64(-(2**63)),
    np.bool_(True),
    np.bool_(False),
    np.complex64(1 + 2j),
    np.complex128(complex(-0.0, 2)),
    np.str_("te\u00e9xt\0"),
    np.str_(""),
    np.bytes_(b"ab\0"),
    np.datetime64("2024-02-29T12:00:00.123456789", "ns"),
    np.datetime64("NaT"),
    np.timedelta64(7, "25s"),
    torch.Size([]),
    torch.Size([2, 3, 4]),
    torch.bfloat16,
    torch.complex64,
    torch.device("cpu"),
    torch.device("cuda:3"),
    torch.device("meta"),
]


KEYS: list[Any] = [
    {1: "a", "1": "b", 2: "c"},
    {True: 1, 0: 2},
    {1.0: "float", None: "none"},
    {math.inf: 1, -math.inf: 2, 0.5: 3},
    {(1, "a"): 1, ((), (None,)): 2, 2**70: 3},
    {b"bytes": 1, frozenset({1, 2}): 2, np.int64(3): 3, torch.float32: 4, pathlib.PurePath("p"): 5},
    {"b": 1, "a": 2, "": 3, "\0": 4},
    {"$": "tuple", "v": [1, 2]},
    {"$": 1},
    {"a": {"$": "tensor", "kind": "torch", "name": "x"}, "of": 1, "k": [1], "v": [2]},
    {"pccheck.tree": 1, "root": 3},
]


FACTORIES: list[Any] = [None, list, dict, int, float, str, set]

CONTAINERS: list[Any] = [
    [],
    (),
    {},
    (1,),
    ((), [], {}),
    OrderedDict(),
    OrderedDict([("b", (1,)), ("a", [2])]),
    Counter({"a": 3, "b": -1}),
    Counter({"$": 2.5}),
    set(),
    {1, "a", (1, 2), None, 2.5, b"x", frozenset({1})},
    frozenset(),
    frozenset({frozenset({()}), "a"}),
    deque(),
    deque([1, (2,)]),
    deque([1, 2], maxlen=2),
    deque([], maxlen=0),
    *[defaultdict(factory, {"a": 1, 2: 3}) for factory in FACTORIES],
]


def random_tree(pick: random.Random, depth: int) -> Any:
    def key(level: int = 0) -> Any:
        kind = pick.randrange(8 if level < 2 else 7)
        if kind == 0:
            return pick.choice(["$", "of", "k", "v", "a.b", "a", "", "0", "pccheck.x", "\0"])
        if kind == 1:
            return pick.randrange(-3, 10 ** pick.randrange(1, 30))
        if kind == 7:
            return tuple(key(level + 1) for _ in range(pick.randrange(3)))
        return pick.choice(["w", "layers", "\u00e9", 0, 1.5, None, False, "bias", "x" * 20])

    kind = pick.randrange(14 if depth else 4)
    children = range(pick.randrange(5))
    if kind == 0:
        return struct.unpack(">d", pick.randbytes(8))[0] if pick.random() < 0.5 else pick.random()
    if kind == 1:
        leaf = torch.empty(pick.randrange(3))
        return pick.choice([leaf, torch.nn.Parameter(leaf), np.zeros(2)])
    if kind in (2, 3):
        return copy.deepcopy(pick.choice(SCALARS))
    if kind in (4, 5):
        return [random_tree(pick, depth - 1) for _ in children]
    if kind == 6:
        return tuple(random_tree(pick, depth - 1) for _ in children)
    if kind == 7:
        return deque((random_tree(pick, depth - 1) for _ in children), pick.choice([None, 4, 9]))
    if kind == 8:
        return pick.choice([set, frozenset])(key() for _ in children)
    pairs = {key(): random_tree(pick, depth - 1) for _ in children}
    if kind == 9:
        return OrderedDict(pairs)
    if kind == 10:
        return defaultdict(pick.choice(FACTORIES), pairs)
    if kind == 11:
        return Counter(pairs)
    return pairs
