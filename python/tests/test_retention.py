"""Prevents: a checkpoint that was to be kept being overwritten, one that was not to be kept staying for ever, and pins
that make saves fail.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from states_samples import SMALL, checkpointer, pins, run_python, steps

import pccheck.torch
from pccheck import errors
from pccheck.torch import Best


def save_all(made: pccheck.torch.Checkpointer, losses: list[tuple[int, float]]) -> None:
    for step, loss in losses:
        made.step(step, {"loss": loss, "other": -loss})
        made.wait(60)
    assert made.failures == 0, made.last_error


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    state = {"i": 0}
    with checkpointer(tmp_path / "r", keep=3, state=state) as made:
        for step in range(10):
            state["i"] = step
            made.step(step)
            made.wait(60)
        assert steps(made) == [9, 8, 7] and pins(made) == []
    with checkpointer(tmp_path / "r", keep=3, state=state) as made:
        assert steps(made)[:3] == [9, 8, 7]
        for step in (8, 7, 9):
            assert made.restore(step=step) == step and state == {"i": step}


def test_every_saves_when_due_and_save_always(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", keep=9, every=3, state={}) as made:
        for step in range(8):
            assert (made.step(step) is not None) == (step in (0, 3, 6))
            made.wait(60)
        made.save(7)
        made.wait(60)
        assert steps(made) == [7, 6, 3, 0]


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_every_mth_step_is_kept_for_good_and_the_region_grows_for_it(tmp_path: Path, in_flight: int) -> None:
    state = {"x": torch.zeros(1000), "i": 0}
    with checkpointer(tmp_path / "r", keep_every=2, max_in_flight=in_flight, keep=1, state=state) as made:
        slots = made.store.got().slot_count
        for step in range(25):
            state["i"] = step
            state["x"].fill_(step)
            # Without waiting: pinned saves in flight need slots, too.
            made.step(step)
        made.wait(60)
        assert made.failures == 0, made.last_error
        assert pins(made) == list(range(0, 25, 2)) and made.store.got().slot_count > slots
        for step in (0, 12, 24):
            assert made.restore(step=step) == step
            assert state["i"] == step and bool((state["x"] == step).all())
    with checkpointer(tmp_path / "r", keep_every=2, max_in_flight=in_flight, state=state) as made:
        assert made.restore() == 24 and pins(made) == list(range(0, 25, 2))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_are_kept_and_nothing_else(tmp_path: Path, mode: str) -> None:
    losses = [math.nan, 5.0, 7.0, 4.0, math.nan, 4.0, 9.0, 3.0, math.inf, 6.0, 3.0, -math.inf, 8.0]
    sign = 1.0 if mode == "min" else -1.0
    with checkpointer(tmp_path / "r", keep_best=Best("loss", mode, 2), every=100, state={"a": 1}) as made:
        kept: list[tuple[float, int]] = []
        for step, loss in enumerate(losses, start=1):
            save_all(made, [(step, sign * loss)])
            if not math.isnan(loss):
                # Of equals the older one stays.
                kept = sorted([*kept, (loss, step)])[:2]
            assert pins(made) == sorted(step for _, step in kept), f"after step {step}"
        assert pins(made) == [8, 12]
        made.step(14, {"other": -100.0})
        made.wait(60)
        assert pins(made) == [8, 12]


def test_best_and_periodic_ones_do_not_displace_each_other(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", keep_best=Best("loss"), keep_every=4, state={"a": 1}) as made:
        save_all(made, [(0, 1.0), (1, 9.0), (2, 5.0), (3, 6.0), (4, 0.5), (5, 4.0), (6, 7.0)])
        # Periodic ones are kept anyway, so that the best of the others is kept beside them.
        assert pins(made) == [0, 4, 5]


def test_a_resumed_run_goes_on_with_the_list_of_the_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_best": Best("loss", "max", 2), "state": {"a": 1}}
    with checkpointer(tmp_path / "r", **options) as made:
        save_all(made, [(1, 5.0), (2, math.inf), (3, 7.0), (4, 1.0)])
        assert pins(made) == [2, 3]
    with checkpointer(tmp_path / "r", **options) as made:
        made.restore()
        save_all(made, [(5, 6.0), (6, 8.0)])
        assert pins(made) == [2, 6]
        save_all(made, [(7, 7.0)])
        assert pins(made) == [2, 6]
    # A smaller list drops the worst.
    with checkpointer(tmp_path / "r", keep_best=Best("loss", "max", 1), state={}) as made:
        assert pins(made) == [2]


KILLED = """
import json, os, sys, warnings
sys.path.insert(0, sys.argv[2])
from states_samples import checkpointer
from pccheck.torch import Best
import pccheck
made = checkpointer(sys.argv[1], keep_best=Best("loss"), state={"a": 1})
# Killed where it would unpin what was displaced.
pccheck.Store.unpin = lambda store, generation: os._exit(9 if json.loads(sys.argv[3]) else 1)
for step, loss in enumerate((5.0, 4.0)):
    made.step(step, {"loss": loss})
    made.wait(60)
"""


def test_a_process_killed_between_pin_and_unpin_leaves_nothing_that_blocks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_python(KILLED, tmp_path / "r", Path(__file__).parent, "true")
    with pccheck.Store(tmp_path / "r", read_only=True, durability="process") as store:
        assert sorted(info.step for info in store.checkpoints() if info.pinned) == [0, 1]
    with checkpointer(tmp_path / "r", keep_best=Best("loss"), state={"a": 1}) as made:
        assert made.restore() == 1 and pins(made) == [1]
        slots = made.store.got().slot_count
        save_all(made, [(step, 5.0 - step) for step in range(2, 12)])
        assert pins(made) == [11] and made.store.got().slot_count == slots


def test_more_in_flight_or_kept_than_pins_leave_room_for_grows_the_region(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", keep_every=1, max_in_flight=1, state={"a": 1}) as made:
        save_all(made, [(step, 0.0) for step in range(4)])
    with checkpointer(tmp_path / "r", max_in_flight=3, keep=2, state={"a": 1}) as made:
        assert made.store.got().slot_count >= 4 + 3 + 2 and made.restore() == 3
        for step in range(4, 12):
            made.step(step)
        made.wait(60)
        assert made.failures == 0 and pins(made) == [0, 1, 2, 3] and steps(made)[:2] == [11, 10]


def test_with_no_slot_left_to_pin_the_save_is_made_without(tmp_path: Path) -> None:
    pccheck.format_region(tmp_path / "r", slots=240, payload_bytes=1 << 20)
    with pccheck.Store(tmp_path / "r", **{k: v for k, v in SMALL.items() if k != "on_sigterm"}) as store:
        for step in range(236):
            store.save(step, {"x": torch.zeros(1)}, {"tree": '{"pccheck.tree":1,"root":{}}'}, pin=True).durable(30)
    with checkpointer(tmp_path / "r", keep_every=1, state={"a": 1}, rng=False) as made:
        made.restore(strict=False)
        made.step(236)
        made.wait(60)
        assert pins(made) == list(range(237))
        with pytest.warns(UserWarning, match="step 237 is not kept for good.*240 slots at most"):
            made.step(237)
        made.wait(60)
        assert made.failures == 0 and steps(made)[0] == 237 and pins(made) == list(range(237))


def test_a_damaged_pinned_checkpoint_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", keep_best=Best("loss"), state={"a": 1}, rng=False) as made:
        save_all(made, [(1, 1.0), (2, 2.0), (3, 3.0)])
        (pinned,) = (info for info in made.checkpoints() if info.pinned)
        slots, slot_bytes = made.store.got().slot_count, made.store.got().slot_bytes
    path = tmp_path / "r"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - (slots - pinned.slot) * slot_bytes + 3)
        file.write(b"\xff")
    state = {"a": 0}
    with pytest.warns(UserWarning, match="pinned checkpoint of step 1 is damaged"):
        made = checkpointer(path, keep_best=Best("loss"), state=state, rng=False)
    with made:
        assert made.restore() == 3 and state == {"a": 1}
        save_all(made, [(4, 2.5), (5, 2.0)])
        assert pins(made) == [1, 5]


def test_discarding_takes_pinned_ones_too_and_starts_the_list_anew(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", keep_best=Best("loss"), keep_every=2, state={"a": 1}) as made:
        save_all(made, [(0, 1.0), (1, 0.5), (2, 1.0)])
        assert made.discard() == 3
        assert made.checkpoints() == [] and made.restore() is None
        # Worse than what is gone, and the best of what there is.
        save_all(made, [(1, 9.0), (3, 10.0)])
        assert pins(made) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_every": 0}, {"keep_every": 1.5}, {"keep_best": "loss"}, {"keep": 0}, {"keep": 240}, {"max_in_flight": 0},
        {"max_in_flight": 2.0}, {"every": 0}, {"every": "often"}, {"on_error": "ignore"}, {"durability": "none"},
        {"medium": "tape"},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_and_leave_nothing_behind(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument, match=next(iter(wrong)).replace("240", "")):
        checkpointer(tmp_path / "r", state={}, **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [("loss", "least"), ("loss", "min", 0), ("loss", "min", 1.5)])
def test_a_best_that_means_nothing_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="expected mode"):
        Best(*wrong)
