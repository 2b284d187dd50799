"""Prevents: threads that deadlock, that free what another thread uses, or that hold up all others."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import MIB, MakeRegion, OpenStore, native_threads

import pccheck
from pccheck import errors


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, queue.Queue[Any]]:
    """Runs a call in a thread; its result or exception comes by the queue."""
    outcome: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            outcome.put(call())
        except BaseException as why:
            outcome.put(why)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def until_used(handle: Any, thread: threading.Thread) -> None:
    """Returns once the thread's call uses the handle, or has ended."""
    while not handle._users and thread.is_alive():
        time.sleep(0.001)


@contextmanager
def counting() -> Iterator[list[int]]:
    """A Python thread that counts as fast as it gets the GIL."""
    count, stop = [0], threading.Event()

    def run() -> None:
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("what", ["drain", "save", "abandon", "raw_save"])
def test_closing_a_store_ends_the_waits_of_other_threads(store: pccheck.Store, what: str) -> None:
    held = [store.save(step, {"x": np.ones(10)}, confirm=True) for step in (1, 2)]
    waits: dict[str, Callable[[], object]] = {
        "drain": lambda: store.drain(3600),
        "save": lambda: store.save(3, {}, timeout=None),
        "abandon": lambda: store.abandon(1),
        "raw_save": lambda: store.raw_save(3, 10, timeout=None),
    }
    thread, outcome = in_thread(waits[what])
    if what != "raw_save":
        until_used(store._handle, thread)
    store.close()
    thread.join(30)
    assert not thread.is_alive()
    ended = outcome.get()
    # abandon may just have ended the save that it waited for.
    assert isinstance(ended, errors.InvalidState) or (what == "abandon" and ended == 0)
    for save in held:
        with pytest.raises(errors.Cancelled):
            save.durable(30)


def test_closing_a_store_ends_the_wait_for_its_saves(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    thread, outcome = in_thread(save.durable)
    until_used(save._handle, thread)
    store.close()
    thread.join(30)
    assert isinstance(outcome.get(), errors.Cancelled)


def test_closing_a_save_ends_the_wait_of_another_thread(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    thread, outcome = in_thread(save.durable)
    until_used(save._handle, thread)
    save.close()
    thread.join(30)
    assert isinstance(outcome.get(), errors.InvalidState)
    store.drain(30)
    assert store.stats().saves_cancelled == 1


def test_many_threads_close_one_store(open_store: OpenStore, region: MakeRegion) -> None:
    path = region()
    for _ in range(5):
        store = open_store(path)
        threads = [in_thread(store.close) for _ in range(8)]
        for thread, outcome in threads:
            thread.join(30)
            assert outcome.get() is None
        assert store.closed


def test_threads_race_with_close(open_store: OpenStore, region: MakeRegion) -> None:
    """Every call either works or says that the store is closed; nothing crashes."""
    path = region(slots=4)
    store = open_store(path)
    store.save(1, {"x": np.arange(1000)}).durable(30)
    store.close()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            store = open_store(path)
            begun = threading.Barrier(5)

            def work(store: pccheck.Store = store, begun: threading.Barrier = begun) -> None:
                begun.wait()
                try:
                    while True:
                        store.stats()
                        store.checkpoints()
                        store.got()
                        with store.open() as checkpoint:
                            assert checkpoint["x"][999] == 999
                except (errors.InvalidState, errors.NoSlot):
                    pass

            threads = [in_thread(work) for _ in range(4)]
            begun.wait()
            store.stats()
            store.close()
            for thread, outcome in threads:
                thread.join(30)
                assert outcome.get() is None
    finally:
        sys.setswitchinterval(interval)


def test_threads_save_and_read_one_store(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=8, payload_bytes=MIB), max_in_flight=4)

    def work(first: int) -> None:
        for step in range(first, first + 3):
            save = store.save(step, {"x": np.full(50_000, step)}, {"step": str(step)}, timeout=60)
            assert save.durable(60).step == step
            with store.open() as checkpoint:
                found = int(checkpoint.metadata["step"])
                assert (checkpoint["x"] == found).all() and checkpoint.step == found

    threads = [in_thread(lambda first=first: work(first)) for first in (0, 100, 200, 300)]  # type: ignore[misc]
    for thread, outcome in threads:
        thread.join(120)
        assert outcome.get() is None
    stats = store.stats()
    assert (stats.saves_begun, stats.saves_durable, stats.in_flight) == (12, 12, 0)


def test_several_threads_wait_for_one_save(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    threads = [in_thread(save.durable) for _ in range(4)]
    save.confirm()
    outcomes = []
    for thread, outcome in threads:
        thread.join(30)
        outcomes.append(outcome.get())
    assert outcomes == [save.durable(0)] * 4


def test_two_threads_commit_one_raw_save(store: pccheck.Store) -> None:
    raw = store.raw_save(1, 3)
    raw.write_at(0, b"abc")
    threads = [in_thread(raw.commit) for _ in range(4)]
    outcomes = []
    for thread, outcome in threads:
        thread.join(30)
        outcomes.append(outcome.get())
    (save,) = [found for found in outcomes if isinstance(found, pccheck.Save)]
    assert sum(isinstance(found, errors.InvalidState) for found in outcomes) == 3
    assert save.durable(30).step == 1


def test_a_commit_waits_for_the_writes_of_other_threads(store: pccheck.Store) -> None:
    raw = store.raw_save(1, 3)
    raw.write_at(0, b"abc")
    with raw._handle.use():
        thread, outcome = in_thread(raw.commit)
        while not raw._handle.closed and thread.is_alive():
            time.sleep(0.001)
        assert outcome.empty()
        with pytest.raises(errors.InvalidState):
            raw.write_at(0, b"abc")
    thread.join(30)
    assert outcome.get().durable(30).step == 1


def test_other_threads_run_while_one_waits(store: pccheck.Store) -> None:
    """Counted, not timed: each wait lasts until the other thread has counted far more than one switch allows."""
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    for call in (lambda: save.durable(0.2), lambda: store.drain(0.2)):
        with counting() as count:
            before = count[0]
            with pytest.raises(errors.TimedOut):
                call()
            # A wait that held the GIL would let it count at its two ends only: for a few switch intervals at most.
            assert count[0] - before > 1000
    other = store.save(2, {}, confirm=True)
    with counting() as count:
        before = count[0]
        with pytest.raises(errors.NoSlot):
            store.save(3, {}, timeout=0.2)
        assert count[0] - before > 1000
    other.cancel()


def test_a_call_of_another_thread_ends_the_wait(store: pccheck.Store) -> None:
    """With the GIL held by the wait, nobody could confirm, and this test would hang."""
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    thread, outcome = in_thread(lambda: save.durable(None))
    until_used(save._handle, thread)
    save.confirm()
    thread.join(60)
    assert outcome.get().step == 1


def test_no_thread_is_started_by_a_save(store: pccheck.Store) -> None:
    array = np.ones(200_000)
    store.save(0, {"x": array}).durable(30)
    python, native = threading.active_count(), native_threads()
    for step in range(1, 6):
        save = store.save(step, {"x": array})
        assert native_threads() == native
        save.copied(30)
        assert native_threads() == native
        save.durable(30)
        assert (threading.active_count(), native_threads()) == (python, native)
    store.close()
    assert len(native_threads()) < len(native)
