"""Defects that a review found in the checkpointer: each test is one of them."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import numpy as np
import torch
from torch import nn

from pccheck import errors
from pccheck.torch import Best, Checkpointer, home, settling, snapshot

POOL: dict[str, Any] = {"staging_bytes": 16 << 20, "chunk_bytes": 1 << 20}


def test_a_lazy_conjugate_is_not_taken_for_its_base(tmp_path: Path) -> None:
    x = torch.randn(4, dtype=torch.complex64)
    state = {"a": x.clone(), "b": x.conj(), "imag": x.conj().imag}
    with Checkpointer(tmp_path / "r", state=state, **POOL) as saver:
        saver.step(0)
    other: dict[str, Any] = {}
    with Checkpointer(tmp_path / "r", state=other, **POOL) as saver:
        assert saver.restore() == 0
    assert torch.equal(other["a"], x) and torch.equal(other["b"], x.conj().resolve_conj())
    assert torch.equal(other["imag"], x.conj().imag)


def test_what_cannot_be_read_in_place_makes_nothing_else_wait() -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 256, 4) for _ in range(6))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tree = {"model": model.state_dict(), "rng": torch.get_rng_state()}
    taken = snapshot.take(tree, model.parameters(), hashes=False)
    assert not taken.urgent and all(tensor.dim() == 1 for tensor in taken.live.tensors)


def test_an_update_does_not_wait_for_what_it_cannot_touch(tmp_path: Path) -> None:
    numbers = {"large": np.zeros(3 << 20), "count": 1}
    with Checkpointer(tmp_path / "r", numbers=numbers, **POOL) as saver:
        save = saver.step(0)
        # Confirmed at once: nothing is left to be settled.
        assert save is not None and saver._settler._pending is None
        saver.wait(60)
        assert [info.step for info in saver.checkpoints()] == [0]


def test_a_best_checkpoint_without_room_for_its_pin_is_saved_all_the_same(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", weights=[torch.zeros(1000)], keep_best=Best("loss"), **POOL) as saver:
        saver.step(0, {"loss": 10.0})
        saver.wait(60)
        # Readers take room, and nothing tells how much in advance where they come in between.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with saver.store.open():
                for step in range(1, 8):
                    saver.step(step, {"loss": 10.0 - step})
                    saver.wait(60)
        assert saver.failures == 0 and saver.checkpoints()[0].step == 7


def test_a_region_that_could_not_be_opened_again_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"tensor": torch.zeros(1000)}
    with Checkpointer(tmp_path / "r", state=state, **POOL) as saver:
        saver.step(0)
        saver.wait(60)
        state["tensor"] = torch.zeros(3 << 20)
        with monkeypatch.context() as patch:

            def busy(self: home.Home) -> Any:
                raise errors.InUse("another has it")

            patch.setattr(home.Home, "_open", busy)
            with pytest.warns(UserWarning, match="another has it"):
                for step in range(1, 4):
                    assert saver.step(step) is None
        assert saver.failures == 3
        alive = weakref.ref(state["tensor"])
        state["tensor"] = torch.ones(3 << 20)
        gc.collect()
        assert alive() is None, "a failed save keeps no snapshot"
        saver.step(4)
        saver.wait(60)
        assert saver.checkpoints()[0].step == 4 and saver.failures == 3


def test_pins_that_are_not_for_the_best_are_left_alone(tmp_path: Path) -> None:
    def run(first: int, last: int, **more: Any) -> list[int]:
        with Checkpointer(tmp_path / "r", w=[torch.zeros(10)], keep_best=Best("loss"), **more, **POOL) as saver:
            saver.restore()
            for step in range(first, last):
                saver.step(step, {"loss": 10.0 - step})
                saver.wait(60)
            return sorted(info.step for info in saver.checkpoints() if info.pinned)

    assert run(0, 9, keep_every=4) == [0, 4, 7, 8]
    assert run(9, 10, keep_every=5) == [0, 4, 8, 9]


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_arrays_that_share_memory_are_restored(tmp_path: Path, dtype: str) -> None:
    base = np.arange(12, dtype=dtype)
    state = {"a": base, "b": base[:3], "c": base[2:7]}
    with Checkpointer(tmp_path / "r", state=state, **POOL) as saver:
        saver.step(0)
        saver.wait(60)
        base[:] = 0
        assert saver.restore() == 0
    assert base.tolist() == list(range(12)) and state["b"] is not base


def test_closing_does_not_wait_for_a_save_that_was_cancelled(tmp_path: Path) -> None:
    model = nn.Linear(2000, 2000)
    saver = Checkpointer(tmp_path / "r", model=model, **POOL)
    # Nothing else may fill the pool: what the save would copy into stays taken.
    raw = saver.store.raw_save(99, 15 << 20, timeout=1.0)
    raw.write_at(1, bytes(12 << 20))
    save = saver.step(0)
    assert save is not None
    ended = threading.Event()
    closing = threading.Thread(target=lambda: (raw.close(), saver.close(0.2), ended.set()))
    began = time.monotonic()
    closing.start()
    assert ended.wait(60)
    assert time.monotonic() - began < 30


def test_gradients_are_not_dropped_in_silence(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with Checkpointer(tmp_path / "r", model=model, gradients=True, **POOL) as saver:
        model(torch.ones(3)).sum().backward()
        saver.step(0)
    fresh = nn.Linear(3, 3)
    with Checkpointer(tmp_path / "r", model=fresh, **POOL) as saver:
        with pytest.raises(errors.StateMismatch, match="gradients=True"):
            saver.restore()
        assert saver.restore(strict=False) == 0


def test_a_newer_snapshot_stays_pending_when_an_older_one_is_settled(tmp_path: Path) -> None:
    model = nn.Linear(4, 400)
    with Checkpointer(tmp_path / "r", model=model, **POOL) as saver:
        first = saver.step(0)
        older = saver._settler._pending
        assert first is not None and older is not None
        saver.before_update()
        saver.step(1)
        newer = saver._settler._pending
        saver._settler._done(older)
        assert saver._settler._pending is newer is not None


def test_a_failed_save_keeps_its_own_reason(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    with Checkpointer(tmp_path / "r", model=model, **POOL) as saver:
        saver.step(0)
        flight = saver._settler._pending
        assert isinstance(flight, settling.InFlight)
        flight.save.cancel()
        with pytest.raises(errors.Cancelled):
            flight.save.durable(60)
        with torch.no_grad():
            model.weight.add_(1)
        flight.settle()
        assert flight.verdict is None


def test_members_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(errors.InvalidArgument, match="two members are called 'nets.1'"):
        Checkpointer(tmp_path / "r", nets={1: one, "1": other}, **POOL)
    assert not (tmp_path / "r").exists()
