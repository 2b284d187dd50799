"""Prevents: a state that comes back with other types, dtypes, bits or ties than it had, or a value that cannot be
stored being dropped, converted or found out only after training has gone on.
"""

from __future__ import annotations

import collections
import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states_samples import Holder, bits_of, checkpointer, content, restored, same, save_once, steps
from torch import nn

import pccheck.torch
from pccheck import errors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (3, 4), (2, 3, 5), (0,), (3, 0, 2)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of random bits: NaNs with payloads, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def all_tensors(seed: int) -> dict[str, torch.Tensor]:
    return {
        f"{dtype}".replace(".", "_") + f"_{i}": random_bits(shape, dtype, seed + i)
        for dtype in DTYPES
        for i, shape in enumerate(SHAPES)
    }


def test_every_dtype_and_shape_comes_back_bit_for_bit_in_place(tmp_path: Path) -> None:
    live, held = all_tensors(1), Holder(all_tensors(2))
    module = nn.Module()
    for name, tensor in all_tensors(3).items():
        module.register_buffer(name, tensor)
    save_once(tmp_path / "r", plain=live, held=held, module=module)
    with pccheck.Store(tmp_path / "r", read_only=True, durability="process") as store, store.open() as checkpoint:
        spelled = {t.dtype for t in checkpoint.tensors.values()}
        assert {"BF16", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "U16", "U32", "U64", "BOOL", "C64", "C128"} <= spelled

    other = all_tensors(4)
    addresses = {name: tensor.data_ptr() for name, tensor in other.items()}
    target, other_held = copy.copy(other), Holder()
    other_module = nn.Module()
    for name, tensor in all_tensors(5).items():
        other_module.register_buffer(name, tensor)
    assert restored(tmp_path / "r", plain=target, held=other_held, module=other_module) == 1
    assert same(target, live)
    assert same(other_held.state, held.state)
    assert same(dict(other_module.state_dict()), dict(module.state_dict()))
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == addresses
    assert all(target[name] is tensor for name, tensor in other.items())


def strided() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    return {
        "transposed": base.transpose(0, 2),
        "stepped": base[:, ::2],
        "reversed_rows": base[1:, 1:3, 1:4],
        "expanded": base[0, 0].expand(4, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.randn(3, 2, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
        "bf16_column": torch.randn(6, 3).bfloat16()[:, 1],
    }


def test_tensors_that_are_not_contiguous_keep_values_and_strides(tmp_path: Path) -> None:
    state = strided()
    save_once(tmp_path / "r", state=state, held=Holder(state))
    target = {name: value.clone() for name, value in strided().items() if name != "expanded"}
    for tensor in target.values():
        tensor.zero_()
    # In place where memory allows it: a transposed one stays transposed.
    target["transposed"] = torch.zeros(3, 4, 5).transpose(0, 2)
    strides = {name: tensor.stride() for name, tensor in target.items()}
    held = Holder()
    restored(tmp_path / "r", state=target, held=held)
    assert all(torch.equal(target[name], state[name]) for name in state)
    assert all(torch.equal(held.state[name], state[name]) for name in state)
    assert all(target[name].stride() == strides[name] for name in strides)
    assert target["channels_last"].is_contiguous(memory_format=torch.channels_last)


def test_a_conjugate_view_is_restored_through_the_conjugation(tmp_path: Path) -> None:
    value = torch.randn(5, dtype=torch.complex64)
    save_once(tmp_path / "r", state={"x": value})
    base = torch.zeros(5, dtype=torch.complex64)
    restored(tmp_path / "r", state={"x": base.conj()})
    assert torch.equal(base, value.conj().resolve_conj())


def nested() -> dict[Any, Any]:
    return {
        0: {1: [torch.arange(3), (torch.tensor(7), "text", None, True)]},
        -5: 2**80,
        "0": "a text key beside an integer one",
        ("a", 1): [0.1, math.inf, -math.inf, -0.0, 5e-324],
        "numpy": {
            "array": np.arange(6, dtype="int16").reshape(2, 3),
            "zero_size": np.zeros((0, 3), "float64"),
            "zero_dim": np.array(2.5, "float32"),
            "complex": np.array([1 + 2j], "complex128"),
            "scalar": np.float32(0.1),
            "integer": np.int64(-3),
            "truth": np.bool_(True),
        },
        "empty": [{}, [], (), ""],
        "counter": collections.Counter({10: 2, 20: 1}),
        "ordered": collections.OrderedDict([("b", torch.ones(2)), ("a", 1)]),
        "bytes": b"\x00\xff",
        "complex": complex(1.5, -0.0),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }


def test_nested_values_come_back_with_their_types(tmp_path: Path) -> None:
    state = nested()
    save_once(tmp_path / "r", state=state, held=Holder(state), items=[1, {2: torch.ones(2)}, (3,)])
    target: dict[Any, Any] = {"what": "goes away"}
    held, items = Holder(), [0]
    restored(tmp_path / "r", state=target, held=held, items=items)
    assert same(target, nested())
    assert same(held.state, nested())
    assert same(items, [1, {2: torch.ones(2)}, (3,)])


def test_numpy_arrays_of_a_dict_are_filled_in_place(tmp_path: Path) -> None:
    save_once(tmp_path / "r", state={"a": np.arange(6.0), "b": np.arange(3), "c": np.arange(4)})
    a, read_only = np.zeros(6), np.zeros(4, int)
    read_only.flags.writeable = False
    target = {"a": a, "b": np.zeros(7), "c": read_only}
    restored(tmp_path / "r", state=target)
    assert target["a"] is a and same(a, np.arange(6.0))
    assert same(target["b"], np.arange(3)) and same(target["c"], np.arange(4))
    assert not read_only.any()


def unsupported() -> dict[str, Any]:
    return {
        "an object": object(),
        "a function": lambda: 0,
        "a class": dict,
        "an array of texts": np.array(["a"]),
        "an array of objects": np.array([None]),
        "a long double": np.zeros(2, "longdouble"),
        "foreign byte order": np.zeros(2, ">f4"),
        "half complex": torch.zeros(2, dtype=torch.complex32),
        "sparse": torch.zeros(2).to_sparse(),
        "a set of modules": {math},
        "a generator": iter([1]),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("what", unsupported())
@pytest.mark.parametrize("held", [True, False])
def test_what_cannot_be_stored_is_refused_before_training_naming_its_place(
    tmp_path: Path, what: str, held: bool
) -> None:
    state = {"x": {"y": [1, unsupported()[what]]}}
    with pytest.raises(errors.UnsupportedValue, match="member.x.y") as refused:
        checkpointer(tmp_path / "r", member=Holder(state) if held else state)
    assert refused.value.at.startswith("member.x.y") and "1" in refused.value.at
    assert not (tmp_path / "r").exists()


def test_what_turns_up_later_is_refused_at_the_save_and_nothing_changes(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    held = Holder({"ok": 1})
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    bad = [object(), torch.eye(3).to_sparse(), nested, torch.empty(3, device="meta")]
    with checkpointer(tmp_path / "r", model=model, held=held) as made:
        made.step(0)
        made.wait(60)
        before = bits_of(model)
        for value in bad:
            held.state = {"bad": [value]}
            with pytest.raises(errors.UnsupportedValue, match=r"held\.bad(\[0\]|\.0)"):
                made.step(1)
        assert bits_of(model) == before and steps(made) == [0]
        held.state = {"ok": 2}
        made.step(2)
        made.wait(60)
        assert steps(made) == [2]


def test_a_meta_tensor_is_refused_at_the_save(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with (
        checkpointer(tmp_path / "r", model=model) as made,
        pytest.raises(errors.UnsupportedValue, match="model.weight.*meta"),
    ):
        made.step(0)


class Tied(nn.Module):
    """An embedding and a head that share their weight, and a head of its own bias."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(self.embedding(tokens))))


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    save_once(tmp_path / "r", model=model)
    with pccheck.Store(tmp_path / "r", read_only=True, durability="process") as store, store.open() as checkpoint:
        tied = {name: info.tied_to for name, info in checkpoint.tensors.items() if info.tied_to}
        assert list(tied.items()) in (
            [("model.head.weight", "model.embedding.weight")],
            [("model.embedding.weight", "model.head.weight")],
        )
    other = Tied()
    address = other.head.weight.data_ptr()
    assert restored(tmp_path / "r", model=other) == 1
    assert other.head.weight is other.embedding.weight and other.head.weight.data_ptr() == address
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_tied_parameters_of_a_meta_model_are_tied_again(tmp_path: Path) -> None:
    model = Tied()
    save_once(tmp_path / "r", model=model)
    with torch.device("meta"):
        other = Tied()
    assert restored(tmp_path / "r", model=other) == 1
    assert other.head.weight is other.embedding.weight
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    untied = Tied(tied=False)
    assert restored(tmp_path / "r", model=untied) == 1
    assert same(untied.head.weight, untied.embedding.weight) and untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_here_but_different_in_the_checkpoint_is_a_mismatch(tmp_path: Path, device: str) -> None:
    save_once(tmp_path / "r", model=Tied(tied=False))
    with torch.device(device):
        other = Tied()
    before = bits_of(other) if device == "cpu" else None
    with pytest.raises(errors.StateMismatch, match="tied to another tensor here") as refused:
        restored(tmp_path / "r", model=other)
    assert "model.embedding.weight" in str(refused.value) and "model.head.weight" in str(refused.value)
    assert before is None or bits_of(other) == before
    assert all(p.device.type == device for p in other.parameters())


def test_tied_tensors_that_are_not_contiguous_are_compared_too(tmp_path: Path) -> None:
    save_once(tmp_path / "r", a={"x": torch.zeros(3, 4)}, b={"x": torch.ones(3, 4)})
    shared = torch.full((4, 3), 5.0).T
    with pytest.raises(errors.StateMismatch, match="tied to another tensor here"):
        restored(tmp_path / "r", a={"x": shared}, b={"x": shared})
    assert torch.equal(shared, torch.full((3, 4), 5.0))


def test_views_of_one_memory_come_back_consistent(tmp_path: Path) -> None:
    def state() -> dict[str, torch.Tensor]:
        base = torch.randn(4, 6)
        return {"whole": base, "flat": base.view(24), "row": base[1], "rows": base[1:3], "bits": base.view(torch.int32)}

    saved, target = state(), state()
    save_once(tmp_path / "r", state=saved)
    restored(tmp_path / "r", state=target)
    assert same(target, saved)
    assert target["row"].data_ptr() == target["whole"][1].data_ptr()


def test_tensors_tied_inside_a_stateful_object_come_back_tied(tmp_path: Path) -> None:
    tensor = torch.randn(5)
    save_once(tmp_path / "r", held=Holder({"a": tensor, "b": [tensor], "c": tensor.clone()}))
    held = Holder()
    restored(tmp_path / "r", held=held)
    assert held.state["a"] is held.state["b"][0] and held.state["c"] is not held.state["a"]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def generators(seed: int) -> dict[str, Any]:
        return {
            "torch_generator": torch.Generator().manual_seed(seed),
            "python": random.Random(seed),
            "numpy_pcg": np.random.default_rng(seed),
            "numpy_mt": np.random.Generator(np.random.MT19937(seed)),
            "numpy_philox": np.random.Generator(np.random.Philox(seed)),
            "numpy_sfc": np.random.Generator(np.random.SFC64(seed)),
            "numpy_legacy": np.random.RandomState(seed),
        }

    def draw(g: dict[str, Any]) -> list[Any]:
        own = [torch.rand(5, generator=g["torch_generator"]).tolist(), g["python"].gauss(0, 1), g["python"].random()]
        numbers = [(g[name].standard_normal(3).tolist(), g[name].random()) for name in g if name.startswith("numpy")]
        return [*own, numbers, random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3)]

    first = generators(1)
    draw(first)
    save_once(tmp_path / "r", **first)
    expected = draw(first)
    second = generators(2)
    draw(second)
    restored(tmp_path / "r", **second)
    assert same(draw(second), expected)


def test_a_tensor_and_a_list_of_models_are_members(tmp_path: Path) -> None:
    tensor, models = torch.randn(4), [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizers = {"a": torch.optim.SGD(models[0].parameters(), 0.5), "b": torch.optim.SGD(models[1].parameters(), 0.25)}
    save_once(tmp_path / "r", tensor=tensor, models=models, optimizers=optimizers)
    other, others = torch.zeros(4), [nn.Linear(2, 2), nn.Linear(2, 2)]
    changed = {"a": torch.optim.SGD(others[0].parameters(), 9.0), "b": torch.optim.SGD(others[1].parameters(), 9.0)}
    restored(tmp_path / "r", tensor=other, models=others, optimizers=changed)
    assert same(other, tensor)
    assert all(content(a) == content(b) for a, b in zip(models[1].parameters(), others[1].parameters(), strict=True))
    assert [changed[name].param_groups[0]["lr"] for name in "ab"] == [0.5, 0.25]
