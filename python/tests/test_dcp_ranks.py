"""Prevents: groups of ranks that restore pieces of different saves, or lose a checkpoint when a rank fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import dcp_ranks  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_ranks import run_ranks  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from pccheck.dcp import RegionReader, RegionWriter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load_in_one_process(path: Path, value: int, **options: Any) -> None:
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in dcp_ranks.full_state(0).items()}
    state |= {"plain": torch.zeros(4), "note": {"value": None}}
    dcp.load(state, storage_reader=RegionReader(path, **options), no_dist=True)
    dcp_ranks.check(state, value)


def test_what_two_ranks_saved_is_loaded_by_one_two_and_three(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_all, tmp_path, [1, 2, 3]) == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metadata.pccheck",
        "rank-00000.pccheck",
        "rank-00001.pccheck",
    ]
    load_in_one_process(tmp_path, 3)
    assert run_ranks(2, dcp_ranks.load_all, tmp_path, 3, True) == [0, 0]
    assert run_ranks(3, dcp_ranks.load_all, tmp_path, 3, False) == [0, 0, 0]


def test_the_group_may_shrink_and_grow_in_one_folder(tmp_path: Path) -> None:
    for world, value in ((2, 1), (1, 2), (3, 3), (2, 4)):
        assert run_ranks(world, dcp_ranks.save_all, tmp_path, [value]) == [0] * world
        load_in_one_process(tmp_path, value)


def test_one_process_saves_and_ranks_load(tmp_path: Path) -> None:
    state: dict[str, Any] = dcp_ranks.full_state(5)
    state |= {"plain": torch.full((4,), 5.0), "note": {"value": 5}}
    dcp.save(state, storage_writer=RegionWriter(tmp_path), no_dist=True)
    assert run_ranks(2, dcp_ranks.load_all, tmp_path, 5, True) == [0, 0]


def test_async_saves_of_ranks_hold_what_was_there_when_they_were_called(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_async, tmp_path) == [0, 0]


def test_a_failing_rank_costs_its_save_only(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_with_a_failing_rank, tmp_path) == [0, 0]


def test_a_coordinator_killed_before_publication_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_all, tmp_path, [1, 2]) == [0, 0]
    for _ in range(2):
        assert run_ranks(2, dcp_ranks.save_and_die, tmp_path, 9)[0] == -9
        load_in_one_process(tmp_path, 2)
    assert run_ranks(2, dcp_ranks.save_all, tmp_path, [3]) == [0, 0]
    load_in_one_process(tmp_path, 3)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_all, tmp_path, [1]) == [0, 0]
    (tmp_path / "rank-00001.pccheck").unlink()
    with pytest.raises(CheckpointException, match="no published checkpoint is complete: save 1: rank-00001.pccheck"):
        load_in_one_process(tmp_path, 1)


def test_ranks_that_save_alone_have_checkpoints_of_their_own(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_alone, tmp_path) == [0, 0]


def test_pieces_of_different_checkpoints_are_refused(tmp_path: Path) -> None:
    assert run_ranks(2, dcp_ranks.save_all, tmp_path, [1, 2]) == [0, 0]
    assert run_ranks(2, dcp_ranks.refuse_different_checkpoints, tmp_path) == [0, 0]
