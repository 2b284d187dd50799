"""Prevents: a save that takes the state for what it was at the save before, or keeps more of it alive than memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pccheck
from pccheck.torch import Checkpointer, members, snapshot

POOL: dict[str, Any] = {"staging_bytes": 16 << 20, "chunk_bytes": 1 << 20, "durability": "process"}


def add_a_key(state: dict[str, Any]) -> None:
    state["more"] = torch.full((3,), 4.0)


def rename_a_key(state: dict[str, Any]) -> None:
    state["layers"]["renamed"] = state["layers"].pop("w")


def remove_a_key(state: dict[str, Any]) -> None:
    del state["layers"]["w"]


def exchange(state: dict[str, Any]) -> None:
    layers = state["layers"]
    layers["w"], layers["v"] = layers["v"], layers["w"]


def replace_memory(state: dict[str, Any]) -> None:
    state["layers"]["w"].data = torch.full((100, 3), 7.0)


def change_a_number(state: dict[str, Any]) -> None:
    state["counts"]["epoch"] += 1


def change_a_type(state: dict[str, Any]) -> None:
    state["counts"]["epoch"] = True


def change_a_float(state: dict[str, Any]) -> None:
    state["groups"][0]["lr"] *= 0.5


def change_an_array(state: dict[str, Any]) -> None:
    state["array"][1] = 8


def change_a_shape(state: dict[str, Any]) -> None:
    state["layers"]["v"].unsqueeze_(0)


def change_a_dtype(state: dict[str, Any]) -> None:
    state["layers"]["w"].data = state["layers"]["w"].data.to(torch.bfloat16)


def transpose(state: dict[str, Any]) -> None:
    state["square"].data = state["square"].data.t()


def conjugate(state: dict[str, Any]) -> None:
    state["complex"].data = state["complex"].data.conj()


def negate(state: dict[str, Any]) -> None:
    state["square"].data = torch._neg_view(state["square"].data)


def change_scalars(state: dict[str, Any]) -> None:
    state["steps"] = [torch.tensor(float(n)) for n in range(3, 9)]


CHANGES = [
    add_a_key,
    rename_a_key,
    remove_a_key,
    exchange,
    replace_memory,
    change_a_number,
    change_a_type,
    change_a_float,
    change_an_array,
    change_a_shape,
    change_a_dtype,
    transpose,
    conjugate,
    negate,
    change_scalars,
]


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.resolve_conj(), b.resolve_conj())
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_between_two_saves_is_saved(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state: dict[str, Any] = {
        "layers": {"w": torch.arange(300.0).reshape(100, 3), "v": torch.ones(100, 3)},
        "complex": torch.arange(4.0) * (1 + 2j),
        "square": torch.arange(900.0).reshape(30, 30),
        "steps": [torch.tensor(float(n)) for n in range(6)],
        "groups": [{"lr": 0.5, "params": [0, 1, 2]}],
        "counts": {"epoch": 1, "batch": 2},
        "array": np.arange(5),
    }
    with Checkpointer(tmp_path / "r", state=state, **POOL) as saver:
        for step in (0, 1):
            saver.save(step)
            saver.wait(60)
        change(state)
        saver.save(2)
        saver.wait(60)
        assert saver.failures == 0
    back: dict[str, Any] = {}
    with Checkpointer(tmp_path / "r", state=back, **POOL) as saver:
        assert saver.restore() == 2
    assert same(back, state)


class Wrapper(torch.Tensor):
    """Looks like an ordinary tensor, and has no memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_are_seen_at_once_as_they_are_one_by_one() -> None:
    with torch.inference_mode():
        inference = torch.ones(3)
    complex_ = torch.ones(3, dtype=torch.complex64)
    cases = {
        "plain": torch.ones(3),
        "half": torch.ones(3, dtype=torch.float8_e5m2),
        "transposed": torch.ones(3, 4).t(),
        "complex": complex_,
        "conj": complex_.conj(),
        "neg": torch._neg_view(torch.ones(3)),
        "imag": complex_.conj().imag,
        "inference": inference,
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "coo": torch.ones(3).to_sparse(),
        "csr": torch.ones(3, 3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "mkldnn": torch.ones(3).to_mkldnn(),
        "meta": torch.ones(3, device="meta"),
        "parameter": nn.Parameter(torch.ones(3)),
        "wrapper": Wrapper(torch.ones(3)),
    }
    for name, tensor in cases.items():
        assert snapshot._readable([torch.zeros(2), tensor]) == [True, snapshot._is_readable(tensor)], name


def watched(**tensors: torch.Tensor) -> snapshot.Live:
    return snapshot.take(dict(tensors), list(tensors.values()), hashes=False).live


def test_exactly_what_changed_is_named() -> None:
    tensors = {name: torch.zeros(50) for name in "abc"}
    live = watched(**tensors)
    assert live.names == ["a", "b", "c"] and live.changed() == []
    tensors["b"].add_(1)
    assert live.changed() == ["b"]
    hashed = snapshot.take(dict(tensors), list(tensors.values()), hashes=True).live
    tensors["c"].data[3] = 5
    assert hashed.changed() == ["c"]
    tensors["a"].mul_(1)
    assert hashed.changed() == ["a", "c"]
    hashed.clear()
    assert hashed.changed() == []


@pytest.mark.parametrize("hashes", [False, True])
def test_memory_that_a_tensor_left_has_not_changed(hashes: bool) -> None:
    tensor = torch.zeros(50)
    taken = snapshot.take({"a": tensor}, [tensor], hashes=hashes)
    tensor.data = torch.ones(50)
    assert taken.live.names == ["a"] and taken.changed() == []


def test_what_led_to_a_tensor_is_not_kept_alive() -> None:
    leaf = torch.ones(50, requires_grad=True)
    inner = leaf * 2
    state = {"a": inner.exp(), "small": (leaf * 3)[0], "large": torch.zeros(2 << 20)}
    alive = weakref.ref(inner)
    taken = snapshot.take(state, [state["a"], state["large"]], hashes=False)
    assert not any(tensor.requires_grad for tensor in taken.tensors.values())
    state.clear()
    del inner
    gc.collect()
    assert alive() is None


def test_the_tensors_of_any_optimizer_are_found() -> None:
    a, b, c, d = (torch.full((1,), float(n)) for n in range(4))
    for state, expected in [
        ({0: {"m": a, "v": b}, 1: {"m": c}}, [a, b, c]),
        ({0: {"m": a, "step": 3}, 1: {"m": [b, (c,)]}}, [a, b, c]),
        ({0: {"m": a}, "outer": d}, [a, d]),
        ({0: {"m": {"deep": a}}, 1: {}}, [a]),
    ]:
        assert list(map(id, members._tensors(state, []))) == list(map(id, expected))


def test_a_tensor_that_goes_after_a_save_is_freed(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 20), "small": torch.zeros(())}
    with Checkpointer(tmp_path / "r", state=state, **POOL) as saver:
        for step in range(3):
            save = saver.save(step)
            assert isinstance(save, pccheck.Save)
            saver.wait(60)
        alive = [weakref.ref(value) for value in state.values()]
        state.clear()
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
