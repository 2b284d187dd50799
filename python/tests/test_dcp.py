"""Prevents: `dcp.save` and `dcp.load` through regions that lose a value, a dtype or a snapshot, or that need pickle."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import native_threads

torch = pytest.importorskip("torch")
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: E402

import pccheck  # noqa: E402
from pccheck import errors  # noqa: E402
from pccheck.dcp import JsonLoadPlanner, JsonSavePlanner, RegionReader, RegionWriter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def cause(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    """The exception of the one rank that torch has wrapped."""
    (failure,) = caught.value.failures.values()
    return failure[0]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def save(state: dict[str, Any], writer: RegionWriter, **options: Any) -> None:
    dcp.save(state, storage_writer=writer, no_dist=True, **options)


def load(state: dict[str, Any], reader: RegionReader, **options: Any) -> None:
    dcp.load(state, storage_reader=reader, no_dist=True, **options)


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {str(dtype): random_bits((3, 5), dtype) for dtype in DTYPES}
    state["transposed"] = torch.arange(12.0).reshape(3, 4).t()
    state["sliced"] = torch.arange(40).reshape(5, 8)[:, 1::2]
    state["conjugate"] = torch.randn(4, dtype=torch.complex64).conj()
    state["negative"] = torch.randn(4, dtype=torch.complex64).conj().imag
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.empty(0, 7)
    # How torch names a tensor must not matter to the region.
    state |= {"__metadata__": torch.ones(2), "pccheck.x": torch.zeros(1), "é" * 3000: torch.ones(1)}
    save(state, RegionWriter(tmp_path / "ck"))
    loaded = {name: torch.empty_like(tensor).contiguous() for name, tensor in state.items()}
    load(loaded, RegionReader(tmp_path / "ck"))
    for name, tensor in state.items():
        assert bits_of(loaded[name]) == bits_of(tensor.resolve_conj().resolve_neg()), name


@pytest.mark.parametrize("staging_bytes", [8 << 20, 1 << 20], ids=["named", "streamed"])
def test_what_must_be_copied_first_is_saved_with_bounded_memory(tmp_path: Path, staging_bytes: int) -> None:
    # Two transposed tensors of 1 MiB need copies: they fit in the first limit and not in the second.
    state = {
        "a": torch.arange(512 * 512, dtype=torch.int32).reshape(512, 512).t(),
        "text": ["not", "a", "tensor"],
        "b": torch.randn(256, 4, 256).transpose(0, 2),
        "plain": torch.randn(1000, 100),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    writer = RegionWriter(tmp_path, staging_bytes=staging_bytes, chunk_bytes=64 << 10)
    save(state, writer)
    with pccheck.Store(tmp_path / "rank-00000.pccheck", read_only=True) as store, store.open() as checkpoint:
        streamed = staging_bytes == 1 << 20
        assert (set(checkpoint) == {"raw"}) == checkpoint.info.raw == streamed
    loaded = {
        "a": torch.zeros(512, 512, dtype=torch.int32),
        "text": [],
        "b": torch.zeros(256, 4, 256),
        "plain": torch.zeros(1000, 100),
        "odd": torch.zeros(3, dtype=torch.uint8),
    }
    loaded["text"] = ["", "", ""]
    load(loaded, RegionReader(tmp_path))
    assert loaded["text"] == state["text"]
    for name in ("a", "b", "plain", "odd"):
        assert torch.equal(loaded[name], state[name]), name


def test_a_training_state_comes_back_into_the_same_objects(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
        model[2].weight = model[0].weight  # tied
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    writer = RegionWriter(tmp_path, step=7)
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, writer)
    other, other_optimizer = make()
    other(torch.randn(4, 8)).sum().backward()
    other_optimizer.step()
    state = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict()}
    state["optimizer"]["param_groups"][0]["lr"] = 0.5
    reader = RegionReader(tmp_path)
    load(state, reader)
    assert (reader.sequence, reader.step) == (1, 7)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.1
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state["optimizer"]["state"][index][name])


def test_keep_and_step_choose_what_can_be_loaded(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, keep=2)
    for step in (0, 5, 10, 20, 30):
        writer.step = step
        save({"x": torch.full((4,), float(step))}, writer)
    found = {"x": torch.zeros(4)}
    for options, expected in (({}, 30.0), ({"step": 20}, 20.0), ({"older_than": 5}, 20.0)):
        load(found, RegionReader(tmp_path, **options))
        assert found["x"][0] == expected
    with pytest.raises(CheckpointException) as caught:
        load(found, RegionReader(tmp_path, step=5))
    assert "of step 5, found save 5 of step 30, save 4 of step 20" in str(caught.value)


def test_the_state_may_grow(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, keep=2)
    save({"x": torch.ones(10)}, writer)
    larger = torch.randn(3 << 20)
    save({"x": larger, "more": [1] * 50_000}, writer)
    loaded = {"x": torch.zeros(3 << 20), "more": [0] * 50_000}
    load(loaded, RegionReader(tmp_path))
    assert torch.equal(loaded["x"], larger) and loaded["more"] == [1] * 50_000
    before = {"x": torch.zeros(10)}
    load(before, RegionReader(tmp_path, older_than=2))
    assert torch.equal(before["x"], torch.ones(10))
    # More checkpoints are kept from now on.
    del writer
    save({"x": torch.zeros(5)}, RegionWriter(tmp_path, keep=4))
    load(before, RegionReader(tmp_path, older_than=2))


def test_checkpoint_id_names_the_folder(tmp_path: Path) -> None:
    writer, reader = RegionWriter(tmp_path / "unused"), RegionReader(tmp_path / "unused")
    save({"x": torch.ones(2)}, writer, checkpoint_id=tmp_path / "a" / "b")
    save({"x": torch.zeros(2)}, writer, checkpoint_id=str(tmp_path / "c"))
    found = {"x": torch.empty(2)}
    load(found, reader, checkpoint_id=tmp_path / "a" / "b")
    assert torch.equal(found["x"], torch.ones(2))
    assert not (tmp_path / "unused").exists()
    assert RegionReader.validate_checkpoint_id(tmp_path / "c") and not RegionReader.validate_checkpoint_id(tmp_path)
    assert not RegionWriter.validate_checkpoint_id("s3://bucket")


def test_metadata_is_json_and_says_what_torch_said(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path)
    state = {"model": {"w": torch.zeros(4, 6)[:, ::2]}, "list": [torch.ones(1), "text"], "n": 1}
    saved = dcp.save(state, storage_writer=writer, no_dist=True)
    read = RegionReader(tmp_path).read_metadata()
    assert read.state_dict_metadata == saved.state_dict_metadata
    assert isinstance(read.state_dict_metadata["model.w"], TensorStorageMetadata)
    assert read.planner_data == saved.planner_data
    assert read.planner_data["list.0"] == ("list", 0)
    assert read.storage_data == saved.storage_data
    assert read.version == saved.version
    assert read.storage_meta.save_id == saved.storage_meta.save_id
    with pccheck.Store(tmp_path / "metadata.pccheck", read_only=True) as store, store.open() as checkpoint:
        document = json.loads(bytes(checkpoint["metadata.json"]))
    assert document["format"] == "pccheck.dcp" and set(document["state"]) == set(saved.state_dict_metadata)


def test_json_planners_leave_no_pickle_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    state = {"x": torch.ones(3), "values": {"t": (1, 2.5, None), "nan": float("inf"), "big": 2**70, "b": b"\0\1"}}
    loaded = {"x": torch.zeros(3), "values": {"t": (), "nan": 0.0, "big": 0, "b": b""}}
    monkeypatch.setattr(pickle, "dumps", refuse)
    monkeypatch.setattr(pickle, "dump", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    save(state, RegionWriter(tmp_path), planner=JsonSavePlanner())
    load(loaded, RegionReader(tmp_path), planner=JsonLoadPlanner())
    assert loaded["values"] == state["values"] and torch.equal(loaded["x"], state["x"])
    with pytest.raises(CheckpointException) as caught:
        save({"a": {"b": object()}}, RegionWriter(tmp_path), planner=JsonSavePlanner())
    assert isinstance(cause(caught), errors.UnsupportedValue) and "a.b" in str(cause(caught))


def test_json_planner_says_so_where_the_values_were_pickled(tmp_path: Path) -> None:
    save({"v": [1]}, RegionWriter(tmp_path))
    with pytest.raises(CheckpointException) as caught:
        load({"v": [0]}, RegionReader(tmp_path), planner=JsonLoadPlanner())
    assert isinstance(cause(caught), errors.Corrupt) and "DefaultLoadPlanner" in str(cause(caught))


@pytest.mark.parametrize("cached", [False, True])
def test_async_save_holds_what_was_there_when_it_was_called(tmp_path: Path, cached: bool) -> None:
    writer = RegionWriter(tmp_path, cache_staged_state_dict=cached)
    weights, note = torch.zeros(1 << 20), [0]
    for round_number in range(1, 6):
        weights.fill_(round_number)
        note[0] = round_number
        future = dcp.async_save({"w": weights, "note": note}, storage_writer=writer, no_dist=True)
        # At once, while it is being saved.
        weights.fill_(-1)
        note[0] = -1
        future.result()
        loaded = {"w": torch.zeros(1 << 20), "note": [9]}
        load(loaded, RegionReader(tmp_path))
        assert loaded["note"] == [round_number]
        assert loaded["w"].min() == loaded["w"].max() == round_number


class Late(DefaultSavePlanner):
    """A planner of a save that comes to its thread late."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.begun.set()
        assert self.go.wait(60)
        super().set_up_planner(state_dict, storage_meta, is_coordinator)


def save_late(writer: RegionWriter, value: float, **options: Any) -> tuple[Late, Any]:
    planner = Late()
    future = dcp.async_save(
        {"x": torch.full((4,), value)}, storage_writer=writer, planner=planner, no_dist=True, **options
    )
    assert planner.begun.wait(60)
    return planner, future


@pytest.mark.parametrize("cached", [False, True])
def test_an_async_save_has_the_step_and_folder_of_when_it_was_called(tmp_path: Path, cached: bool) -> None:
    writer = RegionWriter(tmp_path / "a", step=1, keep=2, cache_staged_state_dict=cached)
    planner, future = save_late(writer, 1.0)
    writer.step = 2
    writer.reset(tmp_path / "b")
    planner.go.set()
    assert Path(future.result().storage_meta.checkpoint_id) == tmp_path / "a"
    # Without staging, the step counts when the call is made.
    save({"x": torch.full((4,), 2.0)}, writer)
    found = {"x": torch.zeros(4)}
    for folder, step in (("a", 1), ("b", 2)):
        load(found, RegionReader(tmp_path / folder, step=step))
        assert found["x"][0] == step


def test_overlapping_async_saves_go_to_their_own_folders(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path / "unused")
    late = [save_late(writer, value, checkpoint_id=tmp_path / name) for name, value in (("a", 1.0), ("b", 2.0))]
    for planner, future in late:
        planner.go.set()
        future.result()
    found = {"x": torch.zeros(4)}
    for name, value in (("a", 1.0), ("b", 2.0)):
        load(found, RegionReader(tmp_path / name))
        assert found["x"][0] == value
    assert not (tmp_path / "unused").exists()


def test_a_staged_state_takes_its_step_along_to_another_process(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, step=1)
    staged = writer.stage({"x": torch.ones(4)})
    writer.step = 2
    # As to a process of torch's: sent, and saved by a thread that has not staged it.
    sent_writer, sent = pickle.loads(pickle.dumps((writer, staged)))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(save, sent, sent_writer).result()
        load({"x": torch.zeros(4)}, RegionReader(tmp_path, step=1))
        # The label was that save's: the thread's next one has its own.
        pool.submit(save, {"x": torch.ones(4)}, sent_writer).result()
    load({"x": torch.zeros(4)}, RegionReader(tmp_path, step=2))


def test_a_cached_copy_is_not_written_to_while_a_save_reads_it(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, cache_staged_state_dict=True)
    weights = torch.ones(100)
    first = writer.stage({"w": weights})
    weights.fill_(2)
    second = writer.stage({"w": weights})
    assert first["w"][0] == 1 and second["w"][0] == 2
    address = first["w"].data_ptr()
    del first
    third = writer.stage({"w": weights})
    assert third["w"].data_ptr() == address and third["w"][0] == 2


def test_saves_of_one_writer_reuse_its_open_regions(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path)
    save({"x": torch.ones(10)}, writer)
    threads, native = threading.active_count(), len(native_threads())
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    for _ in range(5):
        save({"x": torch.ones(10)}, writer)
    # Another writer of the process shares them: the region's lock is held by the first.
    save({"x": torch.ones(10)}, RegionWriter(tmp_path, lock_timeout=0))
    assert (threading.active_count(), len(native_threads())) == (threads, native)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == inodes
    del writer
    with pccheck.Store(tmp_path / "rank-00000.pccheck", max_in_flight=1, lock_timeout=0):
        pass


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    import shutil

    writer = RegionWriter(tmp_path / "ck")
    save({"x": torch.ones(4)}, writer)
    shutil.rmtree(tmp_path / "ck")
    save({"x": torch.zeros(4)}, writer)
    reader, found = RegionReader(tmp_path / "ck"), {"x": torch.ones(4)}
    load(found, reader)
    assert reader.sequence == 1 and torch.equal(found["x"], torch.zeros(4))


def test_a_load_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    save({"a": torch.ones(3), "b": {"c": torch.zeros(2), "d": "text"}}, RegionWriter(tmp_path))
    found = {"b": {"c": torch.ones(2)}}
    load(found, RegionReader(tmp_path))
    assert torch.equal(found["b"]["c"], torch.zeros(2))
    with pytest.raises(CheckpointException, match="Missing key"):
        load({"z": torch.ones(1)}, RegionReader(tmp_path))


def test_dtypes_are_converted_as_torch_does(tmp_path: Path) -> None:
    save({"x": torch.arange(100_000, dtype=torch.float32)}, RegionWriter(tmp_path))
    found = {"x": torch.zeros(100_000, dtype=torch.float64)}
    load(found, RegionReader(tmp_path, read_bytes=64 << 10))
    assert torch.equal(found["x"], torch.arange(100_000, dtype=torch.float64))


def test_arguments_that_mean_nothing_here_are_refused_or_accepted(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    RegionWriter(tmp_path, False, False, 4, 10, False, True, None, SerializationFormat.SAFETENSORS)
    with pytest.raises(errors.Unsupported, match="_extensions"):
        RegionWriter(tmp_path, _extensions=[object()])
    with pytest.raises(errors.InvalidArgument, match="keep=0"):
        RegionWriter(tmp_path, keep=0)
    with pytest.raises(errors.InvalidArgument, match="read_bytes"):
        RegionReader(tmp_path, read_bytes=0)


def test_a_writer_can_be_sent_to_another_process(tmp_path: Path) -> None:
    writer = RegionWriter(tmp_path, keep=3)
    save({"x": torch.ones(4)}, writer)
    sent = pickle.loads(pickle.dumps(writer))
    writer.close()
    save({"x": torch.zeros(4)}, sent)
    found = {"x": torch.ones(4)}
    load(found, RegionReader(tmp_path))
    assert torch.equal(found["x"], torch.zeros(4))


def test_blobs_of_the_callers_planner_come_back(tmp_path: Path) -> None:
    save({"blob": io.BytesIO(b"bytes"), "none": None}, RegionWriter(tmp_path))
    found = {"blob": io.BytesIO(), "none": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(found, RegionReader(tmp_path))
    assert found["blob"].getvalue() == b"bytes" and found["none"] is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_runs_and_resumes(tmp_path: Path, ranks: int) -> None:
    example = Path(__file__).parent.parent / "examples" / "dcp_example.py"
    assert len(example.read_text().splitlines()) <= 40
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    for steps in ("0 to 9", "10 to 19"):
        command = [sys.executable, *(several if ranks > 1 else []), str(example), str(tmp_path / "run")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"steps {steps} done") == ranks, done.stdout
    # The same folder, resharded to one rank.
    state = {"step": 0, "model": {"2.bias": torch.zeros(10)}}
    load(state, RegionReader(tmp_path / "run"))
    assert state["step"] == 19 and bool(state["model"]["2.bias"].any())  # type: ignore[index]
