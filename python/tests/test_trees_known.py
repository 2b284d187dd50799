"""Prevents: a tree that is written as the one before it was, though something in it has changed."""

from __future__ import annotations

import gc
import random
import weakref
from collections import OrderedDict
from typing import Any

import pytest
from trees_samples import T, random_tree

from pccheck.errors import UnsupportedValue
from pccheck.trees import DEPTH_LIMIT, Known, flatten

torch = pytest.importorskip("torch")

P = torch.nn.Parameter(torch.zeros(1))
U = torch.ones(2)


def written(tree: Any, known: Known | None = None, prefix: str = "") -> tuple[str, list[tuple[str, int]]]:
    flat = flatten(tree, known=known, prefix=prefix)
    return flat.json, [(name, id(value)) for name, value in flat.tensors.items()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": T, "b": U}, {"a": U, "b": T}),
        ({"a": T, "b": U}, {"b": T, "a": U}),
        ({"a": T}, {"a": P}),
        ({"a": T}, {"a": T, "b": T}),
        ({"a": T, "b": T}, {"a": T}),
        ({"a": T}, {"c": T}),
        ({"a": T}, {"a": 1}),
        ({"s": {0: {"m": T}, 1: {"m": T}}}, {"s": {0: {"m": T}, True: {"m": T}}}),
        ({"s": {0: {"m": T}, 1: {"m": T}}}, {"s": {0: {"m": T}, "1": {"m": T}}}),
        ({"s": {0: {"m": T}, 1: {"n": T}}}, {"s": {0: {"m": T, "n": T}, 1: {}}}),
        ({"s": {0: {"m": T}, 1: {"m": T}}}, {"s": {0: {"m": T}, 1: {"n": T}}}),
        ({"s": {0: {"m": T}, 1: {"n": T}}}, {"s": {0: {"m": T}, 1: {"n": P}}}),
        ({"s": {0: {"m": T}, 1: {"m": T}}}, {"s": {1: {"m": T}, 0: {"m": T}}}),
        ({"s": {0: {"m": T}}}, {"s": {0: OrderedDict(m=T)}}),
        ({"s": {0: {"m": T}}}, {"s": {0: {"m": T, "$": T}}}),
        ({"s": {0: {"1": T}}}, {"s": {0: {1: T}}}),
        ({"s": {"m": T}}, {"s": {0: {"m": T}}}),
        ({"n": {"a": 1, "b": True}}, {"n": {"a": True, "b": 1}}),
        ({"n": {"a": 1}}, {"n": {"a": 2}}),
        ({"n": {"a": 1}}, {"n": {"a": 1.0}}),
        ({"n": {"a": 0.0}}, {"n": {"a": -0.0}}),
        ({"n": {"a": 0.5}}, {"n": {"a": 0.25}}),
        ({"n": {"a": "x", "b": None}}, {"n": {"a": "y", "b": None}}),
        ({"n": {"x": {"v": 1}}}, {"n": {"x": {"v": 2}}}),
        ({"n": {1: "a"}}, {"n": {True: "a"}}),
        ({"n": [1, 2, 3]}, {"n": [1, 2, True]}),
        ({"n": (1, 2)}, {"n": (1, 3)}),
        ({"n": [2**64 - 1]}, {"n": [2**64]}),
        ({"n": [-(2**63)]}, {"n": [-(2**63) - 1]}),
        # A name that another tensor has by now, or has no more.
        ({"x": 0, "a": {"b": T}}, {"a.b": T, "a": {"b": T}}),
        ({"a.b": T, "a": {"b": T}}, {"x": 0, "a": {"b": T}}),
        ({"x": 0, "s": {0: {"m": T}}}, {"s.0.m": T, "s": {0: {"m": T}}}),
        ({"s.0.m": T, "s": {0: {"m": T}}}, {"x": 0, "s": {0: {"m": T}}}),
        # One place as names have it, two in the tree.
        ({"a": {"b": {"c": T}}}, {"a.b": {"c": T}, "a": {"b": {"c": T}}}),
    ],
)
def test_what_changed_is_written(before: Any, after: Any) -> None:
    for prefix in ("", "member"):
        known = Known()
        for tree in (before, before, after, after, before):
            assert written(tree, known, prefix) == written(tree, None, prefix)


def test_trees_that_look_alike_are_written_as_if_they_were_the_first() -> None:
    pick, known = random.Random(3), Known()
    values = [T, T, T, U, P, 1, True, 0, False, "1", None, 1.0, 0.0, -0.0]
    same_as_before = 0

    def tree(depth: int) -> Any:
        if not depth or pick.random() < 0.2:
            return pick.choice(values if pick.random() < 0.3 else values[:4])
        keys = pick.choice([["a", "b"], ["b", "a"], ["a", "a.b", "b"], [0, 1], [0, True], ["0", 1], ["b.a"]])
        return pick.choice([dict, dict, OrderedDict])((key, tree(depth - 1)) for key in keys)

    parts = [tree(3) for _ in range(12)]
    for _ in range(4000):
        state = {
            key: pick.choice(parts) for key in pick.choice([["a", "b"], ["a.b", "a"], ["a", "a.b"], [0, "0", "a"]])
        }
        before = dict(known.mappings)
        assert written(state, known) == written(state)
        same_as_before += sum(known.mappings.get(head) is found for head, found in before.items())
    assert same_as_before > 300
    for seed in range(300):
        state = random_tree(random.Random(seed), 5)
        for _ in range(2):
            assert written(state, known) == written(state)


def test_no_tensor_is_kept_alive() -> None:
    known, state = Known(), {"model": {"w": torch.zeros(3)}, "state": {0: {"m": torch.zeros(3)}}}
    alive = [weakref.ref(state["model"]["w"]), weakref.ref(state["state"][0]["m"])]
    for _ in range(2):
        flatten(state, known=known)
    assert known.mappings
    state.clear()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_what_is_no_longer_there_is_forgotten() -> None:
    known = Known()
    for step in range(20):
        flatten({f"step {step}": {"w": T}}, known=known)
    assert all("19" in head for head in known.mappings if head)


@pytest.mark.parametrize("inner", [{"w": T}, {0: {"w": T}}])
def test_a_place_that_is_deeper_than_one_of_the_same_name_is_refused(inner: dict[Any, Any]) -> None:
    known, deep = Known(), inner
    for _ in range(DEPTH_LIMIT):
        deep = {"x": deep}
    flat = {".".join("x" * DEPTH_LIMIT): inner}
    for _ in range(2):
        assert written(flat, known) == written(flat)
    with pytest.raises(UnsupportedValue, match="inside each other"):
        flatten(deep, known=known)
