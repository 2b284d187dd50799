"""Prevents: errors of another class than documented, without their particulars, or that break when they travel."""

from __future__ import annotations

import copy
import errno
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KIB, MIB, SMALL, MakeRegion, RunPython

import pccheck
from pccheck import _abi, errors
from pccheck._abi import ffi, lib

CLASSES = [cls for name, cls in vars(errors).items() if name in errors.__all__]


def test_every_status_of_the_library_is_a_class() -> None:
    known = {number: ffi.string(lib.pcc_status_name(-number)).decode() for number in range(1, 100)}
    names = {-number: name for number, name in known.items() if name != "PCC_UNKNOWN"}
    assert len(names) >= 24
    for code, name in names.items():
        cls = errors.class_of(code)
        assert (cls.code, cls.status) == (code, name)
        assert cls.__name__ in errors.__all__
    assert errors.class_of(-9999) is errors.PccheckError
    future = _abi.error_of(-9999)
    assert (type(future), future.code, future.status) == (errors.PccheckError, -9999, "PCC_UNKNOWN")


def test_what_python_code_expects_of_them() -> None:
    assert issubclass(errors.InvalidArgument, ValueError)
    assert issubclass(errors.NotFound, LookupError) and not issubclass(errors.NotFound, KeyError)
    assert issubclass(errors.TimedOut, TimeoutError)
    assert issubclass(errors.OutOfMemory, MemoryError)
    assert issubclass(errors.UnsupportedValue, TypeError)
    assert not issubclass(errors.IoFailed, OSError)
    assert issubclass(errors.UnsupportedVersion, errors.Unsupported)
    assert all(issubclass(cls, errors.PccheckError) for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_pickle_and_copy(cls: type[errors.PccheckError]) -> None:
    if cls is errors.UnsupportedValue:
        error: errors.PccheckError = errors.UnsupportedValue("a socket", at="state['s']")
    elif cls is errors.StateMismatch:
        error = errors.StateMismatch("differs", missing=["a"], unexpected=["b"], mismatched=["c: d"], path="/x")
    else:
        error = cls("what failed (do this)", operation="save", path="/x", offset=4096, advice="do this")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is cls and str(other) == str(error) and other.args == error.args
        for name in ("message", "operation", "path", "offset", "advice", "status", "code"):
            assert getattr(other, name) == getattr(error, name)
        assert {k: getattr(other, k) for k in vars(error)} == vars(error)


def test_a_refusal_has_all_particulars(region: MakeRegion) -> None:
    path = region()
    with pytest.raises(errors.AlreadyExists) as why:
        pccheck.format_region(path, slots=3, payload_bytes=MIB)
    error = why.value
    assert (error.status, error.code, error.operation, error.path) == ("PCC_ALREADY_EXISTS", -4, "format", str(path))
    assert "force" in error.advice and error.advice in str(error) and error.offset is None
    pccheck.format_region(path, slots=4, payload_bytes=MIB, force=True)


def test_anothers_failure_on_this_thread_does_not_lend_its_text(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound):
        pccheck.Store(tmp_path / "nothing")
    stale = _abi.error_of(lib.PCC_NO_SLOT)
    assert isinstance(stale, errors.NoSlot) and "nothing" not in str(stale) and stale.path is None


def test_paths_that_hold_no_region(tmp_path: Path, region: MakeRegion) -> None:
    text, empty, short = tmp_path / "text", tmp_path / "empty", tmp_path / "short"
    text.write_text("not a region\n" * 10_000)
    empty.write_bytes(b"")
    short.write_bytes(b"PCC")
    for path in (text, empty, short):
        with pytest.raises(errors.NotARegion) as why:
            pccheck.Store(path, **SMALL)
        assert why.value.path == str(path)
    with pytest.raises(errors.AlreadyExists):
        pccheck.format_region(text, slots=3, payload_bytes=MIB)
    assert text.read_text().startswith("not a region")
    for missing in (tmp_path / "none", tmp_path / "none" / "region"):
        with pytest.raises(errors.NotFound) as missed:
            pccheck.Store(missing)
        assert missed.value.errno == errno.ENOENT and missed.value.advice
    for impossible in (tmp_path, text / "region", Path("/proc/pccheck-region"), Path("/proc/version")):
        with pytest.raises(errors.PccheckError) as refused:
            pccheck.Store(impossible, **SMALL)
        assert refused.value.status
        with pytest.raises(errors.PccheckError) as refused:
            pccheck.format_region(impossible, slots=3, payload_bytes=MIB)
        assert refused.value.status and refused.value.path


def test_damaged_superblocks(region: MakeRegion) -> None:
    path = region()
    medium = bytearray(path.read_bytes())
    newer = bytearray(medium)
    for copy_at in (0, 4096):
        medium[copy_at + 100] ^= 255
    path.write_bytes(medium)
    with pytest.raises(errors.Corrupt):
        pccheck.Store(path, **SMALL)
    for copy_at in (0, 4096):
        newer[copy_at : copy_at + 8] = b"SOMETHNG"
    path.write_bytes(newer)
    with pytest.raises(errors.NotARegion):
        pccheck.Store(path, **SMALL)


@pytest.mark.parametrize("path", ["", "a\0b", b"a\0b"])
def test_impossible_paths(path: Any) -> None:
    for call in (
        lambda: pccheck.Store(path),
        lambda: pccheck.format_region(path, slots=3, payload_bytes=1),
        lambda: pccheck.grow_region(path, slots=3, payload_bytes=1),
    ):
        with pytest.raises(errors.InvalidArgument, match="path"):
            call()


def test_any_kind_of_path(region: MakeRegion, tmp_path: Path) -> None:
    path = region(name="ünïcode 区")
    for kind in (path, str(path), str(path).encode()):
        with pccheck.Store(kind, **SMALL) as store:  # type: ignore[arg-type]
            assert store.path == str(path)
    odd = bytes(tmp_path) + b"/\xff\xfe"
    pccheck.format_region(odd, slots=3, payload_bytes=1)  # type: ignore[arg-type]
    with pccheck.Store(odd, **SMALL) as store:  # type: ignore[arg-type]
        store.save(1, {}).durable(30)
        with pytest.raises(errors.TooLarge) as why:
            store.save(2, {"x": np.zeros(64 * MIB, "uint8")})
        assert why.value.path


def test_numbers_out_of_range(store: pccheck.Store, region: MakeRegion, tmp_path: Path) -> None:
    state = {"x": np.zeros(4)}
    generation = store.save(1, state).durable(30).generation
    wrong = (-1, 2**64, 10**30, 1.0, np.float64(1), "1", True, False, np.bool_(True), None, [1], np.arange(2))
    with store.open() as checkpoint:
        for value in wrong:
            calls: list[Any] = [
                lambda v=value: store.save(v, state),
                lambda v=value: store.raw_save(v, 1),
                lambda v=value: store.raw_save(1, v),
                lambda v=value: store.pin(v),
                lambda v=value: store.unpin(v),
                lambda v=value: store.mark_global(v),
                lambda v=value: store.abandon(v),
                lambda v=value: store.discard_newer(v),
                lambda v=value: store.verify(v),
                lambda v=value: checkpoint.read_bytes("x", v, bytearray(1)),
                lambda v=value: checkpoint.read_payload(v, bytearray(1)),
                lambda v=value: pccheck.format_region(tmp_path / "new", slots=v, payload_bytes=1),
                lambda v=value: pccheck.format_region(tmp_path / "new", slots=3, payload_bytes=v),
                lambda v=value: pccheck.grow_region(tmp_path / "new", slots=v, payload_bytes=1),
                lambda v=value: pccheck.Store(tmp_path / "new", run_id=v),
            ]
            if value is not None:
                calls += [lambda v=value: store.open(generation=v), lambda v=value: store.open(step=v)]
            for call in calls:
                with pytest.raises(errors.InvalidArgument, match="expected a whole number"):
                    call()
    assert not (tmp_path / "new").exists()
    path = region(name="other")
    for option in ("max_in_flight", "keep", "writers", "readers", "queue_depth", "staging_bytes", "chunk_bytes"):
        too_much = 2**32 - 1 if option.endswith(("_flight", "keep")) else 2**64 - 1
        for number in (-1, 2**70, 1.5, "many", too_much):
            options: dict[str, Any] = {option: number}
            with pytest.raises((errors.InvalidArgument, errors.OutOfMemory), match=f"{option}|memory"):
                pccheck.Store(path, **options)
    for option, choice in (("medium", "tape"), ("backend", "magic"), ("durability", "some"), ("medium", None)):
        options = {option: choice}
        with pytest.raises(errors.InvalidArgument, match=f"{option}="):
            pccheck.Store(tmp_path, **options)
    assert [info.generation for info in store.checkpoints()] == [generation]


def test_steps_may_be_of_numpy_and_up_to_64_bits(store: pccheck.Store) -> None:
    for step in (0, 2**64 - 1, np.int64(7), np.uint64(2**63), np.array(9), np.uint8(3)):
        assert store.save(step, {}).durable(30).step == int(step)  # type: ignore[arg-type]
    torch = pytest.importorskip("torch")
    assert store.save(torch.tensor(11), {}).durable(30).step == 11


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("inf"), 1e300, "1", [1], 1j])
def test_impossible_timeouts(store: pccheck.Store, timeout: Any) -> None:
    save = store.save(1, {}, confirm=True)
    calls: list[Any] = [
        lambda: store.save(1, {}, timeout=timeout),
        lambda: store.raw_save(1, 1, timeout=timeout),
        lambda: store.drain(timeout),
        lambda: store.abandon(1, timeout),
        lambda: store.repair(timeout),
        lambda: save.copied(timeout),
        lambda: save.durable(timeout),
        lambda: pccheck.Store(store.path, lock_timeout=timeout),
    ]
    for call in calls:
        with pytest.raises(errors.InvalidArgument, match="timeout="):
            call()


def test_impossible_names_and_metadata(store: pccheck.Store) -> None:
    plain = {"x": np.zeros(1)}
    for name in (1, None, b"x", ("x",)):
        with pytest.raises(errors.InvalidArgument, match="expected str"):
            store.save(1, {name: np.zeros(1)})  # type: ignore[dict-item]
        with pytest.raises(errors.InvalidArgument, match="expected str"):
            store.save(1, plain, {"k": name})  # type: ignore[dict-item]
        with pytest.raises(errors.InvalidArgument, match="expected str"):
            store.save(1, plain, {name: "v"})  # type: ignore[dict-item]
    for text in ("a\0b", "\ud800"):
        with pytest.raises(errors.InvalidArgument, match="NUL|Unicode"):
            store.save(1, {text: np.zeros(1)})
        with pytest.raises(errors.InvalidArgument, match="NUL|Unicode"):
            store.save(1, plain, {"k": text})
    with pytest.raises(errors.InvalidArgument, match="empty name"):
        store.save(1, {"": np.zeros(1)})
    with pytest.raises(errors.InvalidArgument, match="pccheck"):
        store.save(1, plain, {"pccheck.own": "v"})
    with pytest.raises(errors.PccheckError):
        store.save(1, {"n" * 5000: np.zeros(1)})
    for metadata in ([("k", "v")], "text", 5):
        with pytest.raises(errors.InvalidArgument, match="metadata"):
            store.save(1, plain, metadata)  # type: ignore[arg-type]
    assert store.stats().saves_begun == 0


def test_too_large(store: pccheck.Store) -> None:
    with pytest.raises(errors.TooLarge) as why:
        store.save(1, {"x": np.zeros(8 * MIB, "uint8")})
    assert "grow" in why.value.advice and why.value.path == store.path
    with pytest.raises(errors.TooLarge):
        store.raw_save(1, 2**62)
    assert store.stats().in_flight == 0


def test_no_slot(store: pccheck.Store) -> None:
    held = [store.save(step, {}, confirm=True) for step in (1, 2)]
    for timeout in (0, 0.25):
        with pytest.raises(errors.NoSlot) as why:
            store.save(3, {}, timeout=timeout)
        assert why.value.operation == "begin save" and why.value.advice
        with pytest.raises(errors.NoSlot):
            store.raw_save(3, 10, timeout=timeout)
    for save in held:
        save.confirm()
    # What was refused took no generation, nor anything else.
    assert store.save(4, {}).durable(30).generation == held[1].generation + 1


def test_restoring_what_does_not_fit_changes_nothing(store: pccheck.Store) -> None:
    store.save(1, {"a": np.ones(4, "float32"), "b": np.ones(2, "int8")}).durable(30)
    b = np.zeros(2, "int8")
    for other in (np.zeros(4, "int32"), np.zeros(5, "float32"), np.zeros((2, 2), "float32")):
        with pytest.raises(errors.InvalidArgument):
            store.restore({"b": b, "a": other})
        with store.open() as checkpoint, pytest.raises(errors.InvalidArgument, match="'a'"):
            checkpoint.read_into({"b": b, "a": other})
    with pytest.raises(errors.InvalidArgument):
        store.restore({"b": b, "c": np.zeros(1)})
    assert b.tolist() == [0, 0]


def test_newer_incompatible_regions_are_refused_by_name(region: MakeRegion) -> None:
    """Both superblocks claim a newer version; their checksums are then wrong, unless the version is judged first."""
    path = region()
    medium = bytearray(path.read_bytes())
    (version,) = struct.unpack_from("<I", medium, 8)
    for copy_at in (0, 4096):
        struct.pack_into("<I", medium, copy_at + 8, version + 1000)
    path.write_bytes(medium)
    with pytest.raises((errors.UnsupportedVersion, errors.Corrupt)) as why:
        pccheck.Store(path, **SMALL)
    assert why.value.path == str(path)


FULL_DISK = """
import errno, subprocess, sys
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], check=True)
import numpy, pccheck
from pccheck import errors
path = folder + "/region"
try:
    pccheck.format_region(path, slots=4, payload_bytes=16 << 20)
except errors.NoSpace as why:
    assert why.status == "PCC_NO_SPACE" and why.path == path, why
else:
    raise SystemExit("formatted")
import os
assert os.listdir(folder) == [], os.listdir(folder)
state = {"x": numpy.arange(1 << 18)}
pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
small = dict(staging_bytes=16 << 20, chunk_bytes=1 << 20, durability="process")
with pccheck.Store(path, **small) as store:
    store.save(1, state)
try:
    pccheck.grow_region(path, slots=8, payload_bytes=4 << 20)
except errors.NoSpace:
    assert os.listdir(folder) == ["region"], os.listdir(folder)
else:
    raise SystemExit("grown")
with open(folder + "/filler", "wb") as filler:
    try:
        while True:
            filler.write(bytes(1 << 16)); filler.flush()
    except OSError as why:
        assert why.errno == errno.ENOSPC
# A region has all its space: saves go on though the disk is full.
with pccheck.Store(path, **small) as store:
    store.save(2, state)
    store.drain()
    with store.open() as checkpoint:
        assert checkpoint.step == 2 and (checkpoint["x"] == state["x"]).all()
try:
    pccheck.Store(path)
except errors.DurabilityError as why:
    assert why.status == "PCC_DURABILITY"
else:
    raise SystemExit("tmpfs outlives no power loss")
print("done")
"""

READ_ONLY_MOUNT = """
import subprocess, sys
folder = sys.argv[1]
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
import pccheck
from pccheck import errors
small = dict(staging_bytes=16 << 20, chunk_bytes=1 << 20)
for call in (
    lambda: pccheck.format_region(folder + "/new", slots=3, payload_bytes=1),
    lambda: pccheck.Store(folder + "/region", **small),
    lambda: pccheck.grow_region(folder + "/region", slots=9, payload_bytes=1 << 20),
):
    try:
        call()
    except errors.PccheckError as why:
        assert why.errno == 30 and why.path.startswith(folder), (why, why.errno, why.path)
    else:
        raise SystemExit("written to a read-only file system")
with pccheck.Store(folder + "/region", read_only=True, **small) as store, store.open() as checkpoint:
    assert checkpoint.step == 1
print("done")
"""


def mount_namespace(run_python: RunPython) -> list[str]:
    prefix = ["unshare", "--mount", "--propagation", "private"]
    try:
        run_python("", prefix=prefix)
    except (AssertionError, FileNotFoundError):
        pytest.skip("needs the right to make a mount namespace")
    return prefix


def test_a_full_disk(run_python: RunPython, tmp_path: Path) -> None:
    assert run_python(FULL_DISK, tmp_path, prefix=mount_namespace(run_python)) == "done\n"


def test_a_read_only_file_system(run_python: RunPython, tmp_path: Path, region: MakeRegion) -> None:
    with pccheck.Store(region(name="region"), **SMALL) as store:
        store.save(1, {"x": np.zeros(4 * KIB)})
    assert run_python(READ_ONLY_MOUNT, tmp_path, prefix=mount_namespace(run_python)) == "done\n"
