"""Failure prevented: a checkpoint in the middle of gradient accumulation that lacks the gradients gathered so far.

A run resumed from it would go on from other gradients than the one that was interrupted, without a word. So such a save
is refused, from the first iteration on and after a restore too, unless gradients are saved; then the resumed run
must equal the other one bit for bit.
"""

# What needs torch is imported once it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from pccheck.errors import InvalidState
from pccheck.torch import Checkpointer

pytestmark = pytest.mark.filterwarnings("error::pccheck.torch.CheckpointWarning")

EVERY, STEPS = 4, 16
POOL: Any = {"chunk_bytes": 128 << 10, "staging_bytes": 1 << 20, "max_in_flight": 2}


class Run:
    """A model that updates every fourth iteration."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))
        self.model = nn.Sequential(features, nn.Flatten(), nn.Linear(288, 4))
        self.model.to(memory_format=memory_format)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def checkpointer(self, path: Path, **more: Any) -> Checkpointer:
        return Checkpointer(path, model=self.model, optimizer=self.optimizer, **POOL, **more)

    def iterate(self, i: int) -> str:
        loss = self.model(torch.randn(2, 3, 8, 8)).square().mean()
        (loss / EVERY).backward()
        if i % EVERY == EVERY - 1:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item().hex()  # type: ignore[no-any-return]


def test_refused_until_the_update(tmp_path: Path) -> None:
    run = Run()
    with run.checkpointer(tmp_path / "region") as ckpt:
        for i in range(2 * EVERY):
            run.iterate(i)
            if i % EVERY == EVERY - 1:
                assert ckpt.step(i) is not None
            else:
                with pytest.raises(InvalidState, match="gradients=True"):
                    ckpt.step(i)
        ckpt.wait()
        assert [info.step for info in ckpt.checkpoints()][0] == 2 * EVERY - 1


def test_refused_after_a_restore_too(tmp_path: Path) -> None:
    run = Run()
    with run.checkpointer(tmp_path / "region") as ckpt:
        ckpt.step(0)
    run = Run()
    with run.checkpointer(tmp_path / "region") as ckpt:
        assert ckpt.restore() == 0
        run.iterate(1)
        with pytest.raises(InvalidState):
            ckpt.step(1)


def test_refused_with_gradients_zeroed_in_place(tmp_path: Path) -> None:
    run = Run()
    with run.checkpointer(tmp_path / "region") as ckpt:
        run.iterate(EVERY - 1)
        run.optimizer.zero_grad(set_to_none=False)
        ckpt.step(0)
        run.iterate(0)
        with pytest.raises(InvalidState):
            ckpt.step(1)
        run.optimizer.zero_grad(set_to_none=False)
        assert ckpt.step(2) is not None


def test_refused_when_the_optimizer_is_no_member(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path / "region", model=run.model, **POOL) as ckpt:
        run.iterate(EVERY - 1)
        ckpt.step(0)
        run.iterate(0)
        with pytest.raises(InvalidState):
            ckpt.step(1)


def test_another_models_optimizer_says_nothing_of_this_one(tmp_path: Path) -> None:
    run, other = Run(), Run()
    with run.checkpointer(tmp_path / "region") as ckpt:
        run.iterate(EVERY - 1)
        run.iterate(0)
        other.iterate(EVERY - 1)
        with pytest.raises(InvalidState):
            ckpt.step(0)


def test_sparse_gradients(tmp_path: Path) -> None:
    embedding = nn.Embedding(50, 8, sparse=True)
    optimizer: Any = torch.optim.SparseAdam(embedding.parameters())
    with Checkpointer(tmp_path / "region", model=embedding, optimizer=optimizer, **POOL) as ckpt:
        embedding(torch.arange(5)).sum().backward()
        with pytest.raises(InvalidState):
            ckpt.step(0)
        optimizer.step()
        assert ckpt.step(0) is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cut", range(EVERY, 2 * EVERY))
def test_resumes_in_the_middle_bit_for_bit(tmp_path: Path, cut: int, memory_format: torch.memory_format) -> None:
    run = Run(memory_format)
    losses = [run.iterate(i) for i in range(STEPS)]
    final = [parameter.clone() for parameter in run.model.parameters()]

    run = Run(memory_format)
    with run.checkpointer(tmp_path / "region", gradients=True) as ckpt:
        for i in range(cut + 1):
            assert run.iterate(i) == losses[i]
            ckpt.step(i)
    # Other numbers everywhere, which the restore must replace.
    torch.manual_seed(99)
    run = Run(memory_format)
    torch.manual_seed(98)
    with run.checkpointer(tmp_path / "region", gradients=True) as ckpt:
        assert ckpt.restore() == cut
        assert [run.iterate(i) for i in range(cut + 1, STEPS)] == losses[cut + 1 :]
    assert all(torch.equal(a, b) for a, b in zip(final, run.model.parameters(), strict=True))


def test_rolling_back_takes_gradients_back_too(tmp_path: Path) -> None:
    """In the same process, where later gradients are still there: those that were not saved must go."""
    run = Run()
    with run.checkpointer(tmp_path / "region", gradients=True) as ckpt:
        run.iterate(EVERY - 1)
        ckpt.step(0)
        ckpt.wait()
        random = torch.get_rng_state()
        losses = [run.iterate(i) for i in range(2 * EVERY)]
        run.iterate(0)
        assert ckpt.restore() == 0
        assert torch.equal(torch.get_rng_state(), random)
        assert [run.iterate(i) for i in range(2 * EVERY)] == losses
