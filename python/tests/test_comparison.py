"""Prevents: a comparison that measures nothing, believes what a system says of itself, or flatters PCcheck.

Systems with planted faults are measured beside real ones. Most run in this process, where torch is loaded already;
the command itself runs once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(Path(__file__).parent)]

from comparison import durability, plan, probes, summary, table, worker
from comparison.settings import Settings
from comparison.state import TorchState
from comparison.systems import SYSTEMS, entry_of
from measuring import machine
from programs.planted_systems import SLOW_SECONDS

SIZE, SAVES, ROUNDS = 4_000_000, 3, 2
BLOCK_BYTES = 4096
PLANTED = "programs.planted_systems:"
REAL = ["ceiling", "pccheck", "pccheck-threads", "pccheck-mmap", "torch-save", "safetensors", "dcp", "dcp-async"]
REAL += ["dcp-cached", "checkfreq", "gpm"]
NAMES = [*REAL, f"{PLANTED}Slow", f"{PLANTED}Unsynced"]
ENTRIES = {name: entry_of(name) for name in NAMES}


def disk_folder() -> str:
    """A folder on a disk: what is in memory is never durable."""
    base = Path(tempfile.gettempdir())
    if machine.file_system(base) in machine.IN_MEMORY:
        base = ROOT / "target"
        base.mkdir(exist_ok=True)
    return tempfile.mkdtemp(prefix="pccheck-comparison-", dir=base)


@pytest.fixture
def disk() -> Iterator[Path]:
    folder = disk_folder()
    yield Path(folder)
    shutil.rmtree(folder)


def measure(system: str, saves: int = SAVES) -> dict[str, Any]:
    folder = disk_folder()
    try:
        settings = Settings(system, folder, SIZE, saves, seed=1)
        return worker.measure(settings) if saves else probes.probe(settings)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return [
        {"system": name, "size": SIZE, "round": round_index} | measure(name)
        for round_index in range(ROUNDS)
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def found(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["system"]: entry for entry in summary.summarise(runs, ENTRIES)}


def test_every_system_has_every_measurement(runs: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    assert set(found) == set(NAMES)
    for run in runs:
        assert len(run["saves"]) == SAVES and run["state_bytes"] == SIZE
        for save in run["saves"]:
            assert 0 < save["blocked"] <= save["durable"]
            assert save["cpu"] > 0 and save["extra_bytes"] >= 0
        assert run["restore_seconds"] > 0 and run["open_seconds"] >= 0
    for name, entry in found.items():
        assert entry["rounds"] == ROUNDS
        for measure_name, spread in entry["measures"].items():
            assert spread["least"] <= spread["median"] <= spread["greatest"], (name, measure_name)


def test_real_systems_are_durable_and_compared(found: dict[str, dict[str, Any]]) -> None:
    for name in REAL:
        assert found[name]["flaws"] == [], name
        assert found[name]["share_of_ceiling"]["least"] > 0
        if ENTRIES[name].group == "peer":
            assert found[name]["durable_over_pccheck"]["least"] > 0
            assert found[name]["blocked_over_pccheck"]["least"] > 0


def test_a_slow_peer_shows_slower(runs: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    slow = found[f"{PLANTED}Slow"]
    assert slow["measures"]["durable_seconds"]["least"] >= SLOW_SECONDS
    # The ratio is that of the two systems in one round, and nothing else.
    by = {(run["system"], run["round"]): summary.measures(run)["durable_seconds"] for run in runs}
    ratios = [by[f"{PLANTED}Slow", each] / by["pccheck", each] for each in range(ROUNDS)]
    assert slow["durable_over_pccheck"]["least"] == min(ratios)
    assert slow["durable_over_pccheck"]["greatest"] == max(ratios)


def test_a_system_that_does_not_sync_is_not_compared(found: dict[str, dict[str, Any]]) -> None:
    unsynced = found[f"{PLANTED}Unsynced"]
    assert len(unsynced["flaws"]) == ROUNDS and "save 1 said durable" in unsynced["flaws"][0]
    assert "share_of_ceiling" not in unsynced and "durable_over_pccheck" not in unsynced


def test_each_sign_of_a_missing_sync_is_a_flaw() -> None:
    durable = {"dirty_bytes": 0, "flushes": 1}
    assert summary.flaw({"saves": [durable]}) is None
    assert "not told to flush" in str(summary.flaw({"saves": [durable, durable | {"flushes": 0}]}))
    assert "4096 bytes" in str(summary.flaw({"saves": [durable, durable | {"dirty_bytes": 4096}]}))


def test_results_of_other_sizes_are_shown_as_one(runs: list[dict[str, Any]]) -> None:
    result = {"runs": runs, "summary": summary.summarise(runs, ENTRIES), "left_out": [], "failed": [], "probes": {}}
    result["interrupted"] = False
    other = result | {"runs": [runs[0] | {"size": 2 * SIZE}], "interrupted": True}
    merged = summary.merge([result, other])
    assert len(merged["runs"]) == len(runs) + 1 and merged["interrupted"]
    with pytest.raises(ValueError, match=str(SIZE)):
        summary.merge([result, result])


def test_wrong_bytes_end_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="tensors that differ: 1"):
        measure(f"{PLANTED}Forgetful", saves=1 + 1)


def test_probes_find_who_copies_and_who_verifies() -> None:
    assert measure("pccheck", saves=0) == {
        "copied": True,
        "immutable": False,
        "damage": "refused: an older checkpoint was restored",
    }
    assert measure("gpm", saves=0)["damage"] == "restored unnoticed"
    assert not measure(f"{PLANTED}Uncopied", saves=0)["copied"]


def test_the_state_has_its_size_and_changes_everywhere() -> None:
    state = TorchState(SIZE, seed=3)
    before = b"".join(tensor.numpy().tobytes() for tensor in state.tensors.values())
    state.change()
    after = b"".join(tensor.numpy().tobytes() for tensor in state.tensors.values())
    assert len(before) == len(after) == state.nbytes == SIZE
    assert all(before[at : at + BLOCK_BYTES] != after[at : at + BLOCK_BYTES] for at in range(0, SIZE, BLOCK_BYTES))


def test_what_was_written_is_told_from_what_is_durable(disk: Path) -> None:
    path = disk / "file"
    path.write_bytes(b"x" * SIZE)
    dirty = durability.cached(disk)
    durability.sync_file(path)
    clean = durability.cached(disk)
    if dirty is None or clean is None:
        pytest.fail("expected a kernel that has cachestat (6.5)")
    assert dirty.dirty > 0 and clean.dirty == 0 and clean.cached > 0
    durability.drop_cache(disk)
    assert durability.cached(disk) == durability.Cached(0, 0)


def test_every_round_has_every_system_in_an_order_of_its_own(disk: Path) -> None:
    systems = [SYSTEMS[name] for name in REAL]
    planned = plan.make(systems, [SIZE], 4, 7, disk, disk)
    assert planned == plan.make(systems, [SIZE], 4, 7, disk, disk)
    orders = [[job.system.name for job in planned.jobs if job.round == each] for each in range(4)]
    assert all(sorted(order) == sorted(REAL) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_what_has_no_room_is_left_out_by_name(disk: Path) -> None:
    planned = plan.make([SYSTEMS["gpm"], SYSTEMS["pccheck-whole"]], [SIZE, 10**15], 1, 0, disk, disk)
    reasons = {(each.system, each.size): each.reason for each in planned.left_out}
    assert [(job.system.name, job.size) for job in planned.jobs] == [("gpm", SIZE)]
    assert "GB of memory" in reasons["gpm", 10**15]
    assert reasons["pccheck-whole", SIZE] == "the default staging pool holds the state"


def test_the_command_measures_reports_and_draws(disk: Path) -> None:
    result, picture = disk / "result.json", disk / "picture.svg"
    systems = f"ceiling,pccheck,{PLANTED}Unsynced,{PLANTED}Broken"
    paths = [*(path for path in sys.path if path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benches" / "compare"), "--python", sys.executable, "--dir", str(disk)]
    options = ["--sizes", "4MB", "--repeat", "1", "--later", "1", "--no-probes", "--systems", systems]
    options += ["--json", str(result), "--picture", str(picture)]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    # A system failed, which is no reason to lose the others.
    assert done.returncode == 1, done.stderr
    measured = json.loads(result.read_text())
    assert {run["system"] for run in measured["runs"]} == set(systems.split(",")[:3])
    assert [each["system"] for each in measured["failed"]] == [f"{PLANTED}Broken"]
    assert "FAILED 1 times: RuntimeError: planted: cannot save" in done.stdout
    assert "NOT DURABLE" in done.stdout and "PCcheck direct" in done.stdout
    assert picture.read_text().startswith("<?xml")
    assert list(disk.iterdir()) == [result, picture] or sorted(disk.iterdir()) == sorted([result, picture])
    shown = table.render(measured, {name: entry_of(name) for name in systems.split(",")})
    assert shown in done.stdout
