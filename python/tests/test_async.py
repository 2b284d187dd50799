"""Prevents: an awaited save that never wakes its tasks, wakes only one of them, or leaks a descriptor."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from conftest import MakeRegion, OpenStore

import pccheck
from pccheck import errors


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs to the end, and within a minute; leaves no descriptor behind."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names only
    asyncio.run(asyncio.wait_for(main, 60))
    # The engine lets go of the last one a moment after it has told of the end.
    deadline = time.monotonic() + 10
    while not set(os.listdir("/proc/self/fd")) <= before:  # noqa: PTH208
        assert time.monotonic() < deadline, "a descriptor was left behind"
        time.sleep(0.01)


def test_await_gives_what_durable_gives(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)})
        durable = await save
        assert durable == save.durable(0) and durable.step == 1
        # Once ended, at any time and as often as one likes.
        assert await save == durable and await save == durable
        save.close()

    run(main())


def test_several_tasks_await_one_save(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)

        async def task() -> pccheck.Durable:
            return await save

        tasks = [asyncio.create_task(task()) for _ in range(5)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        save.confirm()
        assert await asyncio.gather(*tasks) == [save.durable(0)] * 5
        save.close()

    run(main())


def test_gather_awaits_several_saves(open_store: OpenStore, region: MakeRegion) -> None:
    store = open_store(region(slots=6), max_in_flight=4, keep=2)

    async def main() -> None:
        saves = [store.save(step, {"x": np.full(1000, step)}) for step in range(4)]
        assert [found.step for found in await asyncio.gather(*saves)] == [0, 1, 2, 3]
        for save in saves:
            save.close()

    run(main())


def test_the_loop_runs_meanwhile(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)
        turns = 0

        async def confirm_later() -> None:
            nonlocal turns
            for _ in range(100):
                turns += 1
                await asyncio.sleep(0)
            save.confirm()

        other = asyncio.create_task(confirm_later())
        assert (await save).step == 1 and turns == 100
        await other
        save.close()

    run(main())


def test_cancelling_the_task_leaves_the_save(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)
        task = asyncio.ensure_future(save)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(save, 0.05)
        save.confirm()
        assert (await save).step == 1
        save.close()

    run(main())


def test_a_failing_save_raises_in_every_task(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)
        tasks = [asyncio.ensure_future(save) for _ in range(3)]
        await asyncio.sleep(0)
        save.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(why, errors.Cancelled) for why in found) and len(set(map(id, found))) == 3
        save.close()

    run(main())


def test_closing_the_store_wakes_who_awaits_its_saves(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)
        task = asyncio.ensure_future(save)
        await asyncio.sleep(0)
        await asyncio.to_thread(store.close)
        with pytest.raises(errors.Cancelled):
            await task
        save.close()

    # The store's own descriptors go meanwhile.
    run(main())


def test_closing_the_save_wakes_who_awaits_it(store: pccheck.Store) -> None:
    async def main() -> None:
        save = store.save(1, {"x": np.ones(10)}, confirm=True)
        tasks = [asyncio.ensure_future(save) for _ in range(2)]
        await asyncio.sleep(0)
        save.close()
        # It ends all the same, here by being cancelled, and that wakes them.
        for why in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(why, errors.InvalidState)
        with pytest.raises(errors.InvalidState):
            await save
        # Its descriptor goes once it has ended.
        store.drain(30)

    run(main())


def test_loops_of_several_threads_await_one_save(store: pccheck.Store) -> None:
    save = store.save(1, {"x": np.ones(10)}, confirm=True)
    found: list[int] = []

    async def main() -> None:
        found.append((await save).step)

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    save.confirm()
    for thread in threads:
        thread.join(60)
    assert found == [1, 1, 1]
