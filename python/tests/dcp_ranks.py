"""Ranks for the tests of distributed checkpoints: real processes in a gloo group, and what they do in them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  DTensor imports it at first use, in every rank
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pccheck.dcp import RegionReader, RegionWriter

# Importing torch takes seconds: one process does it, and ranks are forked from that. It finds this module by its
# environment only, and would pass over it in silence.
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(["dcp_ranks"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}


def run_ranks(world: int, work: Callable[..., None], *args: Any) -> list[int]:
    """Runs ``work(*args)`` on every rank of a group, and returns their exit codes; 0 is success."""
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            _RANKS.Process(target=_rank, args=(rank, world, f"{meeting}/store", work, args)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in ranks]


def _rank(rank: int, world: int, store: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=90)
        )
        work(*args)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def full_state(value: int) -> dict[str, torch.Tensor]:
    """What the group has altogether; sizes that no number of ranks divides."""
    return {
        "rows": torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5) + value,
        "columns": torch.arange(6 * 9, dtype=torch.int64).reshape(6, 9) * value,
        "whole": torch.full((3, 2), value, dtype=torch.bfloat16),
        "vector": torch.arange(10_000, dtype=torch.float64) * value,
    }


def sharded(value: int, turned: bool = False) -> dict[str, Any]:
    """This rank's share of it. ``turned``: other dimensions are sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"rows": Shard(1), "columns": Shard(0), "whole": Shard(0)} if turned else PLACEMENTS
    state: dict[str, Any] = {
        name: distribute_tensor(tensor, mesh, [placements.get(name, Shard(0))])
        for name, tensor in full_state(value).items()
    }
    state["plain"] = torch.full((4,), float(value))
    state["note"] = {"value": value}
    return state


def check(state: dict[str, Any], value: int) -> None:
    """Asserts that this rank's share is that of ``value``."""
    for name, expected in full_state(value).items():
        found = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
        assert torch.equal(found, expected), (name, value, found, expected)
    assert torch.equal(state["plain"], torch.full((4,), float(value)))
    assert state["note"] == {"value": value}


def save_all(path: Path, values: list[int]) -> None:
    """One save after the other by one writer."""
    writer = RegionWriter(path)
    for value in values:
        dcp.save(sharded(value), storage_writer=writer)


def load_all(path: Path, value: int, turned: bool) -> None:
    """Loads into a state of zeros and checks it."""
    state = sharded(0, turned)
    dcp.load(state, storage_reader=RegionReader(path, read_bytes=4096))
    check(state, value)


def save_async(path: Path) -> None:
    """Overwrites the state at once after every async save."""
    writer = RegionWriter(path, cache_staged_state_dict=True)
    state = sharded(0)
    for value in (1, 2, 3):
        for name, tensor in sharded(value).items():
            if isinstance(tensor, torch.Tensor):
                state[name].copy_(tensor)
        state["note"] = {"value": value}
        future = dcp.async_save(state, storage_writer=writer)
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
        future.result()
        found = sharded(0)
        dcp.load(found, storage_reader=RegionReader(path))
        check(found, value)


class _Failing(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("rank 1 has lost its device")
        return super().resolve_data(write_item)


def save_with_a_failing_rank(path: Path) -> None:
    """Rank 1 fails in the middle of saves; the others have saved their part by then."""
    writer = RegionWriter(path)
    dcp.save(sharded(1), storage_writer=writer)
    for _ in range(3):
        try:
            dcp.save(sharded(9), storage_writer=writer, planner=_Failing())
        except CheckpointException as why:
            assert "rank 1 has lost its device" in str(why)
        else:
            raise AssertionError("the save should have failed")
        load_all(path, 1, False)
    dcp.save(sharded(2), storage_writer=writer)
    load_all(path, 2, False)


def save_and_die(path: Path, value: int) -> None:
    """The coordinator is killed after all ranks' data is durable and before it is published."""

    class Dying(RegionWriter):
        def finish(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save(sharded(value), storage_writer=Dying(path))


def save_alone(path: Path) -> None:
    """Without collectives every rank has a checkpoint of its own."""
    writer = RegionWriter(path)
    for value in (1, 2):
        mine = {"x": torch.full((3,), float(10 * value + dist.get_rank()))}
        dcp.save(mine, storage_writer=writer, use_collectives=False)
    found = {"x": torch.zeros(3)}
    dcp.load(found, storage_reader=RegionReader(path))
    assert torch.equal(found["x"], mine["x"]), (found, mine)


def refuse_different_checkpoints(path: Path) -> None:
    """Rank 1 looks after another checkpoint was published, as beside a live writer."""
    older_than = 2 if dist.get_rank() == 0 else None
    try:
        dcp.load(sharded(0), storage_reader=RegionReader(path, older_than=older_than))
    except CheckpointException as why:
        assert "different newest checkpoints" in str(why)
    else:
        raise AssertionError("pieces of two checkpoints were loaded")
