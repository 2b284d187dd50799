"""Prevents two tensors under one name, names that the engine refuses, and a tensor put in another's place."""

from __future__ import annotations

from typing import Any

import pytest
from trees_samples import (
    T,
    come_back,
    no_tensors,
    same,
    text,
)

from pccheck.trees import flatten, unflatten

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


def test_tensors_are_handed_over_as_found_and_come_back_by_kind() -> None:
    class Array:
        pass

    plain, parameter, array, other = torch.zeros(2), torch.nn.Parameter(torch.zeros(2)), np.zeros(2), Array()
    tree = {"model": {"w": plain, "p": parameter}, "np": [array], "other": (other,)}
    flat = flatten(tree, is_tensor=lambda value: isinstance(value, Array), prefix="job")
    assert {name: id(value) for name, value in flat.tensors.items()} == {
        "job.model.w": id(plain),
        "job.model.p": id(parameter),
        "job.np.0": id(array),
        "job.other.0": id(other),
    }
    assert unflatten(flat.json, lambda name, kind: (name, kind)) == {
        "model": {"w": ("job.model.w", "torch"), "p": ("job.model.p", "parameter")},
        "np": [("job.np.0", "numpy")],
        "other": (("job.other.0", "array"),),
    }


def test_an_array_of_an_extension_dtype_is_a_tensor() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.zeros(2, ml_dtypes.bfloat16)
    assert come_back([array])[0] is array


def test_a_tensor_that_occurs_twice_has_two_names() -> None:
    tied = torch.zeros(2)
    flat = flatten({"wte": tied, "head": [tied, tied]})
    assert list(flat.tensors) == ["wte", "head.0", "head.1"]
    assert all(value is tied for value in flat.tensors.values())


def test_a_shared_container_comes_back_twice() -> None:
    shared = [1, {"a": 2}]
    tree = come_back({"x": shared, "y": (shared, shared)})
    assert tree == {"x": shared, "y": (shared, shared)}


@pytest.mark.parametrize(
    ("tree", "prefix", "names"),
    [
        (T, "", ["tensor"]),
        (T, "opt", ["opt"]),
        ({"": T}, "", ["tensor"]),
        ({"": {"": T}}, "", ["."]),
        ({"a.b": T, "a": {"b": T, "b#2": T}}, "", ["a.b", "a.b#2", "a.b#2#2"]),
        ({0: T, "0": T}, "s", ["s.0", "s.0#2"]),
        ({"x#2": T, "x": {"": T}, "x.": T}, "", ["x#2", "x.", "x.#2"]),
        ({None: T, True: T, 1.5: T, ("a", 1): T}, "", ["None", "True", "1.5", "(a,1)"]),
        ({frozenset({"b", "a"}): T}, "", ["{a,b}"]),
        ({"a\0b": T, "a_b": T}, "", ["a_b", "a_b#2"]),
        ({"\0": T}, "", ["_"]),
        ({"pccheck": {"x": T}, "_pccheck.x": T}, "", ["_pccheck.x", "_pccheck.x#2"]),
        ({"pccheck": T}, "", ["pccheck"]),
        ({"__metadata__": T}, "", ["___metadata__"]),
        ({"w": T}, "pccheck.", ["_pccheck..w"]),
    ],
)
def test_names_are_readable_unique_and_fit_for_the_engine(tree: Any, prefix: str, names: list[str]) -> None:
    assert list(flatten(tree, prefix=prefix).tensors) == names
    assert same(come_back(tree, prefix=prefix), tree)


@pytest.mark.parametrize("character", ["x", "\u00e9", "\u20ac", "\U0001f600"])
def test_long_names_are_shortened_and_stay_unique(character: str) -> None:
    size = len(character.encode())
    for count in (4031 // size, 4032 // size, 4096 // size, 4097 // size + 1, 9000):
        base = character * count
        tree = {base + "a": T, base + "b": T, base: {"a": T}, base + ".a": T}
        names = list(flatten(tree).tensors)
        assert len(set(names)) == 4
        assert all(len(name.encode()) <= 4096 for name in names)
        assert all(name.startswith(character * (4000 // size)) for name in names)
        assert names[:2] == [flatten({base + end: T}).tensors.popitem()[0] for end in "ab"], "named by content"
        assert same(come_back(tree), tree)
    assert list(flatten({character * (4000 // size): T}).tensors) == [character * (4000 // size)]


def test_many_collisions_get_consecutive_numbers() -> None:
    keys = [("x",) * 2, "(x,x)", 1, "1", "1#2", "1#2#2"]
    expected = ["(x,x)", "(x,x)#2", "1", "1#2", "1#2#2", "1#2#2#2"]
    assert list(flatten(dict.fromkeys(keys, T)).tensors) == expected
    same_names = {None: T, "None": T, ("None",): T, "(None)": T, (None,): T}
    assert list(flatten(same_names).tensors) == ["None", "None#2", "(None)", "(None)#2", "(None)#3"]


def test_names_come_from_the_text_and_are_never_derived_again() -> None:
    root = {"$": "tensor", "kind": "torch", "name": "elsewhere"}
    assert unflatten(text({"w": root}), no_tensors) == {"w": ("elsewhere", "torch")}
