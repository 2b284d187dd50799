"""Prevents a damaged or hostile tree from doing anything but raise `Corrupt`."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
from trees_samples import (
    CONTAINERS,
    KEYS,
    LONG_INT,
    SCALARS,
    T,
    chain,
    come_back,
    no_tensors,
    random_tree,
    text,
)

from pccheck.errors import Corrupt
from pccheck.trees import DEPTH_LIMIT, flatten, unflatten

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")


HOSTILE = [
    "",
    "null",
    "[]",
    "{}",
    "nonsense",
    '{"pccheck.tree": 1}',
    '{"pccheck.tree": 1, "root": 1, "more": 1}',
    '{"pccheck.tree": 1, "root": 1',
    '{"pccheck.tree": 1, "root": NaN}',
    '{"pccheck.tree": 1, "root": -Infinity}',
    '{"pccheck.tree": 1, "root": 1e999}',
    '{"pccheck.tree": 1, "root": ' + "9" * 5000 + "}",
    '{"pccheck.tree": 1, "root": {"a": 1, "a": 2}}',
    '{"pccheck.tree": 1, "pccheck.tree": 1, "root": 1}',
    '{"pccheck.tree": 1, "root": "\\ud800"}',
    '{"pccheck.tree": 1, "root": {"\\\\\\uDFFF": 1}}',
    '{"pccheck.tree": 1, "root": "\ud800"}',
    '{"pccheck.tree": 1, "root": "\0"}',
    '\ufeff{"pccheck.tree": 1, "root": 1}',
    '{"pccheck.tree": 1, "root": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"pccheck.tree": 1, "root": ' + '{"a":' * 100_000,
    '{"pccheck.tree": 1, "root": ' + "[" * (DEPTH_LIMIT + 1) + "]" * (DEPTH_LIMIT + 1) + "}",
    text(chain(lambda value: {"$": "OrderedDict", "of": {}, "_metadata": value}, DEPTH_LIMIT + 1)),
    text(1, 2),
    text(1, 0),
    text(1, True),
    text(1, 1.0),
    text(1, "1"),
    text(1, None),
]

HOSTILE_ROOTS = [
    {"$": "os.system", "v": "true"},
    {"$": "builtins.eval", "v": []},
    {"$": ["tuple"], "v": []},
    {"$": None},
    {"$": "tuple"},
    {"$": "tuple", "v": {}},
    {"$": "tuple", "v": "ab"},
    {"$": "tuple", "v": [], "w": 1},
    {"$": "dict"},
    {"$": "dict", "of": []},
    {"$": "dict", "of": {}, "k": [], "v": []},
    {"$": "dict", "k": [1], "v": []},
    {"$": "dict", "k": [], "v": [1]},
    {"$": "dict", "k": {}, "v": {}},
    {"$": "dict", "k": [1, 1], "v": [1, 2]},
    {"$": "dict", "k": [1, True], "v": [1, 2]},
    {"$": "dict", "k": [[]], "v": [1]},
    {"$": "dict", "k": [{"$": "tuple", "v": [{}]}], "v": [1]},
    {"$": "dict", "k": [{"$": "tensor", "kind": "torch", "name": "x"}], "v": [1]},
    {"$": "set", "v": [1, 1.0]},
    {"$": "set", "v": [{"$": "set", "v": []}]},
    {"$": "set", "v": [{"$": "tuple", "v": [{"$": "tensor", "kind": "torch", "name": "x"}]}]},
    {"$": "OrderedDict", "of": {}, "__class__": 1},
    {"$": "defaultdict", "factory": "eval", "of": {}},
    {"$": "defaultdict", "factory": ["list"], "of": {}},
    {"$": "defaultdict", "of": {}},
    {"$": "deque", "maxlen": 1, "v": [1, 2]},
    {"$": "deque", "maxlen": -1, "v": []},
    {"$": "deque", "maxlen": True, "v": []},
    {"$": "deque", "maxlen": 2**63, "v": []},
    {"$": "deque", "maxlen": 1.0, "v": []},
    {"$": "int", "v": 1},
    {"$": "int", "v": "0x"},
    {"$": "int", "v": "0x1_0"},
    {"$": "int", "v": " 0x1"},
    {"$": "int", "v": "0x1\n"},
    {"$": "float", "v": "nan"},
    {"$": "float", "v": "7ff8"},
    {"$": "float", "v": "7ff800000000000\n"},
    {"$": "float", "v": "zz" * 8},
    {"$": "float", "v": "7FF8000000000000"},
    {"$": "complex", "v": [1.0]},
    {"$": "complex", "v": [1.0, "a"]},
    {"$": "complex", "v": [1.0, 2]},
    {"$": "complex", "v": [1.0, {"$": "complex", "v": [1.0, 2.0]}]},
    {"$": "bytes", "v": "a"},
    {"$": "bytes", "v": "a\u00e9=="},
    {"$": "bytes", "v": 1},
    {"$": "path", "class": "Popen", "v": "x"},
    {"$": "path", "class": "PurePosixPath", "v": 1},
    {"$": "tensor", "kind": "torch", "name": ""},
    {"$": "tensor", "kind": "torch", "name": 1},
    {"$": "tensor", "kind": "pickle", "name": "x"},
    {"$": "tensor", "kind": ["torch"], "name": "x"},
    [{"$": "tensor", "kind": "torch", "name": "x"}, {"$": "tensor", "kind": "numpy", "name": "x"}],
    {"$": "numpy", "dtype": "O", "v": "00" * 8},
    {"$": "numpy", "dtype": "<f8", "v": "00"},
    {"$": "numpy", "dtype": "<f8\n", "v": "00" * 8},
    {"$": "numpy", "dtype": "V1000000000", "v": ""},
    {"$": "numpy", "dtype": "<f4,<f4", "v": "00" * 8},
    {"$": "numpy", "dtype": "|b1", "v": "02"},
    {"$": "numpy", "dtype": "<M8[0s]", "v": "00"},
    {"$": "numpy", "dtype": "<m8[999999999Y]", "v": "00"},
    {"$": "numpy", "dtype": ["<f8"], "v": "00" * 8},
    {"$": "numpy.str", "v": 1},
    {"$": "numpy.bytes", "v": "*"},
    {"$": "torch.Size", "v": [1.5]},
    {"$": "torch.Size", "v": [True]},
    {"$": "torch.Size", "v": [2**63]},
    {"$": "torch.Size", "v": 3},
    {"$": "torch.dtype", "v": "_dynamo"},
    {"$": "torch.dtype", "v": "nn"},
    {"$": "torch.dtype", "v": "__dict__"},
    {"$": "torch.dtype", "v": ["float32"]},
    {"$": "torch.device", "v": "warp"},
    {"$": "torch.device", "v": "cpu:-1"},
    {"$": "torch.device", "v": "cuda:9999"},
    {"$": "torch.device", "v": 0},
]


HOSTILE += [text({"a": [root]}) for root in HOSTILE_ROOTS]


@pytest.mark.parametrize("json_text", HOSTILE, ids=lambda json_text: ascii(json_text[:60]))
def test_a_damaged_tree_is_refused(json_text: str) -> None:
    with pytest.raises(Corrupt):
        unflatten(json_text, no_tensors)


def test_a_dtype_is_not_looked_up_where_looking_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    with pytest.raises(Corrupt):
        unflatten(text({"$": "torch.dtype", "v": "a_lazy_module"}), no_tensors)
    assert asked == []


def test_a_deep_text_is_refused_even_where_the_stack_would_allow_it() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000_000)
    try:
        for opening in ("[", '{"a":', '{"\\"[": [', '"]", ['):
            with pytest.raises(Corrupt):
                unflatten(opening * 300_000, no_tensors)
    finally:
        sys.setrecursionlimit(limit)


def test_brackets_in_strings_are_not_nesting() -> None:
    for trap in ("[{" * 1000, '"' + "[" * 1000, "\\" * 3 + "[" * 1000, '\\"' + "{" * 999):
        assert come_back({trap: [trap]}) == {trap: [trap]}


@pytest.mark.parametrize(
    ("json_text", "said"),
    [
        (text(1, 2), "version 2"),
        (text({"a": [1, {"$": "tuple2", "v": []}]}), "a[1]"),
        (text({"a": [1, {"$": "tuple2", "v": []}]}), "unknown tag 'tuple2'"),
        (text({"$": "dict", "k": [7], "v": [{"$": "int", "v": ""}]}), "[7]"),
        ('{"pccheck.tree": 1, "root": NaN}', "NaN"),
    ],
)
def test_a_refusal_says_what_and_where(json_text: str, said: str) -> None:
    with pytest.raises(Corrupt) as caught:
        unflatten(json_text, no_tensors)
    assert said in str(caught.value)


def test_what_the_tensor_source_raises_is_passed_on() -> None:
    flat = flatten({"w": T})
    nothing: dict[str, Any] = {}
    with pytest.raises(KeyError, match="w"):
        unflatten(flat.json, lambda name, kind: nothing[name])


def mutated(pick: random.Random, source: str) -> str:
    """The text with a few characters changed, or a piece removed, repeated, or exchanged."""
    for _ in range(pick.randrange(1, 4)):
        at = pick.randrange(len(source))
        end = min(len(source), at + pick.randrange(1, 30))
        kind = pick.randrange(5)
        if kind == 0:
            source = source[:at] + pick.choice('[]{}",:0-e\\utNn$ \0\ud800\u00e9') + source[at + 1 :]
        elif kind == 1:
            source = source[:at] + source[end:]
        elif kind == 2:
            source = source[:at] + source[at:end] * 2 + source[end:]
        elif kind == 3:
            token = pick.choice(["NaN", "1e999", "{}", "[]", '"$"', "null", "-1", '"v"'])
            source = source[:at] + token + source[end:]
        else:
            other = pick.randrange(len(source))
            source = source[:at] + source[other : other + 20] + source[end:]
        source = source or " "
    return source


def replaced(pick: random.Random, value: Any, pool: list[Any]) -> Any:
    """The JSON value with some of its parts exchanged for others: what stays valid JSON reaches further."""
    if pick.random() < 0.04:
        return pick.choice(pool)
    if isinstance(value, list):
        return [replaced(pick, part, pool) for part in value]
    if isinstance(value, dict):
        keys = [pick.choice(["$", "v", "k", "of"]) if pick.random() < 0.02 else key for key in value]
        return {key: replaced(pick, part, pool) for key, part in zip(keys, value.values(), strict=True)}
    return value


def test_a_mutated_tree_is_read_or_refused_as_corrupt() -> None:
    pick = random.Random(7)
    parts = [part for part in [*SCALARS, *CONTAINERS, *KEYS] if part is not LONG_INT]
    sources = [flatten(random_tree(pick, 5)).json for _ in range(300)]
    sources += [flatten(part).json for part in parts]
    sources.append(flatten(parts).json)
    pool: list[Any] = [None, True, 0, -1, 2**70, 1.5, "", "torch", "<f8", "0x1", "list", [], [1], {}]
    pool += [json.loads(flatten(part).json)["root"] for part in parts]
    read = refused = 0
    modules = set(sys.modules)
    for turn in range(30000):
        source = pick.choice(sources)
        if turn % 2:
            text_of = mutated(pick, source)
        else:
            text_of = json.dumps(replaced(pick, json.loads(source), pool), ensure_ascii=False)
        try:
            unflatten(text_of, no_tensors)
            read += 1
        except Corrupt:
            refused += 1
    assert min(read, refused) > 2000
    assert set(sys.modules) == modules
