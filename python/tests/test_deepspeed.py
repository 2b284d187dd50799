"""Prevents DeepSpeed runs that resume to something else, and tags that are announced before they are durable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("deepspeed")

EXAMPLE = Path(__file__).parent.parent / "examples" / "deepspeed_example.py"

# DeepSpeed's shared-memory kernel would be compiled first; without it gloo does the communication.
PRELUDE = """
import os, sys
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", DEEPSPEED_LOG_LEVEL="error")
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""

TRAINING = (
    PRELUDE
    + """
import torch
from pathlib import Path
from pccheck import errors
from pccheck.deepspeed import RegionCheckpointEngine

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(sys.argv[1])
torch.set_num_threads(1)

def engine(stage=1, bf16=False, **options):
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 20}},
    }
    torch.manual_seed(0)
    # torch on this machine has no BatchNorm of bf16 inputs and float statistics.
    norm = torch.nn.LayerNorm(16) if bf16 else torch.nn.BatchNorm1d(16)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), norm, torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    made, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    made.checkpoint_engine = RegionCheckpointEngine(staging_bytes=16 << 20, **options)
    return made

def train(engine, steps):
    losses = []
    for step in steps:
        torch.manual_seed(100 * step + rank)
        loss = engine(torch.randn(8, 8, dtype=next(engine.module.parameters()).dtype)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses

def weights(engine):
    # DeepSpeed saves the buffers of rank 0 only, and other ranks' differ.
    tensors = engine.module.state_dict().values() if rank == 0 else engine.module.parameters()
    return [tensor.detach().clone() for tensor in tensors]
"""
)


def run(tmp_path: Path, script: str, *arguments: object, world: int = 1) -> str:
    """Runs the script on every rank; what rank 0 printed."""
    port = 29600 + os.getpid() % 300
    processes = []
    for rank in range(world):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", script, str(tmp_path), *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env))
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err
    return outputs[0][0]


ROUND_TRIP = (
    TRAINING
    + """
for case in sys.argv[2:]:
    kind = {"stage": int(case[0]), "bf16": "bf16" in case}
    at = folder / case
    whole = engine(**kind)
    expected = train(whole, range(8))
    first = engine(**kind)
    head = train(first, range(4))
    first.save_checkpoint(str(at), client_state={"note": ("a", {1: 2.5})})
    train(first, range(4, 6))          # what is saved does not change with it
    second = engine(**kind)
    path, client = second.load_checkpoint(str(at))
    tail = train(second, range(4, 8))
    assert head + tail == expected, (case, head, tail, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True)), case
    assert client["note"] == ("a", {1: 2.5}), client
    assert second.global_steps == 8
    assert (at / "latest").read_text() == "global_step4"
    print("identical", case)
"""
)


def test_a_resumed_engine_is_bit_identical(tmp_path: Path) -> None:
    cases = ["0", "1", "2", "1-bf16"]
    done = run(tmp_path, ROUND_TRIP, *cases)
    for case in cases:
        assert f"identical {case}\n" in done
        files = [path for path in (tmp_path / case / "global_step4").iterdir() if path.suffix == ".pt"]
        assert files and all(path.read_bytes().startswith(b'{"pccheck_reference"') for path in files)


def test_two_ranks_have_a_region_each_and_resume(tmp_path: Path) -> None:
    assert "identical" in run(tmp_path, ROUND_TRIP, "1", world=2)
    regions = sorted(path.name for path in (tmp_path / "1" / ".pccheck").iterdir())
    assert regions == ["region-0.pccheck", "region-1.pccheck"]


def test_commit_returns_only_when_all_is_durable(tmp_path: Path) -> None:
    script = (
        TRAINING
        + """
import threading, time
from pccheck.torch.folders import RegionFolder
finish = RegionFolder._finish
finished = []
def slow(self, job):
    time.sleep(0.5)
    finish(self, job)
    finished.append(job.path)
RegionFolder._finish = slow
made = engine()
train(made, range(1))
commit = RegionCheckpointEngine.commit
def checked(self, info):
    assert len(finished) < 2
    done = commit(self, info)
    assert len(finished) == 2 and all(path.exists() for path in finished)
    assert not (folder / "latest").exists()
    return done
RegionCheckpointEngine.commit = checked
made.save_checkpoint(str(folder))
print((folder / "latest").read_text())
"""
    )
    assert "global_step1" in run(tmp_path, script)


def test_a_rank_that_fails_keeps_the_tag_from_being_announced_on_all(tmp_path: Path) -> None:
    script = (
        TRAINING
        + """
made = engine()
train(made, range(1))
made.save_checkpoint(str(folder))
train(made, range(1, 2))
if rank == 1:
    from pccheck.torch import references
    def full(*_):
        raise OSError(28, "No space left on device")
    references.write = full
try:
    made.save_checkpoint(str(folder))
except (OSError, errors.IoFailed) as why:
    print("refused:", why)
assert (folder / "latest").read_text() == "global_step1"
other = engine()
other.load_checkpoint(str(folder))
assert other.global_steps == 1
"""
    )
    assert "refused: 1 other ranks could not save the tag global_step2" in run(tmp_path, script, world=2)


def test_pickled_files_and_client_state_that_cannot_be_represented_are_refused(tmp_path: Path) -> None:
    script = (
        TRAINING
        + """
made = engine(stage=0)
train(made, range(1))
torch.save({"a": 1}, folder / "pickled.pt")
try:
    made.checkpoint_engine.load(str(folder / "pickled.pt"))
except errors.NotARegion as why:
    print("no reference:", why)
try:
    made.save_checkpoint(str(folder), client_state={"args": {"activation": torch.relu}})
except errors.UnsupportedValue as why:
    print("refused:", why.at)
assert not (folder / "latest").exists()
made.save_checkpoint(str(folder))
assert (folder / "latest").exists()
"""
    )
    done = run(tmp_path, script)
    assert "no reference:" in done and "refused: args.activation" in done


def test_decoupled_saves_are_announced_at_the_next_update_and_the_last_one_at_the_end(tmp_path: Path) -> None:
    script = (
        TRAINING
        + """
made = engine(decoupled=True)
train(made, range(1))
kept = weights(made)
made.save_checkpoint(str(folder))
assert not (folder / "latest").exists()
train(made, range(1, 2))
assert (folder / "latest").read_text() == "global_step1"
made.save_checkpoint(str(folder))
made.save_checkpoint(str(folder), tag="again")
assert (folder / "latest").read_text() == "global_step2"
made.destroy()
assert (folder / "latest").read_text() == "again"
other = engine()
other.load_checkpoint(str(folder), tag="global_step1")
assert all(torch.equal(a, b) for a, b in zip(kept, weights(other), strict=True))
print("decoupled")
"""
    )
    assert "decoupled" in run(tmp_path, script)


def test_one_rank_alone_can_end_and_finish_announces_the_last_tag(tmp_path: Path) -> None:
    script = (
        TRAINING
        + """
import warnings
warnings.simplefilter("always")
made = engine(decoupled=True)
train(made, range(1))
made.save_checkpoint(str(folder))
made.checkpoint_engine.finish()
assert rank != 0 or (folder / "latest").read_text() == "global_step1"
made.save_checkpoint(str(folder), tag="last")
torch.distributed.barrier()
if rank == 1:
    # Nobody else is there to meet.
    with warnings.catch_warnings(record=True) as told:
        made.checkpoint_engine.cleanup()
    assert any("tag last" in str(one.message) for one in told), told
torch.distributed.barrier()
made.checkpoint_engine.cleanup()
assert (folder / "latest").read_text() == "global_step1"
other = engine()
other.load_checkpoint(str(folder), tag="last")
assert other.global_steps == 1
print("ended")
"""
    )
    assert "ended" in run(tmp_path, script, world=2)


def test_the_example_runs(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    script = PRELUDE + f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    assert "at step 9" in run(tmp_path, script)
