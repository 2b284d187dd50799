"""Prevents: a failed save or a damaged file that takes the published checkpoint with it, or passes for it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402

import pccheck  # noqa: E402
from pccheck import errors  # noqa: E402
from pccheck.dcp import RegionReader, RegionWriter  # noqa: E402
from pccheck.store import Store  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

COUNT = 1 << 16


def state(value: float) -> dict[str, Any]:
    return {"x": torch.full((COUNT,), value), "n": value}


def save(value: float, writer: RegionWriter, **options: Any) -> None:
    dcp.save(state(value), storage_writer=writer, no_dist=True, **options)


def loaded(path: Path, **options: Any) -> float:
    found = state(-1.0)
    dcp.load(found, storage_reader=RegionReader(path, **options), no_dist=True)
    assert found["x"].min() == found["x"].max() == found["n"]
    return float(found["n"])


def cause(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    (failure,) = caught.value.failures.values()
    return failure[0]


class Broken(DefaultSavePlanner):
    """A planner whose data cannot be had."""

    def resolve_data(self, write_item: Any) -> Any:
        raise RuntimeError("device lost")


def test_a_failed_save_leaves_the_published_one_and_the_next_succeeds(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path)
    save(1.0, writer)
    with pytest.raises(CheckpointException, match="device lost"):
        save(2.0, writer, planner=Broken())
    assert loaded(tmp_path) == 1.0
    save(3.0, writer)
    assert loaded(tmp_path) == 3.0


@pytest.mark.parametrize("again", ["same writer", "restart"])
@pytest.mark.parametrize("keep", [1, 2])
def test_data_that_was_never_published_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, again: str
) -> None:
    writer = RegionWriter(tmp_path, keep=keep)
    for value in (1.0, 2.0):
        save(value, writer)
    # The coordinator dies between the ranks' data and the metadata, again and again.
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(RegionWriter, "finish", lambda *args, **kwargs: pytest.fail("coordinator died"))
            with pytest.raises(CheckpointException, match="coordinator died"):
                save(9.0, writer)
        assert loaded(tmp_path) == 2.0
        if keep == 2:
            assert loaded(tmp_path, older_than=2) == 1.0
        if again == "restart":
            writer.close()
            writer = RegionWriter(tmp_path, keep=keep)
    save(3.0, writer)
    assert loaded(tmp_path) == 3.0
    if keep == 2:
        assert loaded(tmp_path, older_than=3) == 2.0
    with pccheck.Store(tmp_path / "rank-00000.pccheck", read_only=True) as store:
        tokens = {checkpoint.generation for checkpoint in store.checkpoints()}
    metadata = RegionReader(tmp_path).read_metadata()
    assert {stored.part.generation for stored in metadata.storage_data.values()} <= tokens


def test_the_first_save_ever_may_fail_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RegionWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RegionWriter, "finish", lambda *args, **kwargs: pytest.fail("coordinator died"))
        for _ in range(3):
            with pytest.raises(CheckpointException, match="coordinator died"):
                save(9.0, writer)
    with pytest.raises(CheckpointException) as caught:
        loaded(tmp_path)
    assert "expected a published checkpoint, found none" in str(caught.value)
    save(1.0, writer)
    assert loaded(tmp_path) == 1.0


def test_an_older_save_that_is_overtaken_is_given_up(tmp_path: Path) -> None:
    writer, other = RegionWriter(tmp_path), RegionWriter(tmp_path)
    save(1.0, writer)
    real = writer.finish

    def overtaken(*args: Any, **kwargs: Any) -> None:
        save(3.0, other)
        real(*args, **kwargs)

    writer.finish = overtaken  # type: ignore[method-assign]
    with pytest.raises(CheckpointException) as caught:
        save(2.0, writer)
    assert isinstance(cause(caught), errors.Cancelled)
    assert loaded(tmp_path) == 3.0


class Held(DefaultSavePlanner):
    """A planner of an async save that stops between its plan and its data, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.planned, self.go = threading.Event(), threading.Event()

    def finish_plan(self, new_plan: Any) -> Any:
        self.planned.set()
        assert self.go.wait(60)
        return super().finish_plan(new_plan)


class HeldWriter(RegionWriter):
    """A writer whose saves stop between the data and its publication."""

    def finish(self, metadata: Any, results: Any) -> None:
        self.written.set()
        assert self.go.wait(60)
        super().finish(metadata, results)


def held_save(value: float, path: Path, **options: Any) -> tuple[HeldWriter, Any]:
    writer = HeldWriter(path)
    writer.written, writer.go = threading.Event(), threading.Event()
    future = dcp.async_save(state(value), storage_writer=writer, no_dist=True, **options)
    assert writer.written.wait(60)
    return writer, future


def test_a_save_is_not_published_while_a_newer_one_is_about_to_discard_its_data(tmp_path: Path) -> None:
    save(1.0, RegionWriter(tmp_path))
    older, future = held_save(2.0, tmp_path)

    class Newer(RegionWriter):
        def _published(self, current: Any) -> Any:
            # It knows now what is published, and has not discarded the rest yet.
            found = super()._published(current)
            older.go.set()
            future.exception(60)
            return found

        def finish(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("coordinator died")

    with pytest.raises(CheckpointException, match="coordinator died"):
        save(3.0, Newer(tmp_path))
    with pytest.raises(CheckpointException) as caught:
        future.result()
    assert isinstance(cause(caught), errors.Cancelled)
    assert loaded(tmp_path) == 1.0
    save(4.0, RegionWriter(tmp_path))
    assert loaded(tmp_path) == 4.0


@pytest.mark.parametrize("published_first", [False, True])
def test_a_late_save_discards_nothing_of_a_newer_one(tmp_path: Path, published_first: bool) -> None:
    save(1.0, RegionWriter(tmp_path))
    planner = Held()
    late = dcp.async_save(state(2.0), storage_writer=RegionWriter(tmp_path), planner=planner, no_dist=True)
    assert planner.planned.wait(60)
    newer, future = held_save(3.0, tmp_path)
    for event, ended in ((newer.go, future), (planner.go, late))[:: 1 if published_first else -1]:
        event.set()
        ended.exception()
    future.result()
    with pytest.raises(CheckpointException) as caught:
        late.result()
    assert isinstance(cause(caught), errors.Cancelled)
    assert loaded(tmp_path) == 3.0


def test_another_ranks_data_that_was_discarded_is_not_published(tmp_path: Path) -> None:
    # The coordinator has no data of its own, by which it could see that.
    write_as_two_ranks(tmp_path, {}, state(1.0))()
    publish = write_as_two_ranks(tmp_path, {}, state(2.0))
    write_as_two_ranks(tmp_path, {}, state(3.0))
    with pytest.raises(errors.Cancelled):
        publish()
    assert loaded(tmp_path) == 1.0


def test_flipped_bytes_in_a_rank_are_found_and_an_older_one_can_be_loaded(tmp_path: Path) -> None:
    # Damage in the first chunk is found, and passed over, when the checkpoint is opened: let there be others.
    writer = RegionWriter(tmp_path, keep=2, chunk_bytes=16 << 10)
    save(1.0, writer)
    save(2.0, writer)
    writer.close()
    damage(tmp_path / "rank-00000.pccheck", 2.0)
    with pytest.raises(CheckpointException) as caught:
        loaded(tmp_path)
    assert isinstance(cause(caught), errors.Corrupt) and "older_than=2" in str(cause(caught))
    assert loaded(tmp_path, older_than=2) == 1.0
    with pytest.warns(UserWarning, match="loading save 1: save 2: rank-00000.pccheck"):
        assert loaded(tmp_path, verify=True) == 1.0


def test_growing_does_not_lose_the_published_checkpoint(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, keep=2, chunk_bytes=16 << 10)
    save(1.0, writer)
    save(2.0, writer)
    del writer
    rank = tmp_path / "rank-00000.pccheck"
    damage(rank, 2.0)
    before = rank.read_bytes()
    # One more slot, and then larger slots.
    for options, count in (({"keep": 3}, 4), ({"keep": 2}, 1 << 20)):
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"x": torch.zeros(count)}, storage_writer=RegionWriter(tmp_path, **options), no_dist=True)
        assert isinstance(cause(caught), errors.Corrupt)
        assert loaded(tmp_path, older_than=2) == 1.0 and len(rank.read_bytes()) == len(before)


def test_checkpoints_that_growing_leaves_out_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pccheck.dcp import _regions

    real = _regions.grow_region
    # Only a medium's own failure makes growing leave one out.
    monkeypatch.setattr(_regions, "grow_region", lambda *args, **options: real(*args, **options) + 1)
    save(1.0, RegionWriter(tmp_path))
    with pytest.warns(UserWarning, match=r"rank-00000.pccheck: 1 older checkpoint\(s\) could not be read"):
        save(2.0, RegionWriter(tmp_path, keep=3))
    assert loaded(tmp_path) == 2.0


def damage(path: Path, value: float) -> None:
    """Flips one byte in the middle of the tensor that holds nothing but `value`."""
    content = bytearray(path.read_bytes())
    pattern = bytes(torch.full((64,), value).view(torch.uint8).numpy())
    at = content.find(pattern * 16)
    assert at > 0
    content[at + COUNT] ^= 1
    path.write_bytes(content)


def test_damaged_metadata_falls_back_and_saving_goes_on_from_there(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, keep=2)
    save(1.0, writer)
    save(2.0, writer)
    save_id = RegionReader(tmp_path).read_metadata().storage_meta.save_id
    writer.close()
    path = tmp_path / "metadata.pccheck"
    content = bytearray(path.read_bytes())
    at = content.rfind(save_id.encode())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="loading save 1"):
        assert loaded(tmp_path) == 1.0
    with pytest.warns(UserWarning, match="going on from save 1"):
        save(3.0, RegionWriter(tmp_path, keep=2))
    assert loaded(tmp_path) == 3.0
    assert loaded(tmp_path, older_than=2) == 1.0


def test_a_lost_rank_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path)
    save(1.0, writer)
    writer.close()
    rank, aside = tmp_path / "rank-00000.pccheck", tmp_path / "aside"
    rank.rename(aside)
    with pytest.raises(CheckpointException) as caught:
        loaded(tmp_path)
    assert "no published checkpoint is complete: save 1: rank-00000.pccheck" in str(caught.value)
    with pytest.raises(CheckpointException) as caught:
        save(2.0, RegionWriter(tmp_path))
    assert isinstance(cause(caught), errors.Corrupt) and "rank-00000.pccheck" in str(cause(caught))
    aside.rename(rank)
    assert loaded(tmp_path) == 1.0


def test_an_error_that_may_pass_discards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pccheck.dcp import _folder

    writer = RegionWriter(tmp_path, keep=2)
    for value in (1.0, 2.0):
        save(value, writer)
    del writer
    real, failures = _folder.read_only, [0]

    def once(*args: Any, **kwargs: Any) -> Store:
        # A process cannot be brought out of files for one call only.
        if failures:
            raise errors.IoFailed("too many open files", errno=failures.pop())
        return real(*args, **kwargs)

    for attempt in (lambda: save(3.0, RegionWriter(tmp_path, keep=2)), lambda: loaded(tmp_path)):
        failures[:] = [errno.EMFILE]
        with monkeypatch.context() as patch:
            patch.setattr(_folder, "read_only", once)
            with pytest.raises(CheckpointException, match="too many open files"):
                attempt()
        assert not failures and loaded(tmp_path) == 2.0
    save(3.0, RegionWriter(tmp_path, keep=2))
    assert loaded(tmp_path) == 3.0 and loaded(tmp_path, older_than=3) == 2.0


def test_a_checkpoint_whose_file_is_absent_is_not_discarded(tmp_path: Path) -> None:
    # Rank 1 took part in the second save only: the first is complete without its file.
    save(1.0, RegionWriter(tmp_path, keep=2))
    write_as_two_ranks(tmp_path, {"x": state(2.0)["x"]}, {"n": 2.0})()
    absent, aside = tmp_path / "rank-00001.pccheck", tmp_path / "aside"
    absent.rename(aside)
    with pytest.warns(UserWarning, match="loading save 1: save 2: rank-00001.pccheck"):
        assert loaded(tmp_path) == 1.0
    with pytest.raises(CheckpointException) as caught:
        save(3.0, RegionWriter(tmp_path, keep=2))
    assert isinstance(cause(caught), errors.NotFound) and "rank-00001.pccheck is not there" in str(cause(caught))
    aside.rename(absent)
    assert loaded(tmp_path) == 2.0


def write_as_two_ranks(path: Path, *parts: dict[str, Any]) -> Callable[[], None]:
    """What dcp.save does on ranks 0 and 1, one after the other, short of publishing, which the result does."""
    planners, plans = [DefaultSavePlanner(), DefaultSavePlanner()], []
    writers = [RegionWriter(path, keep=2), RegionWriter(path, keep=2)]
    for rank, (planner, part, writer) in enumerate(zip(planners, parts, writers, strict=True)):
        planner.set_up_planner(part, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    return lambda: writers[0].finish(metadata, results)


def test_a_rank_lost_while_the_writer_is_open_stops_the_save(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path)
    save(1.0, writer)
    (tmp_path / "rank-00000.pccheck").unlink()
    with pytest.raises(CheckpointException) as caught:
        save(2.0, writer)
    assert isinstance(cause(caught), errors.InvalidState) and "save 1 is published" in str(cause(caught))


def test_a_region_of_another_run_does_not_pass_for_the_lost_one(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 5.0)):
        save(value, RegionWriter(tmp_path / folder))
    shutil.copy(tmp_path / "b" / "rank-00000.pccheck", tmp_path / "a" / "rank-00000.pccheck")
    with pytest.raises(CheckpointException, match="belongs to another save"):
        loaded(tmp_path / "a")


def test_missing_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="there is no such folder"):
        loaded(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointException, match="there is no such region"):
        loaded(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.pccheck").write_bytes(b"something else" * 1000)
    with pytest.raises(CheckpointException) as caught:
        save(1.0, RegionWriter(tmp_path / "empty"))
    assert isinstance(cause(caught), errors.PccheckError)
    pccheck.format_region(tmp_path / "metadata.pccheck", slots=2, payload_bytes=1000)
    with Store(tmp_path / "metadata.pccheck", max_in_flight=1) as store:
        store.save(1, {"x": torch.ones(1)}).durable()
    with pytest.raises(CheckpointException, match="not a checkpoint folder"):
        loaded(tmp_path)


def test_overwrite_false_refuses_only_where_something_is_published(tmp_path: Path) -> None:
    save(1.0, RegionWriter(tmp_path, overwrite=False))
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        save(2.0, RegionWriter(tmp_path, overwrite=False))
    assert loaded(tmp_path) == 1.0


def test_two_trainers_on_one_folder(tmp_path: Path) -> None:
    import subprocess
    import sys

    writer = RegionWriter(tmp_path)
    save(1.0, writer)
    script = (
        "import sys, torch, torch.distributed.checkpoint as dcp; from pccheck.dcp import RegionWriter\n"
        "dcp.save({'x': torch.ones(2)}, storage_writer=RegionWriter(sys.argv[1], lock_timeout=0.2), no_dist=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert ran.returncode != 0 and "InUse" in ran.stderr
    assert loaded(tmp_path) == 1.0


def test_no_room_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pccheck.dcp import _regions

    writer = RegionWriter(tmp_path)
    save(1.0, writer)

    def full(path: Path, **options: Any) -> None:
        raise errors.NoSpace("no room", path=str(path))

    with monkeypatch.context() as patch:
        # Disks cannot be filled in a test; growing is the one place that asks for room.
        patch.setattr(_regions, "grow_region", full)
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"x": torch.zeros(8 << 20)}, storage_writer=writer, no_dist=True)
    assert isinstance(cause(caught), errors.NoSpace)
    assert loaded(tmp_path) == 1.0
    save(2.0, writer)
    assert loaded(tmp_path) == 2.0


def test_values_that_have_no_plain_bytes_are_named(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"a": {"s": sparse}}, storage_writer=RegionWriter(tmp_path), no_dist=True)
    assert isinstance(cause(caught), errors.UnsupportedValue) and "a.s" in str(cause(caught))


def test_a_forked_child_may_save_elsewhere(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path / "parent")
    save(1.0, writer)
    child = os.fork()
    if child == 0:
        try:
            save(2.0, writer, checkpoint_id=tmp_path / "child")
            os._exit(0)
        except BaseException as why:
            os.write(2, repr(why).encode())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    save(3.0, writer)
    assert loaded(tmp_path / "parent") == 3.0 and loaded(tmp_path / "child") == 2.0
