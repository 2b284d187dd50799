"""Failure prevented: a run that was killed and resumed goes on from a state that differs from the one it had.

Training runs in processes of their own, saves every iteration, and is killed with SIGKILL at random moments, several
times, while saves are in flight. Every loss of every run must equal, bit for bit, that of the same iteration of a run
that was never interrupted, and so must every byte of the final state.
"""

# What needs torch is imported once it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from programs.warm import Program, Warm

STEPS = 16
KILLS = 3
SEED = int(os.environ.get("PCCHECK_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    found = Warm()
    yield found
    found.close()


@pytest.fixture(scope="module")
def uninterrupted(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Optimizer -> losses and final digest of a run that knows nothing of checkpoints."""

    @cache
    def run(optimizer: str) -> tuple[dict[int, str], str]:
        program = warm.start(
            "train_exact", tmp_path_factory.mktemp("plain"), optimizer=optimizer, steps=STEPS, path=None, n=0
        )
        assert program.wait() == 0, program.text()
        losses, final = _losses(program), _final(program)
        assert len(losses) == STEPS and final
        assert all(math.isfinite(float.fromhex(loss)) for loss in losses.values())
        return losses, final

    return run


def _losses(program: Program) -> dict[int, str]:
    parts = (line.split() for line in program.lines())
    return {int(line[1]): line[2] for line in parts if line[0] == "step"}


def _final(program: Program) -> str:
    return next((line.split()[1] for line in program.lines() if line.startswith("final ")), "")


@pytest.mark.parametrize(
    ("optimizer", "n"),
    [(optimizer, n) for optimizer in ("sgd", "adam", "adamw") for n in (1, 2, 3, 4)]
    + [(optimizer, 2) for optimizer in ("adamw-foreach", "adamw-fused", "adamw-tensor-lr", "sgd-fused", "muon")]
    + [("lbfgs", 2), ("adamw-channels-last", 2)],
)
def test_killed_and_resumed_equals_uninterrupted(
    warm: Warm, uninterrupted: Any, tmp_path: Path, optimizer: str, n: int
) -> None:
    rng = random.Random(f"{SEED}-{optimizer}-{n}")
    print(f"seed {SEED}: set PCCHECK_TEST_SEED to repeat it")
    losses, final = uninterrupted(optimizer)
    region = tmp_path / "run.pccheck"
    highest, kills, in_flight = -1, 0, 0
    while True:
        program = warm.start("train_exact", tmp_path, optimizer=optimizer, steps=STEPS, path=str(region), n=n)
        if kills < KILLS:
            # Some die before their first save, most in the middle of several.
            if rng.random() < 0.1:
                program.wait_for("restored")
            else:
                program.wait_for("step", max(1, min(rng.randrange(1, 6), STEPS - highest - 1)))
            time.sleep(rng.random() * 0.03)
            program.kill()
            kills += 1
        status = program.wait()
        found = _losses(program)
        assert found.items() <= losses.items(), f"after {kills} kills: {found} is no part of {losses}"
        restored = program.lines()[0] if program.lines() else "restored None"
        last = -1 if restored == "restored None" else int(restored.split()[1])
        # Never further than what was trained, and with N saves in flight at most N of them are lost.
        assert highest - n - 1 <= last <= highest + 1
        highest = max([highest, *found])
        in_flight += [int(line.split()[3]) for line in program.lines() if line.startswith("step")][-1:] > [0]
        if status == 0:
            break
        assert status == -9, program.text()
    assert _final(program) == final
    assert in_flight, "no kill came while a save was in flight: this proves nothing"


def test_one_generator_left_out_is_noticed(warm: Warm, uninterrupted: Any, tmp_path: Path) -> None:
    """The test above can fail: a resume that loses one generator's state gives other losses."""
    losses, _ = uninterrupted("sgd")
    region = tmp_path / "run.pccheck"
    program = warm.start("train_exact", tmp_path, optimizer="sgd", steps=STEPS, path=str(region), n=2, rng=False)
    program.wait_for("step", 8)
    program.kill()
    program.wait()
    program = warm.start("train_exact", tmp_path, optimizer="sgd", steps=STEPS, path=str(region), n=2, rng=False)
    assert program.wait() == 0, program.text()
    assert not _losses(program).items() <= losses.items()
