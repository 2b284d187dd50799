"""Prevents: sharded training (FSDP2, DTensor) that resumes with other numbers, with plain tensors where sharded ones
were, or with the shards of another number of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.tensor")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

COMMON = """
import sys, torch, warnings
from torch import nn
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
folder, tests, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, tests)
import pccheck.torch
from pccheck import errors
from states_samples import checkpointer, content, same
dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))

def make(seed, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
        # 5 rows over 2 ranks: shards of different sizes
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)

def update(model, optimizer, step):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(100 * step + rank)
    loss = model(torch.randn(4, 6, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())

def locals_of(model):
    return [p.to_local() for p in model.parameters()]
"""

SAVE = """
model, optimizer = make(0)
with checkpointer(folder + "/r{rank}", model=model, optimizer=optimizer) as made:
    assert made.path.endswith(f"/r{rank}"), made.path
    for step in range(3):
        update(model, optimizer, step)
        made.step(step)
    made.wait(60)
    assert made.failures == 0, made.last_error

# A fresh run: its optimizer has no state yet.
other, other_optimizer = make(1)
addresses = [p.data_ptr() for p in locals_of(other)]
with checkpointer(folder + "/r{rank}", model=other, optimizer=other_optimizer) as made:
    assert made.restore() == 2
assert [p.data_ptr() for p in locals_of(other)] == addresses
assert all(same(a, b) for a, b in zip(locals_of(other), locals_of(model), strict=True))
for state in other_optimizer.state.values():
    assert isinstance(state["exp_avg"], DTensor) and not isinstance(state["step"], DTensor)
expected = [update(model, optimizer, step) for step in (3, 4)]
assert [update(other, other_optimizer, step) for step in (3, 4)] == expected
assert all(same(a, b) for a, b in zip(locals_of(other), locals_of(model), strict=True))

# In place, where there is state already.
moments = [state["exp_avg"].to_local().data_ptr() for state in other_optimizer.state.values()]
with checkpointer(folder + "/r{rank}", model=other, optimizer=other_optimizer) as made:
    assert made.restore() == 2
assert [state["exp_avg"].to_local().data_ptr() for state in other_optimizer.state.values()] == moments

# Made on the meta device and materialised, as torchtitan does.
meta, meta_optimizer = make(2, "meta")
try:
    pccheck.torch.restore(folder + "/r{rank}", model=meta)
    raise AssertionError("a sharded meta tensor")
except errors.StateMismatch as why:
    assert "to_empty" in str(why), str(why)
meta.to_empty(device="cpu")
assert pccheck.torch.restore(folder + "/r{rank}", model=meta) == 2
assert 2 == pccheck.torch.restore(folder + "/r{rank}", model=other)
assert all(same(a, b) for a, b in zip(locals_of(meta), locals_of(other), strict=True))

# A DTensor of its own, and one laid out otherwise.
whole = torch.arange(12.0).reshape(4, 3)
sharded = {"x": distribute_tensor(whole, mesh, [Shard(0)]), "y": distribute_tensor(whole, mesh, [Replicate()])}
with checkpointer(folder + "/d{rank}", tensors=sharded) as made:
    made.step(7)
    made.wait(60)
target = {"x": distribute_tensor(whole * 0, mesh, [Shard(0)]), "y": distribute_tensor(whole * 0, mesh, [Replicate()])}
x = target["x"]
assert pccheck.torch.restore(folder + "/d{rank}", tensors=target) == 7
assert target["x"] is x and torch.equal(x.full_tensor(), whole) and torch.equal(target["y"].to_local(), whole)
for wrong in (
    {"x": distribute_tensor(whole * 0, mesh, [Replicate()]), "y": target["y"]},
    {"x": target["x"], "y": whole * 0},
    {"y": target["y"]},
):
    try:
        pccheck.torch.restore(folder + "/d{rank}", tensors=wrong)
        raise AssertionError("laid out otherwise")
    except errors.StateMismatch as why:
        assert "Shard(dim=0)" in str(why) or "not sharded" in str(why), str(why)
dist.destroy_process_group()
"""

OTHER_WORLD = """
model, optimizer = make(3)
before = [content(p) for p in locals_of(model)]
made = checkpointer(folder + "/r{rank}", model=model, optimizer=optimizer)
try:
    made.restore()
    raise AssertionError("saved by another number of ranks")
except errors.StateMismatch as why:
    assert len(why.mismatched) >= 4 and not why.missing and not why.unexpected, str(why)
    assert "over ranks [0] here" in str(why) and "over ranks [0, 1] in the checkpoint" in str(why), str(why)
    assert any(name.startswith("optimizer.state.") for name in why.mismatched)
assert [content(p) for p in locals_of(model)] == before and not optimizer.state
made.close()
dist.destroy_process_group()
"""


def ranks(program: str, folder: Path, world: int) -> None:
    """Runs a program once for each rank."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMON + program, str(folder), str(Path(__file__).parent)]
    started = [
        subprocess.Popen([*command, str(rank), str(world)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)


def test_fsdp2_goes_on_bit_for_bit_and_refuses_another_number_of_ranks(tmp_path: Path) -> None:
    ranks(SAVE, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("[rd][01]")) == ["d0", "d1", "r0", "r1"]
    ranks(OTHER_WORLD, tmp_path, 1)
