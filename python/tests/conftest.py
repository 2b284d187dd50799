"""Fixtures for all tests: small regions, small stores that are closed afterwards, and Python programs on the side."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

import pccheck

# A shell starts what it runs in the background with SIGINT ignored, and so would be every program that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

KIB = 1024
MIB = 1024 * 1024

#: Store options that keep tests quick
SMALL: dict[str, Any] = {"staging_bytes": 16 * MIB, "chunk_bytes": MIB}


class MakeRegion(Protocol):
    def __call__(self, *, payload_bytes: int = ..., slots: int = ..., name: str = ...) -> Path: ...


class OpenStore(Protocol):
    def __call__(self, path: Path | None = ..., **options: Any) -> pccheck.Store: ...


class RunPython(Protocol):
    def __call__(self, program: str, *arguments: object, prefix: list[str] = ...) -> str: ...


def native_threads() -> set[str]:
    """Threads of this process, but for those that the kernel adds and ends as it likes to serve an io_uring."""
    found = set()
    for entry in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if not (entry / "comm").read_text().startswith("iou-"):
                found.add(entry.name)
    return found


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Keeps what exists before a test, such as the modules of torch and JAX, out of the collections in it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def region(tmp_path: Path) -> MakeRegion:
    """Formats a region in ``tmp_path``: by default 3 slots of 4 MiB."""

    def make(*, payload_bytes: int = 4 * MIB, slots: int = 3, name: str = "region.pccheck") -> Path:
        path = tmp_path / name
        pccheck.format_region(path, slots=slots, payload_bytes=payload_bytes)
        return path

    return make


@pytest.fixture
def open_store(region: MakeRegion) -> Iterator[OpenStore]:
    """Opens small stores (of a new region, where no path is given), and closes them after the test."""
    with ExitStack() as stores:

        def opened(path: Path | None = None, **options: Any) -> pccheck.Store:
            store = pccheck.Store(path or region(), **(SMALL | options))
            stores.callback(store.close)
            return store

        yield opened


@pytest.fixture
def store(open_store: OpenStore) -> pccheck.Store:
    """A small store of a new region of 3 slots of 4 MiB."""
    return open_store()


def python_environment() -> dict[str, str]:
    """The environment in which another Python finds this package."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_python() -> RunPython:
    """Runs a program in another Python process, which must succeed and print nothing to stderr; returns its stdout."""

    def run(program: str, *arguments: object, prefix: list[str] | None = None) -> str:
        command = [*(prefix or []), sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=python_environment())
        assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program in another Python process with pipes to its stdin and stdout; killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-c", program, *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=python_environment())
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
