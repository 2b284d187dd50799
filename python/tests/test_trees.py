"""Prevents state that comes back changed: a float off by a bit, an integer key turned into text, a tuple into
a list, an order lost."""

from __future__ import annotations

import math
import os
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees_samples import (
    CONTAINERS,
    KEYS,
    SCALARS,
    T,
    bits,
    come_back,
    put_together,
    random_tree,
    same,
)

from pccheck.trees import flatten

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: type(value).__name__)
def test_a_scalar_comes_back_with_its_type_and_bits(value: Any) -> None:
    for tree in (value, [value], {"key": value}, (value, {"a": [value]})):
        assert same(come_back(tree), tree)


def test_floats_come_back_bit_for_bit() -> None:
    pick = random.Random(1)
    floats = [struct.unpack(">d", pick.randbytes(8))[0] for _ in range(20000)]
    nans = [pick.choice([b"\x7f\xf8", b"\xff\xff", b"\x7f\xf0"]) + pick.randbytes(6) for _ in range(2000)]
    floats += [struct.unpack(">d", nan)[0] for nan in nans]
    assert list(map(bits, come_back(floats))) == list(map(bits, floats))


def test_every_torch_dtype_comes_back() -> None:
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    assert len(dtypes) > 20
    assert all(map(lambda a, b: a is b, come_back(dtypes), dtypes))


@pytest.mark.parametrize("tree", KEYS, ids=lambda tree: repr(list(tree))[:40])
def test_keys_come_back_with_type_and_order(tree: dict[Any, Any]) -> None:
    for kind in (dict, OrderedDict, Counter):
        assert same(come_back(kind(tree)), kind(tree))
    assert same(come_back(defaultdict(list, tree)), defaultdict(list, tree))


def test_numpy_types_of_one_dtype_come_back_as_one_type() -> None:
    value = come_back(np.longlong(5))
    assert value == 5
    assert value.dtype == np.longlong


def test_a_nan_key_comes_back_as_one() -> None:
    (key,) = come_back({math.nan: 1})
    assert bits(key) == bits(math.nan)


@pytest.mark.parametrize("tree", CONTAINERS, ids=repr)
def test_a_container_comes_back_as_its_type(tree: Any) -> None:
    assert same(come_back(tree), tree)
    assert same(come_back({"x": [tree]}), {"x": [tree]})


def test_the_version_numbers_on_a_modules_state_dict_come_back() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert state._metadata["1"] == {"version": 2}
    assert same(come_back(state), state)
    assert come_back(state)._metadata == state._metadata


@pytest.mark.parametrize(
    "numbers",
    [
        [-(2**63), 0, 2**64 - 1],
        [1, -(2**63) - 1],
        [1, 2**64],
        [1, True],
        [1, 2.0],
        [0],
        [],
    ],
)
def test_integers_by_the_hundreds_come_back(numbers: list[Any]) -> None:
    many = numbers * 100
    tree = [many, tuple(many), deque(many), set(numbers), frozenset(numbers), dict.fromkeys(numbers, "x")]
    assert same(come_back(tree), tree)
    assert ('{"$":"int"' in flatten(many).json) == any(not -(2**63) <= number < 2**64 for number in numbers)


def test_random_trees_come_back() -> None:
    tensors = 0
    for seed in range(1500):
        tree = random_tree(random.Random(seed), 5)
        flat = flatten(tree)
        tensors += len(flat.tensors)
        assert same(put_together(flat), tree), seed
        assert flatten(tree).json == flat.json, seed
    assert tensors > 1000


def run(code: str, **environment: str) -> str:
    """What a new Python prints that finds modules where this one does."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_equal_sets_give_equal_texts_whatever_the_hash_seed() -> None:
    code = "from pccheck.trees import flatten; print(flatten({'abc', 'def', 'ghi', 1, ('x', 'y')}).json)"
    assert len({run(code, PYTHONHASHSEED=seed) for seed in ("1", "2", "3", "4")}) == 1


# Without numpy and torch


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = """
import sys
sys.modules["numpy"] = sys.modules["torch"] = None
from pccheck.errors import UnsupportedValue
from pccheck.trees import flatten, unflatten
flat = flatten({"a": [1, (2.5, None)], 3: object}, is_tensor=lambda value: value is object)
assert unflatten(flat.json, lambda name, kind: (name, kind)) == {"a": [1, (2.5, None)], 3: ("3", "array")}
del sys.modules["numpy"], sys.modules["torch"]
number = '"dtype":"<f8","v":"0000000000000000"'
for tag, rest in [("numpy", number), ("torch.Size", '"v":[]'), ("numpy.str", '"v":""')]:
    try:
        unflatten('{"pccheck.tree":1,"root":{"a":[{"$":"%s",%s}]}}' % (tag, rest), None)
    except UnsupportedValue as error:
        assert "a[0]" in str(error) and "import " + tag.split(".")[0] in str(error), error
    else:
        raise AssertionError(tag)
assert "numpy" not in sys.modules and "torch" not in sys.modules
"""
    run(code)


# The text itself


def test_the_text_is_what_the_specification_says() -> None:
    tree = {
        "epoch": 3,
        "lr": 0.1,
        "loss": math.inf,
        "big": 2**64,
        "betas": (0.9, 0.95),
        "state": {0: {"step": T}},
        "seen": {"b", "a"},
        "raw": b"\x00\x01",
        "\u00e9": None,
        "log": deque([1], 5),
        "count": Counter(a=1),
        "tag": {"$": 1},
        "x": np.float32(0.5),
        "dtype": torch.bfloat16,
    }
    assert flatten(tree).json == (
        '{"pccheck.tree":1,"root":{"epoch":3,"lr":0.1,"loss":{"$":"float","v":"7ff0000000000000"},'
        '"big":{"$":"int","v":"0x10000000000000000"},"betas":{"$":"tuple","v":[0.9,0.95]},'
        '"state":{"$":"dict","k":[0],"v":[{"step":{"$":"tensor","kind":"torch","name":"state.0.step"}}]},'
        '"seen":{"$":"set","v":["a","b"]},"raw":{"$":"bytes","v":"AAE="},'
        '"\u00e9":null,"log":{"$":"deque","maxlen":5,"v":[1]},"count":{"$":"Counter","of":{"a":1}},'
        '"tag":{"$":"dict","of":{"$":1}},"x":{"$":"numpy","dtype":"<f4","v":"0000003f"},'
        '"dtype":{"$":"torch.dtype","v":"bfloat16"}}}'
    )
