"""Failure prevented: the last checkpoint is lost because the program ended, or the program's end is changed by us.

Each program saves without ever closing its checkpointer and ends while the save is in flight: what was begun must be
found, the process must end as it would have without us, and what ends beside it (forked children, workers of a data
loader) must neither finish nor cancel its saves.
"""

# What needs torch is imported once it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from programs.warm import Program, Warm

import pccheck

SEED = random.SystemRandom().randrange(1, 2**31)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    found = Warm()
    yield found
    found.close()


def newest(path: Path) -> int | None:
    with pccheck.Store(path, read_only=True, max_in_flight=1, chunk_bytes=1 << 20, staging_bytes=4 << 20) as store:
        assert store.verify().damaged == 0
        return store.checkpoints()[0].step if store.checkpoints() else None


def run(warm: Warm, folder: Path, how: str, **more: float) -> tuple[int, Program]:
    program = warm.start("train_exits", folder, path=str(folder / "region"), how=how, **more)
    status = program.wait()
    assert "in flight False" in program.text(), program.text()
    return status, program


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("end", 0),
        ("sys.exit", 5),
        ("exception", 1),
        ("interrupt", -signal.SIGINT),
        ("sigterm", -signal.SIGTERM),
        ("own-handler", 7),
        ("own-handler-again", 7),
        ("replaced", 9),
        ("ignored", 0),
        ("sigterm-while-closing", -signal.SIGTERM),
        ("unfinished-worker", 0),
    ],
)
def test_what_was_begun_is_found(warm: Warm, tmp_path: Path, how: str, status: int) -> None:
    # A large one is still being finished when the signal comes.
    found, program = run(warm, tmp_path, how, width=1500 if how == "sigterm-while-closing" else 500)
    assert found == status, program.text()
    assert newest(tmp_path / "region") == 1
    text = program.text()
    assert ("Traceback" in text) == (how in ("exception", "interrupt")), text
    assert ("went on" in text) == (how == "ignored")
    if how.startswith("own-handler"):
        assert "own handler after 1" in text
    if how == "own-handler-again":
        assert text.count("chained") == 1
    if how in ("own-handler-again", "replaced"):
        assert newest(tmp_path / "region2") == 2


def test_exits_never_hang(warm: Warm, tmp_path: Path) -> None:
    """Threads of an interpreter that is being torn down cannot be waited for: each exit is a new chance to try."""
    for i in range(8):
        folder = tmp_path / str(i)
        folder.mkdir()
        status, program = run(warm, folder, "end")
        assert status == 0 and newest(folder / "region") == 1, program.text()
        assert len(program.lines()) == 1, program.text()


def test_sigterm_at_any_moment_finishes_what_was_begun(warm: Warm, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    for i in range(12):
        folder = tmp_path / str(i)
        folder.mkdir()
        program = warm.start("train_exits", folder, path=str(folder / "region"), how="sigterm-anywhere")
        program.wait_for("begun", rng.randrange(1, 6))
        time.sleep(rng.random() * 0.03)
        program.kill(signal.SIGTERM)
        assert program.wait() == -signal.SIGTERM, program.text()
        # step() had returned for this one.
        begun = int(program.lines()[-1].split()[1])
        assert (newest(folder / "region") or 0) >= begun


def test_sigterm_in_the_middle_of_settling_finishes_what_was_begun(warm: Warm, tmp_path: Path) -> None:
    """The handler runs in the thread that it interrupts, and must neither wait for that thread nor skip its save."""
    status, program = run(warm, tmp_path, "sigterm-in-settling")
    assert status == -signal.SIGTERM, program.text()
    begun = [line for line in program.lines() if line.startswith("begun")]
    assert (newest(tmp_path / "region") or 0) >= (int(begun[-1].split()[1]) if begun else 1)


@pytest.mark.parametrize(("how", "child"), [("fork", 3), ("fork-sigterm", -signal.SIGTERM)])
def test_a_forked_child_ends_alone(warm: Warm, tmp_path: Path, how: str, child: int) -> None:
    status, program = run(warm, tmp_path, how)
    assert status == 0, program.text()
    assert f"child {child}" in program.text(), program.text()
    assert "Traceback" not in program.text() and "Warning" not in program.text(), program.text()
    assert newest(tmp_path / "region") == 2


TERMINATED_AT_ONCE = """
import os, signal, sys, time
import torch
from pccheck.torch import Checkpointer
ckpt = Checkpointer(sys.argv[1], state={"a": torch.ones(10)}, staging_bytes=16 << 20, chunk_bytes=1 << 20)
child = os.fork()
if child == 0:
    # Nothing in Python to miss the signal.
    os._exit(0 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
for _ in range(100):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(1)
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            sys.exit("a child that was terminated lives on")
        time.sleep(0.0005)
    assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGTERM, ended
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
ckpt.close()
"""


def test_a_child_that_is_terminated_as_soon_as_it_is_forked_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TERMINATED_AT_ONCE, str(tmp_path / "region")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_loader_workers(warm: Warm, tmp_path: Path) -> None:
    status, program = run(warm, tmp_path, "workers")
    assert status == 0, program.text()
    assert "newest 15" in program.text()
    assert "Traceback" not in program.text() and "Warning" not in program.text(), program.text()
    assert newest(tmp_path / "region") == 99


def test_the_time_given_is_kept(warm: Warm, tmp_path: Path) -> None:
    """With no time at all it ends at once, as any program does; nothing is torn."""
    status, program = run(warm, tmp_path, "sigterm", exit_timeout=0.0)
    assert status == -signal.SIGTERM, program.text()
    assert newest(tmp_path / "region") in (None, 1)
