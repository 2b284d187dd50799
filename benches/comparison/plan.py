"""What is to be measured, in which order, and what is left out because the machine has no room for it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measuring import machine

from .systems import DEFAULT_POOL_BYTES, Entry

#: of the memory that is available, so that the kernel keeps room for its page cache
MEMORY_SHARE = 0.85
#: of the state, that file formats and the benchmark take beside it
DISK_SHARE = 1.05
DISK_SPARE_BYTES = 1 << 30
#: Python with torch, JAX and their libraries
PROCESS_BYTES = 1 << 30


@dataclass(frozen=True)
class Job:
    """One process: a system saves a state of a size, in a round."""

    round: int
    size: int
    system: Entry


@dataclass(frozen=True)
class LeftOut:
    """What is not measured, and why."""

    system: str
    size: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """All of it."""

    jobs: list[Job]
    left_out: list[LeftOut]


def make(systems: list[Entry], sizes: list[int], rounds: int, seed: int, folder: Path, memory_folder: Path) -> Plan:
    """Every system in every round, for each size in an order shuffled anew."""
    left_out = [found for size in sizes for entry in systems for found in _no_room(entry, size, folder, memory_folder)]
    absent = {(found.system, found.size) for found in left_out}
    dice, jobs = random.Random(seed), []
    for round_index in range(rounds):
        for size in sizes:
            present = [entry for entry in systems if (entry.name, size) not in absent]
            dice.shuffle(present)
            jobs += [Job(round_index, size, entry) for entry in present]
    return Plan(jobs, left_out)


def _no_room(entry: Entry, size: int, folder: Path, memory_folder: Path) -> Iterator[LeftOut]:
    if size <= entry.above_bytes:
        yield LeftOut(entry.name, size, "the default staging pool holds the state")
        return
    stored = int(size * entry.disk_states * DISK_SHARE)
    memory = size * entry.memory_states + PROCESS_BYTES
    if entry.group == "pccheck":
        memory += DEFAULT_POOL_BYTES
    if entry.in_memory:
        memory += stored
    disk = shutil.disk_usage(memory_folder if entry.in_memory else folder).free - DISK_SPARE_BYTES
    available = int(machine.memory_available_bytes() * MEMORY_SHARE)
    if memory > available:
        yield LeftOut(
            entry.name, size, f"needs {memory / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are to be had"
        )
    elif stored > disk:
        yield LeftOut(entry.name, size, f"needs {stored / 1e9:.1f} GB of disk, {disk / 1e9:.1f} GB are to be had")
