"""Failure prevented: a checkpoint that mixes two iterations, because training went on while it was copied.

Each iteration fills every tensor of parameters and optimizer state, in place, with one value: its own number, the
moment it may. So a sound checkpoint holds one value, that of its step; buffers and Python values are overwritten the
moment ``step()`` has returned. The staging pool is a small part of the state, so that copying goes on long after that.
The last tests plant faults, which proves that torn checkpoints would be seen.
"""

# What needs torch is imported once it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("numpy")

import numpy as np
import torch

import pccheck
from pccheck import errors
from pccheck.torch import TREE_KEY, Checkpointer, CheckpointWarning, snapshot
from pccheck.torch.settling import Settler

ITERATIONS = 10
# 8 MB in tensors, a pool of 1 MB.
TENSORS, SIDE = 4, 512
POOL: Any = {"chunk_bytes": 128 << 10, "staging_bytes": 1 << 20, "max_in_flight": 3, "keep": ITERATIONS}


class Fill(torch.optim.Optimizer):
    """Overwrites parameters and its own state with the number of the iteration, as fast as memory allows."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.value = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.fill()

    def fill(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter)
                state["moment"].fill_(self.value)
                parameter.fill_(self.value)


class Model(torch.nn.Module):
    """Equal parameters, and a buffer: a small one is copied at once, for a large one the trainer waits."""

    def __init__(self, buffer_side: int) -> None:
        super().__init__()
        for i in range(TENSORS):
            self.register_parameter(f"p{i}", torch.nn.Parameter(torch.zeros(SIDE, SIDE)))
        self.buffer: torch.Tensor
        # Its dtype puts it behind everything else in a checkpoint, so that it is copied last.
        self.register_buffer("buffer", torch.zeros(buffer_side, buffer_side, dtype=torch.int8))


Update = Callable[[Checkpointer, Fill], None]


def by_hook(ckpt: Checkpointer, fill: Fill) -> None:
    """An optimizer's step, and nothing else."""
    fill.step()


@torch.no_grad()
def by_hand(ckpt: Checkpointer, fill: Fill) -> None:
    """An update that no hook sees."""
    ckpt.before_update()
    fill.fill()


@torch.no_grad()
def without_waiting(ckpt: Checkpointer, fill: Fill) -> None:
    """A trainer's mistake."""
    fill.fill()


@torch.no_grad()
def past_the_counters(ckpt: Checkpointer, fill: Fill) -> None:
    """The same, in a way that version counters do not see."""
    for parameter in fill.param_groups[0]["params"]:
        fill.state[parameter]["moment"].data.fill_(fill.value)
        parameter.data.fill_(fill.value)


@dataclass
class Run:
    """What a run left behind."""

    #: step -> every number in the tensors of its checkpoint
    values: dict[int, set[float]]
    #: step -> its Python values
    numbers: dict[int, Any]
    failures: int
    last_error: pccheck.errors.PccheckError | None
    #: saves that were still being copied when step() returned
    early: int

    @property
    def torn(self) -> list[int]:
        return [step for step, found in self.values.items() if found != {float(step)}]


def train(path: Path, update: Update, *, buffer_side: int = 100, **more: Any) -> Run:
    """Updates and saves as fast as it can, then reads back every checkpoint that became durable."""
    numbers: dict[str, Any] = {"iteration": 0, "nested": [0]}
    model = Model(buffer_side)
    fill = Fill(model.parameters())
    fill.step()
    early = 0
    with Checkpointer(path, model=model, optimizer=fill, numbers=numbers, rng=False, **POOL, **more) as ckpt:
        for i in range(1, ITERATIONS + 1):
            fill.value = float(i)
            update(ckpt, fill)
            model.buffer.fill_(i)
            numbers["iteration"], numbers["nested"] = i, [i]
            save = ckpt.step(i)
            assert save is not None
            early += not save.progress().copied
            # What may change once step() has returned does so at once.
            model.buffer.fill_(-1)
            numbers["iteration"] = -1
            numbers["nested"][0] = -1
        ckpt.finish()
        failures, last_error = ckpt.failures, ckpt.last_error
    values, restored = _read_back(path)
    return Run(values, restored, failures, last_error, early)


def _read_back(path: Path) -> tuple[dict[int, set[float]], dict[int, Any]]:
    values: dict[int, set[float]] = {}
    plain: dict[int, Any] = {}
    with pccheck.Store(path, read_only=True, max_in_flight=1, chunk_bytes=1 << 20, staging_bytes=4 << 20) as store:
        for info in store.checkpoints():
            assert info.step not in values
            try:
                with store.open(generation=info.generation, verify=False) as checkpoint:
                    assert len(checkpoint.tensors) == 2 * TENSORS + 1
                    arrays = [checkpoint.read(name) for name in checkpoint.tensors]
                    tree = pccheck.trees.unflatten(checkpoint.metadata[TREE_KEY], lambda name, kind: name)
            except errors.Corrupt:
                # Changed between being hashed and being copied: the same fault, found by the second line.
                values[info.step] = {float("nan")}
                continue
            values[info.step] = {float(v) for array in arrays for v in np.unique(array)}
            plain[info.step] = tree["numbers"]
    return values, plain


@pytest.mark.parametrize("update", [by_hook, by_hand])
def test_updates_right_after_the_wait_never_tear(tmp_path: Path, update: Update) -> None:
    run = train(tmp_path / "region", update)
    assert run.failures == 0
    assert run.early, "every save was copied when step() returned: this proves nothing"
    assert run.values == {i: {float(i)} for i in range(1, ITERATIONS + 1)}
    assert run.numbers == {i: {"iteration": i, "nested": [i]} for i in range(1, ITERATIONS + 1)}


def test_a_buffer_too_large_to_copy_at_once_is_waited_for(tmp_path: Path) -> None:
    run = train(tmp_path / "region", by_hook, buffer_side=2400)
    assert run.failures == 0 and not run.early
    assert run.values == {i: {float(i)} for i in range(1, ITERATIONS + 1)}


def test_an_update_that_does_not_wait_is_never_committed(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match="torn"):
        run = train(tmp_path / "region", without_waiting)
    assert run.failures and not run.torn
    assert isinstance(run.last_error, pccheck.errors.InvalidState)
    assert "model.p0" in str(run.last_error) and "before_update()" in run.last_error.advice
    # The last one was not disturbed.
    assert run.values[ITERATIONS] == {float(ITERATIONS)}


def test_debugging_finds_what_version_counters_do_not(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match="torn"):
        run = train(tmp_path / "region", past_the_counters, debug=True)
    assert run.failures and not run.torn


def test_without_debugging_such_changes_are_not_found(tmp_path: Path) -> None:
    """As documented; and these tests see what a torn checkpoint looks like."""
    run = train(tmp_path / "region", past_the_counters)
    assert run.failures == 0
    assert run.torn


def test_without_the_wait_every_update_would_tear_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: the wait does nothing. The version counters are the second line."""
    monkeypatch.setattr(Settler, "before_update", lambda self: None)
    with pytest.warns(CheckpointWarning, match="torn"):
        run = train(tmp_path / "region", by_hook)
    assert run.failures and not run.torn


def test_without_wait_and_counters_torn_checkpoints_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: neither the wait nor the counters. The detector of these tests must see it."""
    monkeypatch.setattr(Settler, "before_update", lambda self: None)
    monkeypatch.setattr(snapshot.Live, "changed", lambda self: [])
    run = train(tmp_path / "region", by_hook)
    assert run.failures == 0
    assert run.torn


def test_without_captured_buffers_torn_checkpoints_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: buffers are read where they are."""
    monkeypatch.setattr(snapshot, "_capture", lambda tensor: tensor)
    run = train(tmp_path / "region", by_hook)
    assert run.failures == 0
    assert run.torn


def test_a_tensor_that_is_exchanged_for_one_without_a_version_is_one_that_changed(tmp_path: Path) -> None:
    model = Model(1)
    fill = Fill(model.parameters())
    fill.step()
    with Checkpointer(tmp_path / "region", model=model, optimizer=fill, on_error="raise", **POOL) as ckpt:
        ckpt.save(1)
        moment = fill.state[model.p0]["moment"]
        with torch.inference_mode():
            other = torch.ones(SIDE, SIDE)
        torch.utils.swap_tensors(moment, other)
        with pytest.raises(errors.InvalidState, match="torn.*moment"):
            ckpt.before_update()
            ckpt.wait(30)
        torch.utils.swap_tensors(moment, other)
        assert ckpt.save(2) is not None
        ckpt.wait(30)
        assert [found.step for found in ckpt.store.checkpoints()] == [2]
