"""Prevents values that are dropped or changed in silence, and refusals without a place or advice."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import math
import pathlib
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees_samples import (
    LONG_INT,
    T,
    chain,
    come_back,
    no_tensors,
    same,
    text,
)

from pccheck.errors import Corrupt, UnsupportedValue
from pccheck.trees import DEPTH_LIMIT, flatten, unflatten

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Config:
    a: int = 1


class MyDict(dict):  # type: ignore[type-arg]
    pass


class MyList(list):  # type: ignore[type-arg]
    pass


class MyStr(str):
    pass


class MyInt(int):
    pass


class MyTensor(torch.Tensor):  # type: ignore[misc, name-defined]
    pass


class WithState:
    def state_dict(self) -> dict[str, Any]:
        return {}


Point = collections.namedtuple("Point", "x y")
WITH_ATTRIBUTE: Any = OrderedDict(a=1)
WITH_ATTRIBUTE.note = 1
COUNTER_WITH_ATTRIBUTE: Any = Counter(a=1)
COUNTER_WITH_ATTRIBUTE.note = 1

UNSUPPORTED = [
    (lambda epoch: epoch, "look the object up"),
    (len, "look the object up"),
    (int, "look the object up"),
    (Config, "look the object up"),
    (sys, "look the object up"),
    (Colour.RED, ".value"),
    (Level.LOW, ".value"),
    (Point(1, 2), "_asdict"),
    (Config(), "asdict"),
    (argparse.Namespace(a=1), "vars()"),
    (types.SimpleNamespace(a=1), "vars()"),
    (datetime.datetime(2024, 1, 1), "isoformat"),
    (datetime.timedelta(1), "total_seconds"),
    (bytearray(b"x"), "bytes()"),
    (MyDict(), "dict()"),
    (MyList(), "list()"),
    (MyStr("a"), "str()"),
    (MyInt(1), "int()"),
    (collections.UserDict(), "leave it out"),
    (object(), "leave it out"),
    (WithState(), "state_dict()"),
    (types.SimpleNamespace, "look the object up"),
    (MyTensor(), "subclass of torch.Tensor"),
    (torch.Generator(), "get_state"),
    (np.random.default_rng(0), "state dict"),
    (np.array(["a"]), "array of numbers"),
    (np.array([None]), "array of numbers"),
    (np.array(["2024"], "M8[D]"), "array of numbers"),
    (np.zeros(1, "f4,i4"), "array of numbers"),
    (np.zeros(1, "V3"), "array of numbers"),
    (np.zeros(1, np.longdouble), "array of numbers"),
    (np.zeros(1, np.clongdouble), "array of numbers"),
    (np.ma.array([1]), "numpy.array"),
    (np.longdouble(1), "Python number"),
    (np.void(b"abc"), "Python number"),
    ("a\ud800", "surrogatepass"),
    ({"\udfff": 1}, "surrogatepass"),
    (np.str_("\ud800"), "surrogatepass"),
    (pathlib.PurePosixPath("\udcff"), "surrogatepass"),
    ({T: 1}, "in a key or a set"),
    ({T}, "in a key or a set"),
    ({(1, T): 1}, "in a key or a set"),
    ({Colour.RED: 1}, "in a key or a set"),
    ({Point(1, 2)}, "in a key or a set"),
    (defaultdict(lambda: 0), "defaultdict"),
    (defaultdict(tuple), "defaultdict"),
    (WITH_ATTRIBUTE, "['note']"),
    (COUNTER_WITH_ATTRIBUTE, "['note']"),
]


@pytest.mark.parametrize(("value", "advice"), UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_what_cannot_come_back_is_refused_by_place_and_with_advice(value: Any, advice: str) -> None:
    tree = {"optimizer": {"param_groups": [{"lr": 0.1, "lr_fn": value}]}}
    place = "optimizer.param_groups[0]['lr_fn']"
    with pytest.raises(UnsupportedValue) as caught:
        flatten(tree)
    assert place in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "prefix", "place"),
    [
        (object(), "", "the root of the state"),
        (object(), "model", "model"),
        ({"layers.0.weight": object()}, "model", "model['layers.0.weight']"),
        ({"state": {0: {"step": object()}}}, "", "state[0]['step']"),
        ((1, [object()]), "", "[1][0]"),
        ({"a": {(1, "x"): deque([object()])}}, "", "a[(1, 'x')][0]"),
        (OrderedDict(a=defaultdict(list, {"b": [Counter(), object()]})), "", "a.b[1]"),
    ],
)
def test_errors_name_the_place(tree: Any, prefix: str, place: str) -> None:
    with pytest.raises(UnsupportedValue) as caught:
        flatten(tree, prefix=prefix)
    assert f"{place}: " in str(caught.value)


def test_a_long_place_is_shown_by_its_ends() -> None:
    with pytest.raises(UnsupportedValue) as caught:
        flatten({"x" * 100_000: [{"lr_fn": object()}]})
    assert len(str(caught.value)) < 1000
    assert "[0]['lr_fn']" in str(caught.value)


def test_a_prefix_that_is_no_text_is_refused() -> None:
    with pytest.raises(UnsupportedValue):
        flatten(1, prefix="\ud800")


def test_is_tensor_decides_only_about_unknown_types() -> None:
    asked: list[Any] = []

    def is_tensor(value: Any) -> bool:
        asked.append(value)
        return isinstance(value, torch.Tensor)

    special = MyTensor()
    known = {"a": [1, 2.0, "x", None, T, np.zeros(1)], "b": (torch.Size([1]), np.float32(1))}
    flat = flatten([known, special], is_tensor=is_tensor)
    assert len(asked) == 1
    assert asked[0] is special
    assert flat.tensors["1"] is special
    with pytest.raises(UnsupportedValue, match=r"\[0\]"):
        flatten([object()], is_tensor=is_tensor)


def cyclic() -> list[Any]:
    direct: list[Any] = []
    direct.append(direct)
    through: dict[str, Any] = {"a": ()}
    through["a"] = ({"b": deque([through])},)
    od: Any = OrderedDict()
    od._metadata = [od]
    return [direct, through, od]


@pytest.mark.parametrize("tree", cyclic(), ids=["list", "mixed", "attribute"])
def test_a_container_that_contains_itself_is_refused(tree: Any) -> None:
    with pytest.raises(UnsupportedValue, match="contains itself"):
        flatten({"x": tree})


def with_metadata(value: Any) -> Any:
    od: Any = OrderedDict()
    od._metadata = value
    return od


LINKS = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "dict": lambda value: {"a": value},
    "tagged": lambda value: {"$": value},
    "integer-key": lambda value: {1: value},
    "ordered": lambda value: OrderedDict([(1, value)]),
    "deque": lambda value: deque([value]),
    "frozenset": lambda value: frozenset([value]),
    "key": lambda value: (value,),
    "attribute": with_metadata,
}


@pytest.mark.parametrize("link", LINKS.values(), ids=list(LINKS))
def test_nesting_up_to_the_limit_comes_back_and_more_is_refused(link: Any) -> None:
    deepest = chain(link, DEPTH_LIMIT)
    assert same(come_back(deepest), deepest)
    for levels in (DEPTH_LIMIT + 1, 300 if link is LINKS["frozenset"] else 5000):
        with pytest.raises(UnsupportedValue, match=f"more than {DEPTH_LIMIT} containers"):
            flatten(chain(link, levels))


def test_the_deepest_values_fit_too() -> None:
    values = [(complex(math.inf, 1), 0), (2**100, 0), (torch.Size([1]), 0), (T, 0), ({((),): T}, 3)]
    for tree, containers in values:
        for _ in range(DEPTH_LIMIT - containers):
            tree = {1: tree}
        assert same(come_back(tree), tree)


def test_only_depth_is_limited_not_how_many_containers_there_are() -> None:
    part = [link(1) for link in LINKS.values()]
    tree = [part] * (3 * DEPTH_LIMIT)
    assert same(come_back(tree), tree)


def test_values_whose_text_python_refuses_to_write_are_named_all_the_same() -> None:
    long = -LONG_INT
    flat = flatten({long: T, (long, 1): T})
    assert same(come_back({long: T, (long, 1): T}), {long: T, (long, 1): T})
    assert list(flat.tensors)[0].startswith("0x")
    with pytest.raises(UnsupportedValue, match=r"\[<int>\]"):
        flatten({long: object()})
    with pytest.raises(Corrupt):
        unflatten(text({"$": "dict", "k": [{"$": "int", "v": hex(long)}], "v": [{"$": "?"}]}), no_tensors)
