"""Prevents checkpoints at paths that are not what was saved, or vanish before their successor exists."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import native_threads

import pccheck
from pccheck import errors
from pccheck.torch import references
from pccheck.torch.folders import FolderOptions, RegionFolder
from pccheck.torch.paths import PathStore, load_reference

OPTIONS = {"staging_bytes": 16 << 20}


def state_of(value: float, size: int = 1000) -> dict[str, object]:
    return {"weights": torch.full((size,), value), "value": value}


def value_at(path: Path) -> float:
    state = load_reference(path)
    assert torch.equal(state["weights"], torch.full_like(state["weights"], state["value"]))
    return float(state["value"])


def region_of(folder: Path) -> Path:
    return folder / ".pccheck" / "region-0.pccheck"


def pinned(folder: Path) -> list[int]:
    with pccheck.Store(region_of(folder), read_only=True) as store:
        return sorted(info.step for info in store.checkpoints() if info.pinned)


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def test_every_value_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    state = {
        "dtypes": {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
        "integer keys": {0: torch.ones(2), -7: {"nested": (1, [2.5, None, "text"], {True: "yes"})}},
        "shapes": [torch.tensor(3.5), torch.empty(0, 4), shared.t(), shared[:, ::2], torch.randn(2, 3).conj()],
        "tied": (shared, shared),
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numpy": np.arange(6, dtype="int16").reshape(2, 3).T,
        "floats": [float("inf"), -0.0, 0.1, 1e-320],
        "large": 2**200,
        "size": torch.Size([2, 3]),
    }
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state, tmp_path / "all.ckpt", step=5)
        found = store.load(tmp_path / "all.ckpt")

    def same(a: object, b: object) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape  # type: ignore[union-attr]
            a, b = a.detach().resolve_conj().contiguous(), b.detach().contiguous()  # type: ignore[union-attr]
            assert a.reshape(-1).view(torch.uint8).tolist() == b.reshape(-1).view(torch.uint8).tolist()
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype  # type: ignore[union-attr]
        elif isinstance(a, dict):
            assert list(a) == list(b)  # type: ignore[call-overload]
            for key in a:
                same(a[key], b[key])  # type: ignore[index]
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)  # type: ignore[arg-type]
            for one, other in zip(a, b, strict=True):  # type: ignore[call-overload]
                same(one, other)
        else:
            assert repr(a) == repr(b)

    same(state, found)
    first, second = found["tied"]
    first[0, 0] = 42.0
    assert second[0, 0] == 42.0
    assert isinstance(found["module"], OrderedDict) and found["module"]._metadata == state["module"]._metadata


def test_what_is_saved_is_the_state_at_the_call_though_it_changes_on_return(tmp_path: Path) -> None:
    # Larger than the staging pool, so that copying takes as long as the medium does.
    state = state_of(0.0, size=10_000_000)
    with PathStore(tmp_path, **OPTIONS) as store:
        for step in range(3):
            state["weights"].fill_(float(step))  # type: ignore[attr-defined]
            state["value"] = float(step)
            store.save(state, tmp_path / f"{step}.ckpt", step=step)
            state["weights"].fill_(-1.0)  # type: ignore[attr-defined]
        store.wait()
        assert [value_at(tmp_path / f"{step}.ckpt") for step in range(3)] == [0.0, 1.0, 2.0]


def test_a_file_appears_only_when_its_checkpoint_is_durable_and_a_removal_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), old, wait="durable")
        gate = threading.Event()
        finish = RegionFolder._finish
        monkeypatch.setattr(RegionFolder, "_finish", lambda self, job: (gate.wait(60), finish(self, job))[1])
        store.save(state_of(2.0), new)
        store.remove(old)
        assert not new.exists() and value_at(old) == 1.0
        gate.set()
        store.wait()
        assert not old.exists() and value_at(new) == 2.0
    assert pinned(tmp_path) == [0]


def test_nothing_is_removed_while_its_successor_could_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, later = (tmp_path / f"{name}.ckpt" for name in ("old", "new", "later"))
    store = PathStore(tmp_path, **OPTIONS)
    store.save(state_of(1.0), old, wait="durable")
    with monkeypatch.context() as patch:
        patch.setattr(references, "write", _disk_full)
        store.save(state_of(2.0), new)
        store._open_region().wait()
    with pytest.raises(OSError, match="No space left"):
        store.remove(old)
    store.remove(old)
    store.wait()
    assert value_at(old) == 1.0 and not new.exists()
    assert store.failures == 1
    store.save(state_of(3.0), later)
    store.close()
    assert not old.exists() and value_at(later) == 3.0


def test_a_path_saved_anew_is_not_removed_by_an_older_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    store = PathStore(tmp_path, on_error="warn", **OPTIONS)
    store.save(state_of(1.0), path, wait="durable")
    with monkeypatch.context() as patch:
        patch.setattr(references, "write", _disk_full)
        store.save(state_of(2.0), tmp_path / "new.ckpt")
        store._open_region().wait()
    with pytest.warns(RuntimeWarning, match="No space left"):
        store.remove(path)
    store.save(state_of(3.0), path)
    store.close()
    assert value_at(path) == 3.0


def test_closing_in_a_given_time_cancels_the_rest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, told = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", told.append)
    store = PathStore(tmp_path, **OPTIONS)
    store.save(state_of(1.0), tmp_path / "a.ckpt", wait="durable")
    finish = RegionFolder._finish
    monkeypatch.setattr(RegionFolder, "_finish", lambda self, job: (gate.wait(60), finish(self, job))[1])
    # It replaces a reference, whose checkpoint would be freed.
    store.save(state_of(2.0), tmp_path / "a.ckpt")
    store.save(state_of(3.0), tmp_path / "b.ckpt")
    store.remove(tmp_path / "a.ckpt")
    region = store._open_region()
    with pytest.raises(errors.TimedOut, match="cancelled"):
        store.close(0.1)
    gate.set()
    region.wait()
    # The first was durable, and its reference was being written.
    assert value_at(tmp_path / "a.ckpt") in (1.0, 2.0) and not (tmp_path / "b.ckpt").exists() and not told
    assert store.closed and store.failures >= 2


def test_closing_does_not_wait_for_ever_for_another_threads_save(tmp_path: Path) -> None:
    store = PathStore(tmp_path, **OPTIONS)
    store.save(state_of(1.0), tmp_path / "a.ckpt")
    with store._open_region().entered():
        thread = threading.Thread(target=lambda: pytest.raises(errors.TimedOut, store.close, 0.1))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("where", ["copied", "_enqueue"])
def test_an_interrupted_save_leaves_no_checkpoint_of_a_state_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "last.ckpt"
    # Larger than the staging pool: most of it is not copied when the wait is interrupted.
    state = state_of(2.0, size=30_000_000)
    store = PathStore(tmp_path, **OPTIONS)
    store.save(state_of(1.0, size=30_000_000), path, wait="durable")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RegionFolder if where == "_enqueue" else pccheck.Save, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(state, path, step=2)
    state["weights"].fill_(-1.0)  # type: ignore[attr-defined]
    if where == "copied":
        with pytest.raises(errors.Cancelled):
            store.wait()
    store.close()
    assert value_at(path) == 1.0 and pinned(tmp_path) == [0]


def test_a_save_that_is_durable_is_not_reported_as_failed_where_old_references_cannot_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "elsewhere")

    path = tmp_path / "last.ckpt"
    with PathStore(tmp_path, slots=5, **OPTIONS) as store, monkeypatch.context() as patch:
        patch.setattr(references, "_walked", denied)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            # More than there are slots: orphans are looked for too.
            for step in range(6):
                store.save(state_of(float(step)), path, step=step, wait="durable")
        assert [str(one.message).count("keep their slots") for one in seen] == [1]
        assert store.failures == 0 and value_at(path) == 5.0


def test_a_reference_whose_folder_is_renamed_while_references_are_looked_for_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk

    def renaming(top: Path, *arguments: object, **options: object) -> object:
        for at, folders, names in walk(top, *arguments, **options):  # type: ignore[call-overload]
            folders.sort()
            yield at, folders, names
            if (tmp_path / "z").exists():
                # Was listed, and is not there any more when its turn comes.
                (tmp_path / "z").rename(tmp_path / "a")

    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), tmp_path / "one.ckpt", step=1)
        store.save(state_of(2.0), tmp_path / "two.ckpt", step=2)
        store.wait()
        (tmp_path / "z").mkdir()
        shutil.copy(tmp_path / "one.ckpt", tmp_path / "z" / "copy.ckpt")
        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", renaming)
            store.remove(tmp_path / "one.ckpt")
            store.wait()
        assert store.failures == 0
    assert value_at(tmp_path / "a" / "copy.ckpt") == 1.0


def test_what_a_crash_left_of_a_reference_keeps_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(0.0), path, wait="durable")
        with monkeypatch.context() as patch:
            # The file is written and neither renamed nor removed.
            patch.setattr(Path, "replace", _disk_full)
            patch.setattr(Path, "unlink", _disk_full)
            with pytest.raises(OSError, match="No space left"):
                store.save(state_of(1.0), path, step=1, wait="durable")
        assert [references.is_reference(one) for one in tmp_path.glob(".*.tmp")] == [True]
        store.save(state_of(2.0), path, step=2, wait="durable")
    assert pinned(tmp_path) == [2]


def test_checkpoints_that_are_lost_while_the_region_grows_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(*arguments: Any, **options: Any) -> int:
        return pccheck.grow_region(*arguments, **options) + 1

    with PathStore(tmp_path, slots=6, **OPTIONS) as store:
        store.save(state_of(1.0), tmp_path / "a.ckpt", wait="durable")
        # What no file can be made to do: its medium fails to read it.
        monkeypatch.setattr("pccheck.torch.folders.grow_region", losing)
        with pytest.warns(RuntimeWarning, match="without 1 of its checkpoints"):
            store.save(state_of(2.0, size=4_000_000), tmp_path / "b.ckpt", wait="durable")


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_failures_warn_once_and_are_counted_where_they_are_not_to_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PathStore(tmp_path, on_error="warn", **OPTIONS) as store:
        store.save(state_of(1.0), tmp_path / "a.ckpt", wait="durable")
        monkeypatch.setattr(references, "write", _disk_full)
        with pytest.warns(RuntimeWarning, match="No space left") as seen:
            store.save(state_of(2.0), tmp_path / "b.ckpt", wait="durable")
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store.wait()
        assert store.failures == 1 and value_at(tmp_path / "a.ckpt") == 1.0


def test_what_cannot_be_represented_is_refused_by_name_and_nothing_is_saved(tmp_path: Path) -> None:
    with PathStore(tmp_path, on_error="warn", **OPTIONS) as store:
        with pytest.raises(errors.UnsupportedValue, match=r"config\.activation"):
            store.save({"config": {"activation": torch.nn.functional.relu}}, tmp_path / "a.ckpt")
        for bad in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
            with pytest.raises(errors.UnsupportedValue, match=r"bad\.0: a .*(sparse|meta)"):
                store.save({"bad": [bad]}, tmp_path / "a.ckpt")
        store.wait()
        assert not (tmp_path / "a.ckpt").exists()


def test_the_region_grows_with_the_state_and_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    with PathStore(tmp_path, slots=4, **OPTIONS) as store:
        for step in range(9):
            store.save(state_of(float(step), size=1000 * 4**step), tmp_path / f"{step}.ckpt", step=step)
        store.wait()
        for step in range(9):
            assert value_at(tmp_path / f"{step}.ckpt") == step
    assert pinned(tmp_path) == list(range(9))


def test_overwriting_and_removing_free_their_slots(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with PathStore(tmp_path, slots=6, **OPTIONS) as store:
        for step in range(30):
            store.save(state_of(float(step)), path, step=step)
            store.save(state_of(float(step)), tmp_path / f"{step}.ckpt", step=100 + step)
            store.remove(tmp_path / f"{step}.ckpt")
        store.wait()
        with pccheck.Store(region_of(tmp_path), read_only=True) as region:
            assert region.got().slot_count == 6
    assert pinned(tmp_path) == [29] and value_at(path) == 29.0


def test_deleted_references_free_their_slots_and_renamed_ones_keep_them(tmp_path: Path) -> None:
    with PathStore(tmp_path, slots=6, **OPTIONS) as store:
        for step in range(3):
            store.save(state_of(float(step)), tmp_path / f"{step}.ckpt", step=step)
        store.wait()
        (tmp_path / "1.ckpt").unlink()
        (tmp_path / "best").mkdir()
        (tmp_path / "0.ckpt").rename(tmp_path / "best" / "kept.ckpt")
        store.save(state_of(3.0), tmp_path / "3.ckpt", step=3)
    assert pinned(tmp_path) == [0, 2, 3]
    assert value_at(tmp_path / "best" / "kept.ckpt") == 0.0
    with pccheck.Store(region_of(tmp_path), read_only=True) as region:
        assert region.got().slot_count == 6


def test_copies_and_links_of_references_outlive_the_original(tmp_path: Path) -> None:
    path, copy, link = (tmp_path / f"{name}.ckpt" for name in ("a", "copy", "link"))
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), path, step=1, wait="durable")
        shutil.copy(path, copy)
        link.symlink_to("a.ckpt")
        assert store.load(link)["value"] == 1.0
        # A link is a file of its own: replacing or removing it leaves what it links to.
        store.save(state_of(2.0), link, wait="durable")
        assert value_at(path) == 1.0 and value_at(link) == 2.0
        store.remove(path)
        store.wait()
        assert value_at(copy) == 1.0 and pinned(tmp_path) == [0, 1]
        store.remove(copy)
        store.save(state_of(3.0), link, wait="durable")
    assert pinned(tmp_path) == [0]


def test_path_stores_of_a_folder_share_its_region(tmp_path: Path) -> None:
    first, second = PathStore(tmp_path, **OPTIONS), PathStore(str(tmp_path), **OPTIONS)
    first.save(state_of(1.0), tmp_path / "1.ckpt")
    second.save(state_of(2.0), tmp_path / "2.ckpt")
    first.close()
    assert second.load(tmp_path / "1.ckpt")["value"] == 1.0
    with pytest.raises(errors.InvalidArgument, match="other|options"):
        PathStore(tmp_path, slots=9)
    second.close()
    assert second.closed
    with pytest.raises(errors.InvalidState, match="closed"):
        second.save(state_of(1.0), tmp_path / "3.ckpt")
    # It was given back: another process may save now.
    with PathStore(tmp_path, slots=9) as third:
        third.save(state_of(3.0), tmp_path / "3.ckpt")


def test_another_process_saving_to_the_folder_is_named(tmp_path: Path) -> None:
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), tmp_path / "1.ckpt", wait="durable")
        script = (
            "import sys, torch\nfrom pccheck.torch.paths import PathStore\nfrom pccheck import errors\n"
            "store = PathStore(sys.argv[1], lock_timeout=0.1)\n"
            "print(store.load(sys.argv[1] + '/1.ckpt')['value'])\n"
            "try:\n    store.save({'a': 1}, sys.argv[1] + '/2.ckpt')\n"
            "except errors.InUse as why:\n    print('InUse', why)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
        loaded, refused = done.stdout.splitlines()
        assert loaded == "1.0" and refused.startswith("InUse") and str(os.getpid()) in refused


def test_a_killed_process_leaves_the_last_durable_file_and_its_slots_are_found_again(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, threading, torch\nfrom pathlib import Path\n"
        "from pccheck.torch import references\nfrom pccheck.torch.paths import PathStore\n"
        "folder = Path(sys.argv[1])\nstore = PathStore(folder)\n"
        "store.save({'weights': torch.full((10,), 1.0), 'value': 1.0}, folder / 'last.ckpt', wait='durable')\n"
        # Between commit and reference.
        "references.write = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.save({'weights': torch.full((10,), 2.0), 'value': 2.0}, folder / 'last.ckpt', step=2, wait='durable')\n"
    )
    for round_ in range(4):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert value_at(tmp_path / "last.ckpt") == 1.0
        assert len(pinned(tmp_path)) <= 3, f"orphans pile up in round {round_}"
    with pccheck.Store(region_of(tmp_path), read_only=True) as region:
        assert region.got().slot_count == 6


def test_normal_exit_finishes_what_is_in_flight(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pccheck.torch.paths import PathStore\n"
        "PathStore(sys.argv[1]).save({'weights': torch.ones(1 << 22), 'value': 1.0}, sys.argv[1] + '/a.ckpt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert value_at(tmp_path / "a.ckpt") == 1.0


def test_a_forked_child_is_refused_and_may_make_its_own(tmp_path: Path) -> None:
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), tmp_path / "a.ckpt", wait="durable")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    store.save(state_of(2.0), tmp_path / "b.ckpt")
                except errors.Forked:
                    own = PathStore(tmp_path, **OPTIONS)
                    code = 0 if own.load(tmp_path / "a.ckpt")["value"] == 1.0 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_dangling_foreign_and_damaged_references_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(1.0), path, wait="durable")
        with pytest.raises(errors.NotFound, match="in flight when its process ended"):
            store.load(tmp_path / "missing.ckpt")
        with pytest.raises(errors.NotFound):
            store.remove(tmp_path / "missing.ckpt")
        foreign = tmp_path / "foreign.ckpt"
        torch.save({"a": 1}, foreign)
        for call in (store.load, store.remove):
            with pytest.raises(errors.NotARegion, match="no reference"):
                call(foreign)
        assert foreign.exists()
        with pytest.raises(errors.InvalidArgument, match="not below"):
            store.save(state_of(1.0), tmp_path.parent / "outside.ckpt")
        with pytest.raises(errors.InvalidArgument, match="not below"):
            store.save(state_of(1.0), tmp_path / ".pccheck" / "inside.ckpt")

    fields = json.loads(path.read_text())
    damaged = tmp_path / "damaged.ckpt"
    for change, expected, text in [
        ({"generation": fields["generation"] + 100}, errors.NotFound, "not there any more"),
        ({"id": "0" * 32}, errors.Corrupt, "is another"),
        ({"region_uuid": "0" * 32}, errors.NotFound, "is region"),
        ({"region": "../../etc/passwd"}, errors.Corrupt, "no file name"),
        ({"generation": "7"}, errors.Corrupt, "wrong type"),
        ({"pccheck_reference": 2}, errors.Unsupported, "newer pccheck"),
    ]:
        damaged.write_text(json.dumps({**fields, **change}))
        with pytest.raises(expected, match=text):
            load_reference(damaged)
    damaged.write_bytes(path.read_bytes()[:60])
    with pytest.raises(errors.Corrupt, match="damaged"):
        load_reference(damaged)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere.ckpt"
    shutil.copy(path, elsewhere)
    with pytest.raises(errors.NotFound, match="keep the reference below"):
        load_reference(elsewhere)


def test_damaged_data_are_not_returned(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save({"weights": torch.full((100_000,), 7.25)}, path, wait="durable")
    region = region_of(tmp_path)
    content = region.read_bytes()
    at = content.index(np.full(64, 7.25, "float32").tobytes()) + 50_000
    with region.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
    with pytest.raises(errors.Corrupt):
        load_reference(path)


def test_a_folder_that_was_moved_loads_and_goes_on(tmp_path: Path) -> None:
    before, after = tmp_path / "run", tmp_path / "renamed"
    with PathStore(before, **OPTIONS) as store:
        store.save(state_of(1.0), before / "tag" / "a.ckpt")
    before.rename(after)
    with PathStore(after, **OPTIONS) as store:
        assert store.load(after / "tag" / "a.ckpt")["value"] == 1.0
        store.save(state_of(2.0), after / "tag" / "b.ckpt")
        store.remove(after / "tag" / "a.ckpt")
    assert value_at(after / "tag" / "b.ckpt") == 2.0


def test_map_location_is_that_of_torch_load(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save({"a": torch.ones(3)}, path)
        for location in ("meta", torch.device("meta"), {"cpu": "meta"}):
            assert store.load(path, map_location=location)["a"].device.type == "meta"
        seen = []
        for location in (None, "cpu", {"cuda:0": "cpu"}, lambda storage, where: seen.append(where) or storage):
            assert store.load(path, map_location=location)["a"].tolist() == [1.0, 1.0, 1.0]
        assert seen == ["cpu"]


def test_no_thread_is_started_per_save(tmp_path: Path) -> None:
    with PathStore(tmp_path, **OPTIONS) as store:
        store.save(state_of(0.0), tmp_path / "a.ckpt", wait="durable")
        before = threading.active_count()
        tasks = len(native_threads())
        for step in range(10):
            store.save(state_of(float(step)), tmp_path / "a.ckpt")
        assert threading.active_count() == before
        assert len(native_threads()) == tasks


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="on_error"):
        PathStore(tmp_path, on_error="ignore")  # type: ignore[arg-type]
    assert FolderOptions().keep == 1
