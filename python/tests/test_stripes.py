"""Prevents: a region that is not striped although it was asked for, and a lost member that looks like no region at all,
which would make a trainer begin from scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MIB, SMALL

import pccheck
from pccheck import errors

STATE = {"w": np.arange(3 * MIB, dtype=np.uint32)}


def make(folder: Path, members: int = 3, **options: Any) -> list[Path]:
    paths = [folder / f"member{index}" for index in range(members)]
    options = {"slots": 3, "payload_bytes": pccheck.payload_bytes(STATE), "stripe_unit": 2 * MIB} | options
    pccheck.format_region(paths[0], stripe=paths[1:], **options)
    return paths


def test_a_striped_region_saves_and_restores(tmp_path: Path) -> None:
    paths = make(tmp_path)
    with pccheck.Store(paths[0], **SMALL) as store:
        assert (store.got().members, store.got().stripe_unit_bytes) == (3, 2 * MIB)
        store.save(5, STATE).durable()
    found = {"w": np.zeros_like(STATE["w"])}
    with pccheck.Store(paths[0], read_only=True, **SMALL) as store, store.restore(found) as checkpoint:
        assert checkpoint.step == 5
    assert (found["w"] == STATE["w"]).all()
    assert all(path.stat().st_size > STATE["w"].nbytes for path in paths)


def test_a_region_that_is_not_striped_says_so(tmp_path: Path) -> None:
    pccheck.format_region(tmp_path / "r", slots=3, payload_bytes=MIB)
    with pccheck.Store(tmp_path / "r", **SMALL) as store:
        assert (store.got().members, store.got().stripe_unit_bytes) == (1, 0)


def test_a_lost_member_is_an_error_of_its_own(tmp_path: Path) -> None:
    paths = make(tmp_path)
    with pytest.raises(errors.MemberError, match="member0"):
        pccheck.Store(paths[2], **SMALL)
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(errors.MemberError, match=r"member 1 .* lost") as caught:
        pccheck.Store(paths[0], **SMALL)
    assert not isinstance(caught.value, (errors.NotFound, errors.NotARegion))
    assert "pccheck relocate" in caught.value.advice and caught.value.path == str(paths[1])


def test_what_cannot_be_striped_is_refused(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [{"stripe_unit": 0}, {"stripe_unit": MIB}, {"stripe_unit": -1}, {"members": 17}]
    for options in refused:
        with pytest.raises(errors.InvalidArgument):
            make(tmp_path, **options)
    one_path: Any = str(tmp_path / "b")
    with pytest.raises(errors.InvalidArgument, match="sequence of paths"):
        pccheck.format_region(tmp_path / "a", slots=3, payload_bytes=MIB, stripe=one_path)
    assert list(tmp_path.iterdir()) == []
    paths = make(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="chunk_bytes"):
        pccheck.Store(paths[0], staging_bytes=64 * MIB, chunk_bytes=4 * MIB)
