"""A region that a killed process was making, which would keep every restart from training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pccheck
from pccheck import errors, region

SIZE = {"slots": 3, "payload_bytes": 1 << 20}


def test_the_name_appears_with_the_complete_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "region"

    def interrupted(source: Path, target: Path) -> None:
        assert source != target and source.stat().st_size and not path.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            region.create_region(path, **SIZE)
    assert list(tmp_path.iterdir()) == []
    region.create_region(path, **SIZE)
    assert list(tmp_path.iterdir()) == [path]
    with pccheck.Store(path, staging_bytes=16 << 20):
        pass


def test_killed_at_any_moment_the_next_process_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "region"
    program = f"from pccheck.region import create_region; print(1, flush=True); create_region({str(path)!r}, **{SIZE})"
    for wait in (0.0, 0.002, 0.005, 0.01, 0.05):
        path.unlink(missing_ok=True)
        made = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert made.stdout is not None and made.stdout.readline()
        time.sleep(wait)
        made.send_signal(signal.SIGKILL)
        made.wait()
        if not path.exists():
            region.create_region(path, **SIZE)
        with pccheck.Store(path, staging_bytes=16 << 20) as store:
            assert store.checkpoints() == []


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_text("mine")
    with pytest.raises(errors.AlreadyExists):
        region.create_region(path, **SIZE)
    assert path.read_text() == "mine"
    path.unlink()
    region.create_region(path, **SIZE)
    with pytest.raises(errors.AlreadyExists):
        region.create_region(path, **SIZE)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"x")
    digits = "0123456789abcde"
    old, young, link, folder = (tmp_path / f".run.{digits}{last}.new" for last in "0123")
    foreign = [
        tmp_path / name
        for name in (
            ".run.notes.new",
            ".run.1.new",
            f".run.{digits}0f.new",
            f".run.{digits}G.new",
            f".run.{digits}0.new.new",
            f".other.{digits}0.new",
            f"x.run.{digits}0.new",
        )
    ]
    for leftover in (old, young, *foreign):
        leftover.write_bytes(b"x")
    link.symlink_to(theirs)
    folder.mkdir()
    yesterday = time.time() - 86400
    for path in (theirs, old, link, folder, *foreign):
        os.utime(path, (yesterday, yesterday), follow_symlinks=False)
    region.create_region(tmp_path / "run", **SIZE)
    assert set(tmp_path.iterdir()) == {tmp_path / "run", theirs, young, link, folder, *foreign}
