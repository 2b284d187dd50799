"""Prevents: a save that loses its arrays' memory, its error or its outcome; a wait that cannot be ended."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import KIB, MIB, SMALL, MakeRegion, OpenStore, RunPython

import pccheck
from pccheck import errors

StartPython = Callable[..., "subprocess.Popen[str]"]


def test_the_life_of_a_save(store: pccheck.Store) -> None:
    save = store.save(5, {"x": np.arange(512 * KIB, dtype="uint8")})
    assert save.step == 5 and save.generation >= 1
    save.copied(30)
    durable = save.durable(30)
    assert (durable.generation, durable.step, durable.superseded_by) == (save.generation, 5, None)
    assert 0 < durable.copied_seconds <= durable.durable_seconds and 0 <= durable.slot < 3
    progress = save.progress()
    assert progress.copied and progress.ended and save.done() and save.error() is None
    assert progress.copied_bytes == progress.written_bytes == progress.total_bytes > 512 * KIB
    assert save.durable(0) == durable and save.durable() == durable
    assert "durable" in repr(save)
    save.close()
    save.close()
    assert save.closed and "closed" in repr(save)
    for call in (
        save.copied,
        save.durable,
        save.progress,
        save.done,
        save.error,
        save.confirm,
        save.cancel,
        save.fileno,
    ):
        with pytest.raises(errors.InvalidState, match="the save is closed"):
            call()


def test_options_for_gpus_change_nothing_for_host_memory(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, snapshot="auto", direct_storage="required", flag_waits=True, gpu_timeout=5)
    save.stream_wait_copied(timeout=30)
    save.durable(30)
    with store.open() as checkpoint:
        assert (checkpoint["x"] == 1).all()


def test_ways_that_there_are_not_are_refused(store: pccheck.Store) -> None:
    for wrong in ({"snapshot": "what"}, {"direct_storage": "what"}):
        with pytest.raises(errors.InvalidArgument, match="'what'"):
            store.save(1, {"x": np.ones(10)}, **wrong)
    assert store.stats().saves_begun == 0 and store.stats().direct_bytes == 0


def test_a_save_waits_for_its_confirmation(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    save.copied(30)
    for timeout in (0, 0.15):
        with pytest.raises(errors.TimedOut):
            save.durable(timeout)
    assert store.checkpoints() == [] and not save.done() and "copied" in repr(save)
    save.confirm()
    save.confirm()
    assert save.durable(30).step == 1
    assert [info.step for info in store.checkpoints()] == [1]


def test_a_save_that_nobody_confirms_is_cancelled_when_it_goes(store: pccheck.Store) -> None:
    store.save(1, {"x": np.ones(10)}, confirm=True).close()
    save = store.save(2, {"x": np.ones(10)}, confirm=True)
    del save
    gc.collect()
    store.drain(30)
    assert store.checkpoints() == [] and store.stats().saves_cancelled == 2


def test_a_cancelled_save_says_so_every_time(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    save.cancel()
    for _ in range(2):
        with pytest.raises(errors.Cancelled) as why:
            save.durable(30)
        assert why.value.path == store.path and why.value.status == "PCC_CANCELLED"
    assert save.done() and "cancel" in (save.error() or "") and "failed" in repr(save)
    with pytest.raises(errors.Cancelled):
        save.confirm()
    save.cancel()


def test_a_newer_save_supersedes_one_that_is_confirmed_late(store: pccheck.Store) -> None:
    late = store.save(1, {}, confirm=True)
    newer = store.save(2, {}).durable(30)
    late.confirm()
    assert late.durable(30).superseded_by == newer.generation
    assert store.stats().saves_superseded == 1


def test_a_save_that_is_dropped_goes_on(region: MakeRegion, open_store: OpenStore) -> None:
    store = open_store(region(payload_bytes=64 * MIB))
    store.save(1, {"x": np.arange(8 * MIB, dtype="float32")})
    gc.collect()
    store.drain(60)
    with store.open() as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"], np.arange(8 * MIB, dtype="float32"))


def test_arrays_live_until_they_are_copied(region: MakeRegion, open_store: OpenStore) -> None:
    """The caller drops its arrays at once and fills the memory that would be free with garbage."""
    store = open_store(region(payload_bytes=96 * MIB), writers=1)
    for step in range(4):
        arrays = {f"{i}": np.full(16 * MIB, 16 * step + i, "uint8") for i in range(5)}
        # Views: what must live is the array that owns the memory.
        save = store.save(step, {name: array[: 15 * MIB].reshape(3, -1) for name, array in arrays.items()})
        del arrays
        gc.collect()
        garbage = [np.full(16 * MIB, 255, "uint8") for _ in range(5)]
        save.durable(60)
        del garbage
        with store.open() as checkpoint:
            for i in range(5):
                assert (checkpoint[str(i)] == 16 * step + i).all()


@pytest.mark.parametrize("how", ["copied", "durable", "close", "drop", "cancel", "store"])
def test_arrays_are_let_go(store: pccheck.Store, how: str) -> None:
    array = np.ones(1000)
    seen = weakref.ref(array)
    save = store.save(1, {"x": array}, confirm=how != "durable")
    del array
    gc.collect()
    assert seen() is not None
    if how == "copied":
        save.copied(30)
    elif how == "durable":
        save.durable(30)
    elif how == "close":
        save.close()
    elif how == "drop":
        del save
    elif how == "cancel":
        save.cancel()
        with pytest.raises(errors.Cancelled):
            save.durable(30)
    else:
        store.close()
        with pytest.raises(errors.Cancelled):
            save.durable(30)
    gc.collect()
    assert seen() is None


def test_arrays_of_a_refused_save_are_let_go(store: pccheck.Store) -> None:
    array = np.ones(1000)
    seen = weakref.ref(array)
    with pytest.raises(errors.InvalidArgument):
        store.save(1, {"x": array, "": array})
    del array
    gc.collect()
    assert seen() is None


def test_select_tells_of_the_end(store: pccheck.Store) -> None:
    save = store.save(1, {}, confirm=True)
    assert select.select([save], [], [], 0)[0] == []
    save.confirm()
    assert select.select([save], [], [], 30)[0] == [save]
    assert save.durable(0).step == 1 and save.fileno() == save.fileno()
    ended = store.save(2, {})
    ended.durable(30)
    assert select.select([ended], [], [], 0)[0] == [ended]


def test_raw_saves_from_several_threads(region: MakeRegion, open_store: OpenStore) -> None:
    store = open_store(region(payload_bytes=16 * MIB))
    data = np.random.default_rng(3).bytes(12 * MIB + 12345)
    piece = 300_001
    with store.raw_save(9, len(data), {"k": "v"}) as raw:
        offsets = list(range(0, len(data), piece))

        def write(mine: list[int]) -> None:
            for offset in mine:
                raw.write_at(offset, data[offset : offset + piece])

        threads = [threading.Thread(target=write, args=(offsets[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        save = raw.commit()
    assert save.step == 9 and save.durable(60).generation == save.generation
    with store.open() as checkpoint:
        assert checkpoint.info.raw and checkpoint["raw"].tobytes() == data and checkpoint.metadata == {"k": "v"}


def test_raw_saves_refuse(store: pccheck.Store) -> None:
    raw = store.raw_save(1, 100)
    raw.write_at(0, b"a" * 50)
    with pytest.raises(errors.InvalidState):
        raw.commit()
    with pytest.raises(errors.InvalidArgument):
        raw.write_at(90, b"b" * 50)
    with pytest.raises(errors.InvalidArgument):
        raw.write_at(0, b"b" * 50)
    raw.write_at(50, np.full(50, 98, "uint8"))
    save = raw.commit()
    for call in (raw.commit, lambda: raw.write_at(0, b"c")):
        with pytest.raises(errors.InvalidState):
            call()
    raw.close()
    raw.close()
    with pytest.raises(errors.InvalidState, match="the raw is closed|raw save is closed"):
        raw.write_at(0, b"c")
    assert save.durable(30).step == 1
    with store.open() as checkpoint:
        assert checkpoint["raw"].tobytes() == b"a" * 50 + b"b" * 50


def test_a_raw_save_without_commit_is_cancelled(store: pccheck.Store) -> None:
    with store.raw_save(1, 10) as raw:
        raw.write_at(0, b"0123456789")
    with pytest.raises(ZeroDivisionError), store.raw_save(2, 10):
        raise ZeroDivisionError
    store.raw_save(3, 10)
    gc.collect()
    store.drain(30)
    assert store.checkpoints() == [] and store.stats().saves_cancelled == 3
    with store.raw_save(4, 0) as raw:
        raw.commit().durable(30)
    with store.open() as checkpoint:
        assert checkpoint["raw"].shape == (0,)


INTERRUPTED = """
import signal, sys, threading, time
import numpy, pccheck
from pccheck import errors
path, what = sys.argv[1:]
store = pccheck.Store(path, staging_bytes=16 << 20, chunk_bytes=1 << 20)
held = [store.save(step, {"x": numpy.ones(10)}, confirm=True) for step in (1, 2)]
waits = {
    "durable": lambda: held[0].durable(),
    "drain": lambda: store.drain(3600),
    "save": lambda: store.save(3, {}, timeout=None),
    "raw_save": lambda: store.raw_save(3, 10, timeout=None),
    "open": lambda: pccheck.Store(path, lock_timeout=None),
    "grow": lambda: pccheck.grow_region(path, slots=9, payload_bytes=9 << 20, lock_timeout=None),
}
try:
    print("waiting", flush=True)
    waits[what]()
except KeyboardInterrupt:
    # Nothing is broken by it: the same wait works afterwards, and so does everything else.
    print("interrupted", flush=True)
for save in held:
    save.confirm()
    save.durable(30)
store.save(4, {}).durable(30)
store.close()
print("closed", [info.step for info in pccheck.Store(path).checkpoints()][0], flush=True)
"""


@pytest.mark.parametrize("what", ["durable", "drain", "save", "raw_save", "open", "grow"])
def test_ctrl_c_ends_every_wait(region: MakeRegion, start_python: StartPython, what: str) -> None:
    process = start_python(INTERRUPTED, region(), what)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    # It may not have begun to wait: then it is interrupted all the same.
    os.kill(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    assert process.stdout.readline() == "closed 4\n"
    assert process.wait(30) == 0


HANDLER = """
import os, signal, sys
import numpy, pccheck
from pccheck import errors
store = pccheck.Store(sys.argv[1], staging_bytes=16 << 20, chunk_bytes=1 << 20)
save = store.save(1, {"x": numpy.ones(10)}, confirm=True)
seen = []

def handler(number, frame):
    # What a preemption notice is used for: finish what is in flight.
    save.confirm()
    store.drain(30)
    seen.append(save.durable(30).step)
    try:
        save.close()
    except errors.InvalidState as why:
        seen.append("signal handler" in str(why))

signal.signal(signal.SIGTERM, handler)
print("waiting", flush=True)
print(save.durable().step, seen, flush=True)
save.close()
store.close()
"""


def test_a_signal_handler_may_drain_but_not_free_what_is_in_use(region: MakeRegion, start_python: StartPython) -> None:
    process = start_python(HANDLER, region())
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    # Only a handler that interrupts the wait finds the save in use.
    while "futex" not in Path(f"/proc/{process.pid}/wchan").read_text():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "1 [1, True]\n"
    assert process.wait(30) == 0


AT_EXIT = """
import gc, sys
import numpy, pccheck
path = sys.argv[1]
store = pccheck.Store(path, staging_bytes=16 << 20, chunk_bytes=1 << 20)
array = numpy.ones(1 << 18)
done = store.save(1, {"x": array})
done.durable(30)
checkpoint = store.open()
pending = store.save(2, {"x": array}, confirm=True)
raw = store.raw_save(3, 10)
class Cycle: pass
cycle = Cycle()
cycle.me, cycle.held = cycle, (store, pending, raw, checkpoint)
if len(sys.argv) > 2:
    gc.disable()
    import threading
    def wait():
        try:
            pending.durable()
        except BaseException:
            pass
    threading.Thread(target=wait, daemon=True).start()
    del cycle
print("left open")
"""


@pytest.mark.parametrize("more", [[], ["a daemon thread waits"]])
def test_leaving_everything_open_at_exit(run_python: RunPython, region: MakeRegion, more: list[str]) -> None:
    path = region(slots=4)
    assert run_python(AT_EXIT, path, *more) == "left open\n"
    with pccheck.Store(path, **SMALL) as store:
        assert [info.step for info in store.checkpoints()] == [1]


def test_an_interrupt_at_any_point_of_a_save_leaves_it_to_somebody(store: pccheck.Store) -> None:
    """Raises KeyboardInterrupt at every traced line of Store.save in turn: the arrays must come free."""
    at, last = 0, ""
    while True:
        array = np.ones(1000)
        seen = weakref.ref(array)
        try:
            with interrupted(at) as where:
                store.save(1, {"x": array})
            break
        except KeyboardInterrupt:
            last = where[0]
        del array
        gc.collect()
        assert seen() is None, f"the arrays are held after an interrupt at event {at}, {last}"
        store.drain(30)
        at += 1
    assert at > 40
    store.close()
    assert store.closed


@contextmanager
def interrupted(at: int) -> Iterator[list[str]]:
    """Raises KeyboardInterrupt at the ``at``-th line that this package runs; gives where."""
    left, where = at, [""]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(str(Path(pccheck.__file__).parent)):
            return None
        if frame.f_code.co_name in ("__del__", "_release", "_free"):
            # Python ignores what is raised in a finalizer.
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                where[0] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(None)
