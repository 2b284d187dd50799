"""Prevents: misuse and failures of the environment that end in anything but a clear exception before training, or a
warning and a count during it, with the old checkpoint intact.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states_samples import SMALL, bits_of, can_mount, checkpointer, run_python, save_once, steps
from torch import nn

import pccheck.torch
from pccheck import errors

needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount file systems")


def test_a_closed_checkpointer_says_so(tmp_path: Path) -> None:
    made = checkpointer(tmp_path / "r", state={"a": 1})
    made.step(0)
    made.close()
    made.close()
    assert made.closed and made.path == str(tmp_path / "r")
    for call in (
        lambda: made.step(1), lambda: made.save(1), made.restore, made.wait, made.checkpoints, made.discard,
        lambda: made.store,
    ):  # fmt: skip
        with pytest.raises(errors.InvalidState, match="closed"):
            call()
    made.before_update()
    assert made.finish() is True and made.failures == 0
    with checkpointer(tmp_path / "r", state={}) as other:
        assert steps(other) == [0], "closing lost what was in flight"


def test_saving_over_checkpoints_needs_restoring_or_discarding(tmp_path: Path) -> None:
    save_once(tmp_path / "r", state={"a": 1}, step=5)
    with checkpointer(tmp_path / "r", state={"a": 2}) as made:
        for save in (made.step, made.save):
            with pytest.raises(errors.InvalidState, match="holds checkpoints.*restore.*discard"):
                save(0)
        assert steps(made) == [5]
        with pytest.raises(errors.NotFound):
            made.restore(step=4)
        with pytest.raises(errors.InvalidState, match="restore"):
            made.step(0)
        assert made.discard() == 1
        made.step(0)
        made.wait(60)
        assert steps(made) == [0]


def test_a_region_of_another_model_is_not_saved_over(tmp_path: Path) -> None:
    save_once(tmp_path / "r", model=nn.Linear(4, 4), step=5)
    other = nn.Linear(3, 3)
    before = bits_of(other)
    with checkpointer(tmp_path / "r", model=other) as made:
        with pytest.raises(errors.StateMismatch, match="another model"):
            made.restore()
        with pytest.raises(errors.InvalidState):
            made.step(0)
        assert bits_of(other) == before
    assert pccheck.torch.restore(tmp_path / "r", model=nn.Linear(4, 4)) == 5


def test_two_trainers_on_one_region(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from states_samples import checkpointer\n"
        "made = checkpointer(sys.argv[1], state={'a': 1}); made.step(0); made.wait(60)\n"
        "print('open', flush=True); input(); made.step(1); made.wait(60); assert made.failures == 0; made.close()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "r"), str(Path(__file__).parent)]
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        with pytest.raises(errors.InUse, match=f"process {first.pid}") as refused:
            checkpointer(tmp_path / "r", state={"a": 1}, lock_timeout=0.1)
        assert refused.value.advice or "end that process" in str(refused.value)
        # Not even to enlarge it.
        with pytest.raises(errors.InUse, match=f"process {first.pid}"):
            checkpointer(tmp_path / "r", state={"a": 1}, lock_timeout=0.1, keep=5)
        first.communicate("\n", timeout=60)
        assert first.returncode == 0
    with checkpointer(tmp_path / "r", state={"a": 1}) as second:
        assert second.restore() == 1


def test_two_checkpointers_of_one_process_on_one_region(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", state={"a": 1}) as made:
        with pytest.raises(errors.InUse):
            checkpointer(tmp_path / "r", state={"a": 1}, lock_timeout=0)
        made.step(0)
        made.wait(60)
        assert steps(made) == [0]


def test_paths_that_hold_something_else_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"my thesis" * 10_000)
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(errors.Unsupported, match="regular file"):
        checkpointer(tmp_path / "folder", state={})
    for name in ("file", "short"):
        content = (tmp_path / name).read_bytes()
        with pytest.raises(errors.NotARegion, match=name):
            checkpointer(tmp_path / name, state={})
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(errors.IoFailed, match="file/below") as refused:
        checkpointer(tmp_path / "file" / "below" / "r", state={})
    assert refused.value.errno
    (tmp_path / "empty").touch()
    save_once(tmp_path / "empty", state={"a": 1})
    save_once(tmp_path / "new" / "folders" / "r", state={"a": 1})


READ_ONLY = """
import os, subprocess, sys
folder = sys.argv[1]
sys.path.insert(0, sys.argv[2])
import pccheck.torch
from pccheck import errors
from states_samples import checkpointer
with checkpointer(folder + "/r", state={"a": 1}) as made:
    made.step(3)
    made.wait(60)
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
state = {"a": 0}
for path in ("/new", "/r", "/below/new"):
    try:
        checkpointer(folder + path, state=state)
        raise AssertionError("it cannot be written")
    except errors.PccheckError as why:
        assert isinstance(why, (errors.IoFailed, errors.ReadOnly)), repr(why)
        assert "ead-only" in str(why) and why.path and why.path.startswith(folder), (str(why), why.path)
# It can be restored from all the same.
assert pccheck.torch.restore(folder + "/r", state=state) == 3 and state == {"a": 1}
"""


@needs_mount
def test_a_read_only_folder(tmp_path: Path) -> None:
    run_python(READ_ONLY, tmp_path, Path(__file__).parent, prefix=("unshare", "-m"))


def test_memory_is_not_durable_against_power_loss(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no tmpfs here")
    path = shm / f"pccheck-test-{tmp_path.name}-{id(tmp_path)}"
    try:
        with pytest.raises(errors.DurabilityError, match="power"):
            checkpointer(path, state={"a": 1}, durability="power")
        save_once(path, state={"a": 1})
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "member",
    [object(), 5, "text", None, (1, 2), {1, 2}, np.zeros(3), [nn.Linear(2, 2), 5], {"a": nn.Linear(2, 2), "b": 1}],
)
def test_members_without_state_are_refused_by_name(tmp_path: Path, member: Any) -> None:
    with pytest.raises((errors.InvalidArgument, errors.UnsupportedValue), match="thing"):
        checkpointer(tmp_path / "r", thing=member)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("members", [{}, {"rng": torch.Generator()}, {"gradients": {}}])
def test_no_members_and_names_that_are_taken(tmp_path: Path, members: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        checkpointer(tmp_path / "r", **(members and members | {"state": {}}))
    assert list(tmp_path.iterdir()) == []


def test_steps_of_all_kinds(tmp_path: Path) -> None:
    state = {"a": 1}
    with checkpointer(tmp_path / "r", keep=4, state=state) as made:
        for step in (np.int64(1), np.uint8(2), torch.tensor(3), 2**64 - 1):
            made.step(step)  # type: ignore[arg-type]
            made.wait(60)
        assert steps(made) == [2**64 - 1, 3, 2, 1]
        assert made.restore(step=np.int64(2)) == 2  # type: ignore[arg-type]
        for wrong in (-1, 2**64):
            with pytest.raises(errors.InvalidArgument, match="step="):
                made.step(wrong)
        for text in (1.5, "1", None, torch.tensor(1.5)):
            with pytest.raises(TypeError):
                made.step(text)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            made.step(5, {"loss": "low"})  # type: ignore[dict-item]
        assert steps(made) == [2**64 - 1, 3, 2, 1] and made.failures == 0
        made.step(6, {"loss": np.float32(0.5), "other": torch.tensor(2.0)})  # type: ignore[dict-item]
        made.wait(60)
        assert steps(made)[0] == 6


def busy(path: Path, **options: Any) -> tuple[pccheck.torch.Checkpointer, dict[str, Any]]:
    """One slot for saves in flight, no patience, and a state that takes long enough to write."""
    state = {"x": torch.zeros(12_000_000), "i": 0}
    return checkpointer(path, max_in_flight=1, slot_timeout=0.0, rng=False, state=state, **options), state


def fail_often(made: pccheck.torch.Checkpointer, state: dict[str, Any]) -> list[int]:
    """Saves without a pause until some have failed; the steps of those that were begun."""
    begun = []
    for step in range(1, 200):
        state["i"] = step
        if made.step(step) is not None:
            begun.append(step)
        if made.failures >= 3:
            return begun
    raise AssertionError("no save found its slot taken: the test says nothing")


def test_a_failed_save_warns_once_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    made, state = busy(tmp_path / "r")
    with made:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            begun = fail_often(made, state)
        failed = [w for w in told if issubclass(w.category, pccheck.torch.CheckpointWarning)]
        assert failed and "failed, training goes on" in str(failed[0].message)
        assert failed[0].filename == __file__, "the warning does not point at the training script"
        assert made.failures == 3 and isinstance(made.last_error, errors.NoSlot)
        made.wait(60)
        assert steps(made)[0] == begun[-1]
        state["x"].fill_(7.0)
        made.step(500)
        made.wait(60)
        assert steps(made)[0] == 500 and made.failures == 3
        other = {"x": torch.zeros(12_000_000), "i": 0}
        assert pccheck.torch.restore(tmp_path / "r", state=other) == 500 and bool((other["x"] == 7.0).all())


def test_with_raise_a_failed_save_raises_and_the_next_call_goes_on(tmp_path: Path) -> None:
    made, state = busy(tmp_path / "r", on_error="raise")
    with made:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(errors.NoSlot):
                fail_often(made, state)
        assert made.failures == 1 and isinstance(made.last_error, errors.NoSlot)
        made.wait(60)
        made.step(500)
        made.wait(60)
        assert steps(made)[0] == 500 and made.failures == 1


def tear(made: pccheck.torch.Checkpointer, model: nn.Linear, first: int) -> int:
    """Changes parameters behind the back of saves until one is caught before it is copied; its step."""
    for step in range(first, first + 100):
        made.step(step)
        with torch.no_grad():
            model.weight.add_(1)
        while not made._outcomes._flights[-1].save.done():
            time.sleep(0.001)
        if made._outcomes._flights[-1].verdict is not None:
            return step
        made.wait(60)
    raise AssertionError("every save was copied before the change: the test says nothing")


def test_a_save_that_fails_in_the_background_is_told_of_at_the_next_call(tmp_path: Path) -> None:
    model = nn.Linear(1000, 3000)
    with checkpointer(tmp_path / "r", model=model) as made, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step = tear(made, model, 0)
        assert made.failures == 0
        made.wait(60)
        assert made.failures == 1 and step not in steps(made)
        (text,) = (str(w.message) for w in told if "failed" in str(w.message))
        assert f"step {step} failed" in text and "model.weight changed before it was copied" in text
    with checkpointer(tmp_path / "s", model=model, on_error="raise") as made:
        step = tear(made, model, 0)
        with pytest.raises(errors.InvalidState, match="model.weight changed before it was copied"):
            made.wait(60)
        assert made.failures == 1 and step not in steps(made)
        made.step(500)
        made.wait(60)
        assert steps(made)[0] == 500 and made.failures == 1


def test_a_mismatched_device_or_options_of_restore(tmp_path: Path) -> None:
    save_once(tmp_path / "r", model=nn.Linear(2, 2))
    with checkpointer(tmp_path / "r", model=nn.Linear(2, 2)) as made:
        with pytest.raises(errors.NotFound, match="generation 99"):
            made.restore(generation=99)
        with pytest.raises(errors.NotFound, match="step -1"):
            made.restore(step=-1)
        assert made.restore(only="model") == 1


def test_options_of_the_engine_are_passed_on(tmp_path: Path) -> None:
    with checkpointer(tmp_path / "r", state={}, max_in_flight=3, keep=2, writers=1) as made:
        got = made.store.got()
        assert (got.max_in_flight, got.keep, got.chunk_bytes) == (3, 2, SMALL["chunk_bytes"])
        assert got.staging_bytes <= SMALL["staging_bytes"] and got.medium == "mmap"


@pytest.mark.parametrize("flag_waits", [True, False])
def test_where_a_stream_waits_the_engine_ends_that_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag_waits: bool
) -> None:
    """No thread waits then that could give the save up."""
    seen: list[Any] = []
    save = pccheck.Store.save

    def noted(self: pccheck.Store, *arguments: Any, **options: Any) -> pccheck.Save:
        seen.append(options["gpu_timeout"])
        return save(self, *arguments, **options)

    monkeypatch.setattr(pccheck.Store, "save", noted)
    with checkpointer(tmp_path / "r", state={"a": 1}, flag_waits=flag_waits, update_timeout=7.0) as made:
        made.step(0)
    assert seen == [7.0 if flag_waits else None]
