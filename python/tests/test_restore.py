"""Prevents: a resume that differs from the run that it continues (state converted, moved, half restored, restored into
what nothing refers to), and a restore that does not fit but changes something all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from restore_samples import adam, inputs, net, no_other_warnings, trained
from states_samples import Holder, bits_of, checkpointer, content, restored, run_python, same, save_once, train
from torch import nn
from torch.optim import lr_scheduler as schedulers

import pccheck.torch
from pccheck import errors

__all__ = ["no_other_warnings"]

# ---- in place ---------------------------------------------------------------------------------------------------


def test_parameters_buffers_and_optimizer_state_stay_where_they_are(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer)
    other, other_optimizer = trained(1)
    places = [(name, at) for name, at, _ in bits_of(other, other_optimizer) if at]
    objects = [id(p) for p in other.parameters()]
    restored(tmp_path / "r", model=other, optimizer=other_optimizer)
    assert [(name, at) for name, at, _ in bits_of(other, other_optimizer) if at] == places
    assert [id(p) for p in other.parameters()] == objects
    assert [entry[2] for entry in bits_of(other, other_optimizer)] == [e[2] for e in bits_of(model, optimizer)]


class WideMoments(torch.optim.Optimizer):
    """SGD with moments in float32 and float64 (also inside containers), a text and a count, for parameters of any
    dtype.
    """

    def __init__(self, parameters: Any, lr: float = 0.125) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    zeros = torch.zeros_like(p, dtype=torch.float32)
                    state["moment"], state["kind"], state["count"] = zeros, "wide", torch.zeros((), dtype=torch.int64)
                    state["inner"] = {"factors": [zeros.double(), zeros.to(torch.int8)], "pair": (zeros.clone(), 1)}
                state["moment"].mul_(0.9).add_(p.grad.float() / 3)
                state["inner"]["factors"][0].add_(state["moment"].double() / 7)
                state["inner"]["factors"][1].add_(1)
                state["count"] += 1
                p.sub_((group["lr"] * state["moment"]).to(p.dtype))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw_capturable_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "wide": WideMoments,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    def make(seed: int) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        models: dict[str, nn.Module] = {}
        optimizers = {}
        for kind, optimizer in OPTIMIZERS.items():
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
            groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
            models[kind], optimizers[kind] = model, optimizer(groups)
        return models, optimizers

    models, optimizers = make(0)
    for step in range(3):
        for kind, model in models.items():
            train(model, optimizers[kind], inputs(step).to(dtype))
    save_once(tmp_path / "r", models=models, optimizers=optimizers)
    others, other_optimizers = make(1)
    restored(tmp_path / "r", models=others, optimizers=other_optimizers)
    for kind, model in models.items():
        optimizer, other, other_optimizer = optimizers[kind], others[kind], other_optimizers[kind]
        assert same(other_optimizer.state_dict(), optimizer.state_dict()), kind
        assert all(type(key) is int for key in other_optimizer.state_dict()["state"])
        for step in range(3, 6):
            expected = train(model, optimizer, inputs(step).to(dtype))
            assert train(other, other_optimizer, inputs(step).to(dtype)) == expected, kind
        assert same(other_optimizer.state_dict(), optimizer.state_dict()), kind
        assert same(dict(other.state_dict()), dict(model.state_dict())), kind


def test_lbfgs_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(6, 4)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(inputs(0)).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure).item()  # type: ignore[arg-type,union-attr]

    (model, optimizer), (other, other_optimizer) = make(), make()
    for _ in range(2):
        update(model, optimizer)
    save_once(tmp_path / "r", model=model, optimizer=optimizer)
    restored(tmp_path / "r", model=other, optimizer=other_optimizer)
    assert [update(other, other_optimizer) for _ in range(3)] == [update(model, optimizer) for _ in range(3)]


def _sequential(o: Any) -> Any:
    warm = schedulers.LinearLR(o, 0.1, total_iters=3)
    return schedulers.SequentialLR(o, [warm, schedulers.CosineAnnealingLR(o, 9)], milestones=[3])


#: each goes on changing after 4 steps
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: schedulers.StepLR(o, 2),
    "multi_step": lambda o: schedulers.MultiStepLR(o, [2, 4, 4, 6], gamma=0.5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "warm_restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=20),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.9),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, total_iters=6),
    "constant": lambda o: schedulers.ConstantLR(o, 0.5, 6),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 12, 2.0),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.95**epoch),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.97),
    "sequential": _sequential,
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.5, 3), schedulers.StepLR(o, 2)]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=9),
}


def test_schedules_go_on_exactly(tmp_path: Path) -> None:
    def make() -> tuple[dict[str, torch.optim.Optimizer], dict[str, Any]]:
        optimizers: dict[str, torch.optim.Optimizer] = {
            kind: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9) for kind in SCHEDULERS
        }
        return optimizers, {kind: make(optimizers[kind]) for kind, make in SCHEDULERS.items()}

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, count: int) -> list[Any]:
        seen = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            seen.append([(g["lr"], g.get("momentum"), g.get("initial_lr")) for g in optimizer.param_groups])
        return seen

    optimizers, schedules = make()
    for kind in SCHEDULERS:
        rates(optimizers[kind], schedules[kind], 4)
    save_once(tmp_path / "r", optimizers=optimizers, schedules=schedules)
    others, other_schedules = make()
    restored(tmp_path / "r", optimizers=others, schedules=other_schedules)
    for kind in SCHEDULERS:
        expected = rates(optimizers[kind], schedules[kind], 10)
        assert len({str(rate) for rate in expected}) > 1, f"{kind} does not change any more: the test says nothing"
        assert rates(others[kind], other_schedules[kind], 10) == expected, kind


def test_reduce_on_plateau_goes_on_from_infinity_and_from_a_best(tmp_path: Path) -> None:
    def make() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
        return optimizer, schedulers.ReduceLROnPlateau(optimizer, patience=1, cooldown=1)

    for index, seen in enumerate(([], [3.0, 2.0, 2.5, 2.6])):
        optimizer, schedule = make()
        for loss in seen:
            schedule.step(loss)
        save_once(tmp_path / f"r{index}", optimizer=optimizer, schedule=schedule)
        other, other_schedule = make()
        other_schedule.step(0.5)
        restored(tmp_path / f"r{index}", optimizer=other, schedule=other_schedule)
        assert other_schedule.best == schedule.best and same(other_schedule.state_dict(), schedule.state_dict())
        for loss in (2.4, 2.4, 2.4, 2.4):
            schedule.step(loss)
            other_schedule.step(loss)
            assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), scaler

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> float:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(scaler.get_scale())

    first, second = make(), make()
    for _ in range(3):
        update(*first)
    names = ("model", "optimizer", "scaler")
    save_once(tmp_path / "r", **dict(zip(names, first, strict=True)))
    restored(tmp_path / "r", **dict(zip(names, second, strict=True)))
    assert [update(*second) for _ in range(4)] == [update(*first) for _ in range(4)]
    assert content(second[0].weight) == content(first[0].weight)


# ---- what does not fit ------------------------------------------------------------------------------------------


def test_names_that_differ_are_all_listed_and_nothing_changes(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer, extra={"a": torch.ones(3)})
    other = net(1)
    other.add_module("new", nn.Linear(2, 2))
    other[4] = nn.Linear(8, 5)
    other[0] = nn.Linear(6, 8).to(torch.bfloat16)
    other[1] = nn.Identity()
    held, extra = Holder({"x": 1}), {"a": torch.zeros(4)}
    random_state = torch.get_rng_state()
    before = bits_of(other, extra)
    with (
        checkpointer(tmp_path / "r", model=other, held=held, extra=extra) as made,
        pytest.raises(errors.StateMismatch) as refused,
    ):
        made.restore()
    why = refused.value
    assert bits_of(other, extra) == before and held.state == {"x": 1}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(why.missing) == {"held", "model.new.weight", "model.new.bias"}
    assert "optimizer" in why.unexpected and "model.1.running_mean" in why.unexpected
    kinds = {text.split(": ")[0]: text for text in why.mismatched}
    assert "torch.bfloat16 here, torch.float32 in the checkpoint" in kinds["model.0.weight"]
    assert "shape [4] here, [3] in the checkpoint" in kinds["extra.a"]
    text = str(why)
    assert all(name in text for name in (*why.missing, *why.unexpected, *why.mismatched))
    assert str(tmp_path / "r") in str(why.path)


def test_not_strict_restores_what_fits_and_converts_dtypes(tmp_path: Path) -> None:
    model = net(0)
    save_once(tmp_path / "r", model=model, gone={"x": 1})
    other = nn.Sequential(nn.Linear(6, 8).double(), nn.BatchNorm1d(8), nn.ReLU(), nn.Identity())
    other.add_module("new", nn.Linear(2, 2))
    new = content(other.new.weight)
    with checkpointer(tmp_path / "r", model=other, held=Holder({"x": 1})) as made:
        assert made.restore(strict=False) == 1
    assert other[0].weight.dtype == torch.float64
    assert torch.equal(other[0].weight, model[0].weight.double())
    assert same(other[1].running_mean, model[1].running_mean) and content(other.new.weight) == new
    other[0] = nn.Linear(6, 9)
    before = bits_of(other)
    with (
        checkpointer(tmp_path / "r", model=other) as made,
        pytest.raises(errors.StateMismatch, match=r"shape \[9, 6\] here, \[8, 6\] in the checkpoint"),
    ):
        made.restore(strict=False)
    assert bits_of(other) == before


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ({"x": nn.Linear(2, 2)}, {"x": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}),
        ({"x": {"a": 1}}, {"x": [1]}),
        ({"x": {"a": 1}}, {"x": nn.Linear(2, 2)}),
        ({"x": {"a": 1}}, {"x": torch.zeros(2)}),
        ({"x": [1]}, {"x": nn.Linear(2, 2)}),
        ({"x": torch.zeros(2)}, {"x": {"a": 1}}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, device="meta")}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int32)}),
    ],
)
def test_another_kind_of_member_is_a_mismatch(tmp_path: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    save_once(tmp_path / "r", **saved)
    before = bits_of(here) if not getattr(here["x"], "is_meta", False) else None
    with pytest.raises(errors.StateMismatch, match="x"):
        pccheck.torch.restore(tmp_path / "r", **here)
    assert before is None or bits_of(here) == before


def test_another_kind_of_optimizer_or_other_groups_are_a_mismatch(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer)
    other = net(1)
    before = bits_of(other)
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    with pytest.raises(errors.StateMismatch, match="another kind of optimizer.*momentum.*betas"):
        restored(tmp_path / "r", model=other, optimizer=sgd)
    fewer = torch.optim.AdamW(other[0].parameters())
    with pytest.raises(errors.StateMismatch, match=r"groups of \[2\] parameters here, of \[6\] in the checkpoint"):
        restored(tmp_path / "r", model=other, optimizer=fewer)
    assert bits_of(other) == before and not sgd.state and not fewer.state


def test_an_optimizer_without_its_schedule_is_no_mismatch(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    schedule = schedulers.OneCycleLR(optimizer, 0.1, total_steps=9)
    save_once(tmp_path / "r", model=model, optimizer=optimizer, schedule=schedule)
    other = net(1)
    assert pccheck.torch.restore(tmp_path / "r", optimizer=adam(other)) == 1


# ---- partial ----------------------------------------------------------------------------------------------------


def test_a_prefix_restores_its_part_alone(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer, note={"a": 1})
    other, other_optimizer = trained(1)
    note = {"a": 2}
    random_state = torch.get_rng_state()
    before = {name: content(value) for name, value in other.state_dict().items()}
    state_before = bits_of(other_optimizer)
    with checkpointer(tmp_path / "r", model=other, optimizer=other_optimizer, note=note) as made:
        assert made.restore(only=["model.4", "note"]) == 1
    for name, value in other.state_dict().items():
        expected = content(model.state_dict()[name]) if name.startswith("4.") else before[name]
        assert content(value) == expected, name
    assert bits_of(other_optimizer) == state_before and note == {"a": 1}
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("only", [["modle"], ["model.4", "model.40"], ["model.4.wei"], ["optimizer.state"]])
def test_a_prefix_that_names_nothing_to_restore_is_refused(tmp_path: Path, only: list[str]) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer)
    other, other_optimizer = trained(1)
    before = bits_of(other, other_optimizer)
    with (
        checkpointer(tmp_path / "r", model=other, optimizer=other_optimizer) as made,
        pytest.raises(errors.InvalidArgument, match="only="),
    ):
        made.restore(only=only)
    assert bits_of(other, other_optimizer) == before


# ---- modules of all kinds ---------------------------------------------------------------------------------------


def test_an_optimizer_that_was_made_on_the_meta_device_trains_the_restored_model(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r", model=model, optimizer=optimizer)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    other[0].weight.note = "an attribute of the parameter"  # type: ignore[assignment]
    other[4].bias.requires_grad_(False)
    other_optimizer = adam(other)
    assert restored(tmp_path / "r", optimizer=other_optimizer, model=other) == 1
    other[4].bias.requires_grad_(True)
    assert other[0].weight.note == "an attribute of the parameter"
    expected_random = torch.get_rng_state()
    expected = train(model, optimizer, inputs(9))
    torch.set_rng_state(expected_random)
    assert train(other, other_optimizer, inputs(9)) == expected
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


class Versioned(nn.Module):
    """Has extra state, and a version by which it converts what an older one saved."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.extra: Any = None
        self.loaded_version: int | None = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        self.loaded_version = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_extra_state_and_versions_of_modules_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(), Versioned())
    model[0].extra = {"seen": [1, (2, None)], "tensor": torch.arange(4)}
    model[1].extra = torch.arange(5)
    save_once(tmp_path / "r", model=model, held=Holder(model.state_dict()))
    other = nn.Sequential(Versioned(), Versioned())
    other[1].extra = torch.zeros(5, dtype=torch.int64)
    held = Holder()
    restored(tmp_path / "r", model=other, held=held)
    assert same(other[0].extra, model[0].extra) and same(other[1].extra, model[1].extra)
    assert [part.loaded_version for part in other] == [3, 3]
    assert held.state._metadata["0"] == {"version": 3}


class Hooked(nn.Module):
    """Saves its weight under another name, and doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_state_dict_post_hook(self._saved)
        self.register_load_state_dict_pre_hook(self._loaded)

    @staticmethod
    def _saved(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        state[f"{prefix}stored"] = state.pop(f"{prefix}weight") * 2

    @staticmethod
    def _loaded(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}stored") / 2


def test_hooks_of_a_module_see_what_they_saved(tmp_path: Path) -> None:
    model, other = nn.Sequential(Hooked(), nn.Linear(2, 2)), nn.Sequential(Hooked(), nn.Linear(2, 2))
    save_once(tmp_path / "r", model=model)
    address = other[0].weight.data_ptr()
    restored(tmp_path / "r", model=other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert content(other[0].weight) == content(model[0].weight) and other[0].weight.data_ptr() == address


def test_a_compiled_model_and_an_averaged_one(tmp_path: Path) -> None:
    model = net(0)
    compiled, averaged = torch.compile(net(1), backend="eager"), torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    save_once(tmp_path / "r", compiled=compiled, averaged=averaged)
    other, other_averaged = torch.compile(net(2), backend="eager"), torch.optim.swa_utils.AveragedModel(net(3))
    restored(tmp_path / "r", compiled=other, averaged=other_averaged)
    assert same(dict(other.state_dict()), dict(compiled.state_dict()))
    assert same(dict(other_averaged.state_dict()), dict(averaged.state_dict()))
    with pytest.raises(errors.StateMismatch, match=r"compiled\._orig_mod\.0\.weight"):
        pccheck.torch.restore(tmp_path / "r", compiled=net(4))


# ---- distributed data parallel ----------------------------------------------------------------------------------

DDP = """
import sys, torch
from torch import nn
import torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from states_samples import checkpointer, same
import pccheck.torch
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + ".rendezvous", rank=0, world_size=1)
def make(seed):
    torch.manual_seed(seed)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    return model, torch.optim.AdamW(model.parameters())
def update(model, optimizer, step):
    optimizer.zero_grad()
    loss = model(torch.full((3, 4), float(step))).square().sum()
    loss.backward()
    optimizer.step()
    return float(loss)
model, optimizer = make(0)
with checkpointer(sys.argv[1] + "{rank}", model=model, optimizer=optimizer) as made:
    for step in range(3):
        update(model, optimizer, step)
        made.step(step)
other, other_optimizer = make(1)
with checkpointer(sys.argv[1] + "{rank}", model=other, optimizer=other_optimizer) as made:
    assert made.path.endswith("r0")
    assert made.restore() == 2
assert [update(other, other_optimizer, s) for s in (3, 4)] == [update(model, optimizer, s) for s in (3, 4)]
assert same(dict(other.state_dict()), dict(model.state_dict()))
assert pccheck.torch.restore(sys.argv[1] + "{rank}", model=other) == 2
dist.destroy_process_group()
"""


def test_a_ddp_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run_python(DDP, tmp_path / "r", Path(__file__).parent)
