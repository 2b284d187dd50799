"""Prevents: a save that reads memory which its tensor has left, or that nobody keeps, because the tensors of the save
before were taken for those of this one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pccheck
from pccheck import arrays, errors


def saved(store: pccheck.Store, step: int, state: dict[str, Any]) -> dict[str, bytes]:
    """The bytes that a save of this state holds."""
    store.save(step, state).durable(30)
    found = {}
    with store.open(step=step) as checkpoint:
        assert set(checkpoint) == set(state)
        for name, info in checkpoint.tensors.items():
            back = bytearray(info.nbytes)
            checkpoint.read_bytes(name, 0, back)
            found[name] = bytes(back)
    return found


def expected(state: dict[str, Any]) -> dict[str, bytes]:
    # A copy: a storage that numpy has seen can no longer be resized.
    plain = {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }
    return {name: np.asarray(value).tobytes() for name, value in plain.items()}


def replace_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.full_like(tensor, 7)


def resize(tensor: torch.Tensor) -> None:
    tensor.resize_(5).fill_(8)


def take_other_storage(tensor: torch.Tensor) -> None:
    tensor.set_(torch.full((9,), 9.0))


CHANGES: list[Callable[[torch.Tensor], object]] = [
    lambda tensor: tensor.add_(1),
    replace_data,
    resize,
    lambda tensor: tensor.resize_(100).fill_(3),
    take_other_storage,
    lambda tensor: tensor.unsqueeze_(0),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_changed_is_saved_as_it_is_now(store: pccheck.Store, change: Callable[..., object]) -> None:
    state = {"a": torch.arange(10.0), "b": torch.arange(20.0), "n": np.arange(3)}
    for step in range(4):
        assert saved(store, step, state) == expected(state)
        with torch.no_grad():
            change(state["a"])
    with store.open() as checkpoint:
        shape = checkpoint.tensors["a"].shape
    assert saved(store, 9, state) == expected(state)
    with store.open() as checkpoint:
        assert checkpoint.tensors["a"].shape == tuple(state["a"].shape)
    assert shape


def test_other_tensors_and_other_names_are_looked_at_anew(store: pccheck.Store) -> None:
    for step, state in enumerate(
        [
            {"a": torch.zeros(4), "b": torch.ones(5)},
            {"a": torch.ones(4), "b": torch.zeros(5)},
            {"b": torch.ones(4), "a": torch.zeros(5)},
            {"a": torch.ones(4, dtype=torch.int64), "b": torch.zeros(5, dtype=torch.bfloat16).float()},
            {"a": np.ones(4), "b": torch.nn.Parameter(torch.zeros(5))},
            {"a": torch.ones(3), "b": torch.zeros(5), "c": torch.ones(())},
        ]
    ):
        assert saved(store, step, state) == expected(state)


def test_a_tensor_that_cannot_be_saved_any_more_is_refused(store: pccheck.Store) -> None:
    state = {"a": torch.zeros(4, 5)}
    saved(store, 1, state)
    state["a"].t_()
    with pytest.raises(errors.InvalidArgument, match="contiguous"):
        store.save(2, state)
    state["a"].t_()
    assert saved(store, 3, state) == expected(state)
    state["a"].untyped_storage().resize_(8)
    with pytest.raises(errors.InvalidArgument, match="resized"):
        store.save(4, state)
    state["a"] = torch.ones(4, 5)
    assert saved(store, 5, state) == expected(state)
    # Elsewhere, and too small.
    state["a"] = torch.ones(4, 5)
    state["a"].untyped_storage().resize_(8)
    with pytest.raises(errors.InvalidArgument, match="resized"):
        store.save(6, state)


def transpose(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.t()


def negate(tensor: torch.Tensor) -> None:
    tensor.data = torch._neg_view(tensor.data)


def conjugate(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.conj()


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        (transpose, torch.float32, "contiguous"),
        (negate, torch.float32, "negative"),
        (conjugate, torch.complex64, "conjugate"),
    ],
)
def test_what_changed_where_it_is_is_refused(
    store: pccheck.Store, change: Callable[[torch.Tensor], None], dtype: torch.dtype, reason: str
) -> None:
    state = {"other": torch.zeros(3), "square": torch.arange(9.0).reshape(3, 3).to(dtype)}
    saved(store, 1, state)
    before = (id(state["square"]), state["square"].data_ptr(), state["square"].shape)
    change(state["square"])
    assert (id(state["square"]), state["square"].data_ptr(), state["square"].shape) == before
    with pytest.raises(errors.InvalidArgument, match=f"'square'.*{reason}"):
        store.save(2, state)
    change(state["square"])
    assert saved(store, 3, state) == expected(state)


def test_another_dtype_at_the_same_place_is_seen(store: pccheck.Store) -> None:
    state = {"a": torch.arange(6, dtype=torch.int32)}
    saved(store, 1, state)
    state["a"].data = state["a"].data.view(torch.float32)
    assert saved(store, 2, state) == expected(state)
    with store.open() as checkpoint:
        assert checkpoint.tensors["a"].dtype == "F32"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "other",
    [
        lambda dense: dense.to_sparse(),
        lambda dense: dense.to_sparse_csr(),
        lambda dense: torch.nested.nested_tensor([dense[0], dense[1]]),
        lambda dense: dense.to_mkldnn(),
        lambda dense: dense.to("meta"),
    ],
    ids=["coo", "csr", "nested", "mkldnn", "meta"],
)
def test_what_has_no_memory_is_refused_in_the_place_of_what_has(
    store: pccheck.Store, other: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    dense = torch.ones(2, 3)
    saved(store, 1, {"a": dense})
    for step in (2, 3):
        with pytest.raises((errors.InvalidArgument, errors.Unsupported), match="'a'"):
            store.save(step, {"a": other(dense)})
    assert saved(store, 4, {"a": dense}) == expected({"a": dense})


def test_tensors_between_arrays_that_move_are_found(store: pccheck.Store) -> None:
    state = {"n": np.arange(3), "a": torch.zeros(4), "m": np.arange(5), "b": torch.ones(4), "c": torch.ones(4)}
    for step in range(4):
        assert saved(store, step, state) == expected(state)
        state["b"] = torch.full((4,), float(step))
        state["m"] = np.arange(step, step + 5)
        kept = state["b"]
    assert saved(store, 9, state) == expected(state)
    del kept


def test_an_array_of_another_shape_is_seen(store: pccheck.Store) -> None:
    tensor = torch.zeros(2)
    for step, shape in enumerate([(6,), (6,), (4,), (2, 3), (3, 2), (6,)]):
        state = {"t": tensor, "n": np.arange(step, step + np.prod(shape)).reshape(shape)}
        assert saved(store, step, state) == expected(state)
        with store.open(step=step) as checkpoint:
            assert checkpoint.tensors["n"].shape == shape


def test_a_storage_that_ends_before_the_tensor_at_its_new_place_is_seen(store: pccheck.Store) -> None:
    state = {"a": torch.ones(4)}
    saved(store, 1, state)
    base = torch.arange(9.0)
    state["a"] = base[5:]
    assert saved(store, 2, state) == expected({"a": torch.arange(5.0, 9.0)})
    # Of the 16 bytes at 20 it has 8.
    base.untyped_storage().resize_(28)
    with pytest.raises(errors.InvalidArgument, match="resized"):
        store.save(3, state)


def test_memory_is_held_by_what_was_packed() -> None:
    packer, tensor = arrays.Packer(), torch.zeros(1000)
    for _ in range(3):
        address, packed = tensor.data_ptr(), packer.pack({"n": np.zeros(3), "a": tensor})
        tensor.data = torch.ones(1000)
        held = [owner for owner in packed.owners[-1] if isinstance(owner, torch.UntypedStorage)]
        assert [storage.data_ptr() for storage in held] == [address]


def test_nothing_is_kept_alive_once_it_is_saved(store: pccheck.Store) -> None:
    state: dict[str, Any] = {"a": torch.zeros(4), "b": np.zeros(5)}
    gone = [weakref.ref(state["a"]), weakref.ref(state["b"])]
    save = store.save(1, state)
    save.durable(30)
    state.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_memory_is_kept_until_it_is_copied_though_it_was_known(store: pccheck.Store) -> None:
    tensor = torch.full((1 << 20,), 5.0)
    saved(store, 1, {"a": tensor})
    save = store.save(2, {"a": tensor})
    # The tensor goes elsewhere at once; what it had is still read.
    tensor.data = torch.zeros(1)
    del tensor
    junk = [torch.zeros(1 << 20) for _ in range(8)]
    save.durable(30)
    with store.open(step=2) as checkpoint:
        assert (checkpoint["a"] == 5.0).all()
    del junk
