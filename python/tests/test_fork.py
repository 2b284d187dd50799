"""Prevents: forked workers (of data loaders) that disturb the trainer's saves, or keep its region locked."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import MIB, SMALL, MakeRegion, OpenStore

import pccheck
from pccheck import errors

# That other threads run at the fork is the point of these tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]

StartPython = Callable[..., "subprocess.Popen[str]"]


def in_child(work: Callable[[], object]) -> None:
    """Forks; the child must run ``work`` without an error and then leave as Python programs do, but for pytest."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            gc.collect()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_calls_in_the_child_say_so(store: pccheck.Store) -> None:
    store.save(1, {"x": np.ones(4)}).durable(30)
    save, raw, checkpoint = store.save(2, {"x": np.ones(4)}, confirm=True), store.raw_save(3, 10), store.open()
    calls: list[Callable[[], Any]] = [
        lambda: store.save(4, {}),
        lambda: store.raw_save(4, 1),
        lambda: store.raw_save(4, 1, timeout=None),
        store.checkpoints,
        store.open,
        lambda: store.restore({"x": np.ones(4)}),
        lambda: store.pin(1),
        lambda: store.mark_global(1),
        lambda: store.abandon(1),
        lambda: store.discard_newer(0),
        store.verify,
        store.repair,
        store.drain,
        store.stats,
        store.got,
        store.recovery,
        save.copied,
        save.durable,
        save.progress,
        save.done,
        save.error,
        save.confirm,
        save.cancel,
        save.fileno,
        lambda: raw.write_at(0, b"0123456789"),
        raw.commit,
        lambda: checkpoint.read("x"),
        checkpoint.verify,
    ]

    def child() -> None:
        for call in calls:
            with pytest.raises(errors.Forked) as why:
                call()
            assert why.value.status == "PCC_FORKED" and why.value.code == -21
        assert "Forked" in repr(save) and "region" in repr(store) and "step=1" in repr(checkpoint)
        for handle in (save, raw, checkpoint, store):
            handle.close()
            handle.close()

    in_child(child)
    raw.write_at(0, b"0123456789")
    save.confirm()
    assert raw.commit().durable(30).step == 3 and save.durable(30).step == 2
    assert checkpoint.read("x").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("leave", ["drop", "close", "block", "exception"])
def test_the_childs_end_does_not_disturb_saves(region: MakeRegion, open_store: OpenStore, leave: str) -> None:
    store = open_store(region(payload_bytes=32 * MIB))
    array = np.arange(4 * MIB, dtype="float32")
    save = store.save(1, {"x": array})
    block = store

    def child() -> None:
        nonlocal save, store
        if leave == "drop":
            del save, store
        elif leave == "close":
            save.close()
            store.close()
        elif leave == "block":
            with block:
                pass
        else:
            with pytest.raises(KeyError), block:
                raise KeyError

    in_child(child)
    assert save.durable(60).step == 1
    assert store.save(2, {"x": array}).durable(60).step == 2
    with store.open() as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"], array)


def test_a_fork_while_other_threads_call(store: pccheck.Store, region: MakeRegion) -> None:
    """The child must not wait for a lock that a thread held which it does not have."""
    stop = threading.Event()

    def work() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            store.stats()
            store.save(step, {"x": np.ones(100)}, timeout=60).copied(60)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        other = region(name="other")
        for _ in range(5):

            def child() -> None:
                with pytest.raises(errors.Forked):
                    store.stats()
                store.close()
                with pccheck.Store(other, **SMALL) as own:
                    own.save(7, {"x": np.ones(10)}).durable(30)

            in_child(child)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    store.drain(60)
    with pccheck.Store(other, **SMALL) as own:
        assert own.checkpoints()[0].step == 7


def test_the_child_may_read_the_region(store: pccheck.Store) -> None:
    store.save(1, {"x": np.arange(5)}).durable(30)

    def child() -> None:
        with pccheck.Store(store.path, read_only=True, **SMALL) as reader, reader.open() as checkpoint:
            assert checkpoint["x"].tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(errors.InUse):
            pccheck.Store(store.path, lock_timeout=0, **SMALL)

    in_child(child)


def test_multiprocessing_workers_inherit_a_store(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(1000)}, confirm=True)
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert pool.map(abs, range(-3, 0)) == [3, 2, 1]
    worker = context.Process(target=gc.collect)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    save.confirm()
    assert save.durable(30).step == 1


PARENT = """
import os, sys, time
import numpy, pccheck
store = pccheck.Store(sys.argv[1], staging_bytes=16 << 20, chunk_bytes=1 << 20)
store.save(1, {"x": numpy.ones(1000)}).durable(30)
if os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(3600)
os.write(1, b"forked\\n")
sys.stdin.readline()
os._exit(0)
"""


def test_the_region_is_free_when_the_parent_is_gone_though_its_child_lives(
    region: MakeRegion, start_python: StartPython
) -> None:
    path = region()
    parent = start_python(PARENT, path)
    assert parent.stdout is not None and parent.stdin is not None
    child = int("".join(line for line in (parent.stdout.readline(), parent.stdout.readline()) if line != "forked\n"))
    try:
        with pytest.raises(errors.InUse, match=str(parent.pid)) as why:
            pccheck.Store(path, lock_timeout=0, **SMALL)
        assert why.value.status == "PCC_IN_USE" and why.value.advice
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.wait(30) == 0
        os.kill(child, 0)
        with pccheck.Store(path, lock_timeout=30.0, **SMALL) as store:
            assert [info.step for info in store.checkpoints()] == [1]
        os.kill(child, 0)
    finally:
        os.kill(child, 9)


WRITER = """
import sys
import numpy, pccheck
store = pccheck.Store(sys.argv[1], staging_bytes=16 << 20, chunk_bytes=1 << 20, lock_timeout=None)
print("open", flush=True)
for line in sys.stdin:
    if line == "die\\n":
        import os
        os.kill(os.getpid(), 9)
    print(store.save(int(line), {"x": numpy.full(1000, int(line))}).durable().generation, flush=True)
store.close()
"""


def ask(writer: subprocess.Popen[str], line: str) -> str:
    assert writer.stdin is not None and writer.stdout is not None
    writer.stdin.write(line + "\n")
    writer.stdin.flush()
    return writer.stdout.readline()


def test_two_writers(region: MakeRegion, start_python: StartPython) -> None:
    path = region()
    first = start_python(WRITER, path)
    assert first.stdout is not None and first.stdout.readline() == "open\n"
    for timeout in (0, 0.3):
        begun = time.monotonic()
        with pytest.raises(errors.InUse, match=str(first.pid)):
            pccheck.Store(path, lock_timeout=timeout, **SMALL)
        assert time.monotonic() - begun >= timeout
    # The second one waits until the first has died without closing.
    second = start_python(WRITER, path)
    generation = int(ask(first, "1"))
    assert ask(first, "die") == ""
    assert second.stdout is not None and second.stdout.readline() == "open\n"
    assert int(ask(second, "2")) > generation
    with pccheck.Store(path, read_only=True, **SMALL) as reader, reader.open() as checkpoint:
        assert checkpoint.step == 2 and (checkpoint["x"] == 2).all()
    assert second.stdin is not None
    second.stdin.close()
    assert second.wait(30) == 0
