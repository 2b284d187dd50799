"""Prevents: a restore of what is no checkpoint, of another than was asked for, of a damaged one, or of half of one that
is being overwritten.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from restore_samples import net, no_other_warnings, trained
from states_samples import checkpointer, same, save_once, steps
from torch import nn

import pccheck.torch
from pccheck import errors

__all__ = ["no_other_warnings"]


def test_a_region_is_restored_from_while_its_writer_is_live(tmp_path: Path) -> None:
    """The reader gets one whole checkpoint, whichever, though each is overwritten soon."""
    weights = [nn.Parameter(torch.zeros(200_000)) for _ in range(4)]
    model = nn.ParameterList(weights)
    model.register_buffer("at", torch.zeros((), dtype=torch.int64))
    done = threading.Event()

    def write() -> None:
        step = 0
        while not done.is_set():
            step += 1
            writer.before_update()
            with torch.no_grad():
                for weight in weights:
                    weight.fill_(step)
                model.at.fill_(step)
            writer.step(step)

    with checkpointer(tmp_path / "r", model=model, rng=False) as writer:
        writer.step(0)
        writer.wait(60)
        thread = threading.Thread(target=write)
        thread.start()
        try:
            other = nn.ParameterList([nn.Parameter(torch.ones(200_000)) for _ in range(4)])
            other.register_buffer("at", torch.zeros((), dtype=torch.int64))
            restores, step, deadline = 0, 0, time.monotonic() + 60
            # However slow the writer is: some are of a checkpoint that it made meanwhile.
            while restores < 6 or step == 0:
                assert time.monotonic() < deadline
                step = pccheck.torch.restore(tmp_path / "r", model=other)
                assert step == int(other.at)
                assert all(bool((weight == step).all()) for weight in other)
                restores += 1
        finally:
            done.set()
            thread.join()
        assert writer.failures == 0


def test_another_runs_region_gives_its_weights_alone(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_once(tmp_path / "r0", model=model, optimizer=optimizer)
    other = net(1)
    random_state = torch.get_rng_state()
    assert pccheck.torch.restore(tmp_path / "r{rank}", model=other) == 1
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(errors.StateMismatch, match="missing in the checkpoint: encoder"):
        pccheck.torch.restore(tmp_path / "r0", encoder=net(1))
    with pytest.raises(errors.NotFound):
        pccheck.torch.restore(tmp_path / "none", model=other)


def test_a_region_that_no_checkpointer_wrote_is_refused(tmp_path: Path) -> None:
    pccheck.format_region(tmp_path / "r", slots=3, payload_bytes=4096)
    with pccheck.Store(tmp_path / "r", durability="process", staging_bytes=16 << 20) as store:
        store.save(1, {"model.weight": torch.zeros(3)}).durable(30)
    with pytest.raises(errors.StateMismatch, match="not made by a Checkpointer"):
        pccheck.torch.restore(tmp_path / "r", model=nn.Linear(2, 2))


def test_the_step_and_the_generation_choose(tmp_path: Path) -> None:
    state = {"i": 0}
    with checkpointer(tmp_path / "r", keep=3, state=state) as made:
        for step in (1, 2, 3):
            state["i"] = step
            made.step(step)
            made.wait(60)
        generation = made.checkpoints()[2].generation
        assert made.restore(step=2) == 2 and state == {"i": 2}
        assert made.restore(generation=generation) == 1 and state == {"i": 1}
        assert made.restore() == 3 and state == {"i": 3}
        with pytest.raises(errors.NotFound, match="no checkpoint of step 9; the steps held are: 3, 2, 1"):
            made.restore(step=9)
        assert state == {"i": 3}


def two_checkpoints(path: Path) -> dict[int, tuple[int, int]]:
    """A region of the steps 1 and 2; where the payload of each begins and how long it is."""
    model = nn.Linear(300, 400)
    with checkpointer(path, keep=2, model=model) as made:
        for step in (1, 2):
            model.weight.data.fill_(step)
            made.step(step)
            made.wait(60)
        slots, slot_bytes = made.store.got().slot_count, made.store.got().slot_bytes
        first = path.stat().st_size - slots * slot_bytes
        places = {info.step: (first + info.slot * slot_bytes, info.payload_bytes) for info in made.checkpoints()}
    content = path.read_bytes()
    assert all(content[at + 8 : at + 9] == b"{" for at, _ in places.values()), "the layout is not as expected"
    return places


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("where", ["header", "metadata", "data", "end"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, where: str) -> None:
    places = two_checkpoints(tmp_path / "r")
    at, size = places[2]
    flip(tmp_path / "r", at + {"header": 3, "metadata": 60, "data": size // 2, "end": size - 5}[where])
    model = nn.Linear(300, 400)
    with (
        checkpointer(tmp_path / "r", keep=2, model=model) as made,
        pytest.warns(UserWarning, match="the checkpoint of step 2 cannot be read, taking another one"),
    ):
        assert made.restore() == 1
        assert bool((model.weight == 1).all())
        with pytest.raises(errors.Corrupt):
            made.restore(step=2)
        # Training goes on, and so do saves.
        made.step(3)
        made.wait(60)
        assert made.restore() == 3 and made.failures == 0


def test_all_damaged_is_corrupt_and_says_so(tmp_path: Path) -> None:
    for at, size in two_checkpoints(tmp_path / "r").values():
        flip(tmp_path / "r", at + size // 2)
    with (
        checkpointer(tmp_path / "r", keep=2, model=nn.Linear(300, 400)) as made,
        pytest.warns(UserWarning, match="cannot be read"),
    ):
        with pytest.raises(errors.Corrupt, match="hash"):
            made.restore()
        with pytest.raises(errors.InvalidState, match="discard"):
            made.step(3)
        made.discard()
        assert made.restore() is None
        made.step(3)
        made.wait(60)
        assert steps(made) == [3]
