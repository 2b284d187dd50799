"""Prevents: descriptors, handles, references or memory that grow with the number or the size of saves."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MIB, SMALL, MakeRegion, OpenStore, RunPython, native_threads

import pccheck
from pccheck import errors


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names only


def objects_of_the_package() -> int:
    gc.collect()
    return sum(str(type(found).__module__).startswith("pccheck") for found in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_two_hundred_saves_leak_nothing(region: MakeRegion, open_store: OpenStore) -> None:
    store = open_store(region(slots=6, payload_bytes=MIB), max_in_flight=4, keep=2)
    array = np.ones(100_000, "uint8")

    async def awaited(save: pccheck.Save) -> None:
        await save

    def some_saves(count: int) -> None:
        for step in range(count):
            save = store.save(step, {"x": array, "y": array[:10]}, {"k": "v"}, confirm=step % 7 == 3)
            if step % 10 == 0:
                asyncio.run(awaited(save)) if step % 7 != 3 else save.cancel()
            elif step % 10 == 5:
                save.fileno()
                save.copied(30)
            if step % 20 == 2:
                with store.open() as checkpoint:
                    checkpoint.read("x")
            if step % 25 == 7:
                with pytest.raises(errors.InvalidArgument):
                    store.save(step, {"x": array, "": array})
        del save
        store.drain(60)

    some_saves(20)
    before = descriptors(), objects_of_the_package(), sys.getrefcount(array)
    resident = resident_bytes()
    some_saves(200)
    assert (descriptors(), objects_of_the_package(), sys.getrefcount(array)) == before
    assert resident_bytes() - resident < 8 * MIB


def test_opening_and_closing_leaks_nothing(region: MakeRegion) -> None:
    path = region()

    def cycle() -> None:
        with pccheck.Store(path, **SMALL) as store:
            store.save(1, {"x": np.ones(10)})
        with pytest.raises(errors.NotFound):
            pccheck.Store(path.with_name("none"))
        with pytest.raises(errors.InvalidArgument):
            pccheck.Store(path, keep=1000)

    cycle()
    before = descriptors(), objects_of_the_package(), len(native_threads())
    for _ in range(5):
        cycle()
    assert (descriptors(), objects_of_the_package(), len(native_threads())) == before


BOUNDED = """
import resource, sys
from pathlib import Path
import numpy, pccheck
path, mib = sys.argv[1], 1 << 20
array = numpy.random.default_rng(0).integers(0, 255, 192 * mib, "uint8")
target = numpy.ones_like(array)
def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
with pccheck.Store(path, staging_bytes=16 * mib, chunk_bytes=mib) as store:
    before = peak()
    for step in (1, 2):
        save = store.save(step, {"x": array, "y": array[: mib]})
    save.durable()
    saved = peak()
    store.restore({"x": target}).close()
    restored = peak()
assert (target == array).all()
print((saved - before) // 1024, (restored - before) // 1024)
"""


def test_memory_is_bounded_by_the_staging_pool(run_python: RunPython, region: MakeRegion) -> None:
    path = region(payload_bytes=200 * MIB)
    saved, restored = map(int, run_python(BOUNDED, path).split())
    # A state of 192 MiB, twice in flight, through a pool of 16 MiB.
    assert saved < 16 + 16, f"{saved} MiB for saves"
    assert restored < 16 + 48, f"{restored} MiB for a restore"
