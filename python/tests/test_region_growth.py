"""Prevents: a state that grows (optimizer state, new parameters, longer histories) ending a run or losing the
checkpoints that there were, and a full disk doing more than failing the save.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from states_samples import can_mount, checkpointer, run_python, same, save_once, steps
from torch import nn

import pccheck.torch
from pccheck import errors


class ManyCopies(torch.optim.Optimizer):
    """Keeps five copies of each parameter, of which no hyperparameter tells."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for i in range(5):
                    state.setdefault(f"copy_{i}", torch.zeros_like(p)).add_(p.grad, alpha=1 / (i + 1))
                p.sub_(group["lr"] * state["copy_0"])


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    sum((p * (step + 1)).square().mean() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()


def parameters(count: int = 3, size: int = 200_000) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full((size,), float(i + 1))) for i in range(count)])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.NAdam(p),
    ],
)
def test_the_region_is_made_large_enough_for_state_that_the_first_step_makes(tmp_path: Path, make: Any) -> None:
    model = parameters()
    optimizer = make(model.parameters())
    with checkpointer(tmp_path / "r", model=model, optimizer=optimizer) as made:
        slot_bytes = made.store.got().slot_bytes
        for step in range(2):
            update(model, optimizer, step)
            made.step(step)
        made.wait(60)
        payload = made.checkpoints()[0].payload_bytes
        assert made.store.got().slot_bytes == slot_bytes and made.failures == 0
        # And not much larger than needed.
        assert payload <= slot_bytes <= 1.1 * payload + (4 << 20)


def test_an_optimizer_that_makes_more_than_was_guessed_grows_the_region(tmp_path: Path) -> None:
    model = parameters()
    optimizer = ManyCopies(model.parameters())
    with checkpointer(tmp_path / "r", model=model, optimizer=optimizer, keep=2) as made:
        slot_bytes = made.store.got().slot_bytes
        first = {name: value.clone() for name, value in model.state_dict().items()}
        made.step(0)
        for step in (1, 2, 3):
            update(model, optimizer, step)
            save = made.step(step)
            assert save is not None
            if step == 1:
                assert made.store.got().slot_bytes > slot_bytes
                # What was saved before has moved along, with what was in flight.
                other = parameters()
                assert pccheck.torch.restore(tmp_path / "r", step=0, model=other) == 0
                assert same(dict(other.state_dict()), first)
        made.wait(60)
        assert made.failures == 0 and steps(made)[:2] == [3, 2]
    other, other_optimizer = parameters(), ManyCopies(parameters())
    other_optimizer = ManyCopies(other.parameters())
    with checkpointer(tmp_path / "r", model=other, optimizer=other_optimizer) as made:
        assert made.restore() == 3
    assert same(other_optimizer.state_dict(), optimizer.state_dict())
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_parameters_that_are_added_later(tmp_path: Path) -> None:
    model = parameters(1)
    optimizer = torch.optim.AdamW(model.parameters())
    with checkpointer(tmp_path / "r", model=model, optimizer=optimizer, keep_every=1) as made:
        for step in range(4):
            update(model, optimizer, step)
            made.step(step)
            made.before_update()
            model.append(nn.Parameter(torch.full((400_000,), float(step))))
            optimizer.add_param_group({"params": [model[-1]], "lr": 0.5})
        made.wait(60)
        assert made.failures == 0, made.last_error
        assert steps(made) == [3, 2, 1, 0]
        with pytest.raises(errors.StateMismatch, match=r"model\.4"):
            made.restore()
    other = parameters(1)
    for _ in range(3):
        other.append(nn.Parameter(torch.zeros(400_000)))
    other_optimizer = torch.optim.AdamW([other[0]])
    for p in list(other)[1:]:
        other_optimizer.add_param_group({"params": [p], "lr": 0.5})
    with checkpointer(tmp_path / "r", model=other, optimizer=other_optimizer, keep_every=1) as made:
        assert made.restore() == 3
        assert same(dict(other.state_dict()), {k: v for k, v in model.state_dict().items() if k != "4"})


def test_a_state_that_shrinks_and_grows_again(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    with checkpointer(tmp_path / "r", keep=4, state=state) as made:
        for step, size in enumerate((2_000_000, 10, 3_000_000, 0, 4_000_000)):
            state["x"] = torch.full((size,), float(step))
            made.step(step)
            made.wait(60)
        assert made.failures == 0
        for step, size in ((1, 10), (2, 3_000_000), (3, 0), (4, 4_000_000)):
            target: dict[str, Any] = {}
            assert pccheck.torch.restore(tmp_path / "r", step=step, state=target) == step
            assert torch.equal(target["x"], torch.full((size,), float(step)))


def test_saves_in_flight_outlive_the_growing(tmp_path: Path) -> None:
    state = {"x": torch.zeros(8_000_000), "more": torch.zeros(1)}
    # A pool that takes all at once, so that much is still to be written when the region grows.
    options: dict[str, Any] = {"staging_bytes": 128 << 20, "medium": "auto"}
    with checkpointer(tmp_path / "r", keep=4, max_in_flight=3, state=state, **options) as made:
        saves = []
        for step in range(3):
            state["x"].fill_(step)
            saves.append(made.step(step))
        state["more"] = torch.ones(9_000_000)
        saves.append(made.step(3))
        assert [save.durable(60).step for save in saves if save is not None] == [0, 1, 2, 3]
        made.wait(60)
        assert made.failures == 0 and steps(made) == [3, 2, 1, 0]
        for step in range(3):
            target = {"x": torch.zeros(8_000_000), "more": torch.zeros(1)}
            pccheck.torch.restore(tmp_path / "r", step=step, state=target)
            assert bool((target["x"] == step).all())


SMALL_DISK = """
import os, subprocess, sys, warnings
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", sys.argv[1]], check=True)
sys.path.insert(0, sys.argv[2])
import torch
import pccheck.torch
from pccheck import errors
from states_samples import checkpointer, steps, pins
"""

needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount file systems")


def on_small_disk(folder: Path, program: str) -> str:
    """Runs a program where ``folder`` is a file system of 24 MiB."""
    return run_python(SMALL_DISK + program, folder, Path(__file__).parent, prefix=("unshare", "-m"))


@needs_mount
def test_growing_without_space_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        """
path = os.path.join(sys.argv[1], "r")
state = {"x": torch.zeros(500_000), "i": 0}
with checkpointer(path, state=state, rng=False) as made:
    made.step(0)
    made.wait(60)
    state["x"] = torch.ones(3_000_000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            state["i"] = step
            assert made.step(step) is None
    assert isinstance(made.last_error, errors.NoSpace), repr(made.last_error)
    assert made.failures == 3
    told = [str(w.message) for w in told if issubclass(w.category, pccheck.torch.CheckpointWarning)]
    assert len(told) == 1 and "step 1 failed, training goes on" in told[0] and "bytes are needed" in told[0], told
    assert os.listdir(sys.argv[1]) == ["r"]
    # The old checkpoint is there, and what fits is saved again.
    assert steps(made) == [0]
    other = {"x": torch.ones(500_000), "i": 9}
    assert pccheck.torch.restore(path, state=other) == 0
    assert other["i"] == 0 and not other["x"].any()
    state["x"] = torch.full((500_000,), 4.0)
    made.step(4)
    made.wait(60)
    assert made.failures == 3 and steps(made)[0] == 4
    # A new streak is told of anew.
    state["x"] = torch.ones(3_000_000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.step(5)
    assert [w for w in told if "step 5 failed" in str(w.message)] and made.failures == 4
with checkpointer(path, state=state, rng=False, on_error="raise") as made:
    try:
        made.restore()
        raise AssertionError("the state is of another shape")
    except errors.StateMismatch:
        pass
    state["x"] = torch.zeros(500_000)
    assert made.restore() == 4
    state["x"] = torch.ones(3_000_000)
    try:
        made.step(6)
        raise AssertionError("step must raise")
    except errors.NoSpace:
        pass
    assert made.failures == 1
""",
    )


@needs_mount
def test_a_full_disk_is_found_before_training(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        """
path = os.path.join(sys.argv[1], "r")
model = torch.nn.Linear(1000, 1000)
optimizer = torch.optim.Adam(model.parameters())
for members in ({"model": torch.nn.Linear(2000, 2000)}, {"model": model, "optimizer": optimizer}):
    try:
        checkpointer(path, **members)
        raise AssertionError("there is no room")
    except errors.NoSpace as why:
        assert why.path and why.path.startswith(sys.argv[1]) and "bytes" in str(why), str(why)
    assert os.listdir(sys.argv[1]) == []
with checkpointer(path, model=model) as made:
    made.step(0)
    made.wait(60)
    assert steps(made) == [0]
# More slots than there is room for: what there was stays.
try:
    checkpointer(path, model=model, keep=4)
    raise AssertionError("there is no room")
except errors.NoSpace:
    pass
with checkpointer(path, model=model) as made:
    assert made.restore() == 0
""",
    )


@needs_mount
def test_without_space_for_one_more_pin_the_save_is_made_without(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        """
path = os.path.join(sys.argv[1], "r")
state = {"x": torch.zeros(400_000), "i": 0}
with checkpointer(path, keep_every=1, max_in_flight=1, state=state, rng=False) as made:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(9):
            state["i"] = step
            made.step(step)
            made.wait(60)
    told = [str(w.message) for w in told if "not kept for good" in str(w.message)]
    assert told and made.failures == 0, (told, made.last_error)
    kept = pins(made)
    assert kept == list(range(len(kept))) and 1 < len(kept) < 9 and steps(made)[0] == 8, (kept, steps(made))
    for step in (*kept, 8):
        other = {"x": torch.zeros(400_000), "i": -1}
        assert pccheck.torch.restore(path, step=step, state=other) == step and other["i"] == step
""",
    )


def test_a_region_that_is_larger_than_needed_is_left_as_it_is(tmp_path: Path) -> None:
    pccheck.format_region(tmp_path / "r", slots=9, payload_bytes=8 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        size = (tmp_path / "r").stat().st_size
        save_once(tmp_path / "r", state={"a": 1}, keep_every=1)
    with checkpointer(tmp_path / "r", state={}) as made:
        assert made.store.got().slot_count == 9 and (tmp_path / "r").stat().st_size == size
