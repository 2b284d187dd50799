"""One system, one size, in a process of its own: saves and restores, or its honesty. Writes what it found as JSON.

Started as `python -m comparison.worker SETTINGS RESULT`, both paths of JSON files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from measuring import procfs

from . import durability, probes
from .settings import Settings
from .systems import entry_of
from .systems.base import System


@dataclasses.dataclass
class SaveTimes:
    """One save. Seconds from its call."""

    #: until the trainer may go on
    blocked: float
    durable: float
    #: user and system time of this process and its children
    cpu: float
    #: all that was not idle on the machine: also what the kernel's own threads write back
    machine_cpu: float
    #: peak memory beyond what there was before the system was opened; mapped parts of its files are not counted
    extra_bytes: int
    #: of its files in the page cache afterwards, and not yet written then; None: the kernel does not say
    cached_bytes: int | None
    dirty_bytes: int | None
    #: of the device meanwhile; None: unknown, or none needed
    flushes: int | None


def mapped_bytes(folder: Path) -> int:
    """Resident parts of files of a folder that this process has mapped: page cache, and counted as that."""
    found, inside, wanted = 0, False, str(folder)
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            first = line.split(maxsplit=5)
            if "-" in first[0] and not first[0].endswith(":"):
                inside = len(first) == 6 and first[5].startswith(wanted)
            elif inside and first[0] == "Rss:":
                found += int(first[1]) * 1024
    return found


def cpu_seconds() -> float:
    """User and system time of this process, exactly, and of its living children, in clock ticks."""
    children = procfs.children(os.getpid())
    return time.process_time() + sum(procfs.cpu_seconds(child) for child in children)


class Meter:
    """Measures saves of a system against what the process held before it was opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = procfs.memory().resident

    def children_bytes(self) -> int:
        """Memory of child processes that is theirs alone."""
        found = 0
        for child in procfs.children(os.getpid()):
            try:
                found += procfs.memory(child).anonymous
            except OSError:  # it ended meanwhile
                continue
        return found

    def save(self, system: System, step: int) -> SaveTimes:
        """Saves and waits until that is durable."""
        # What others left to be written, and what was deleted, is not this save's work.
        os.sync()
        procfs.reset_peak()
        flushes = durability.flushes(self._folder)
        cpu, machine = cpu_seconds(), procfs.system().busy_seconds
        began = time.monotonic()
        system.save(step)
        blocked = time.monotonic() - began
        system.wait()
        durable = time.monotonic() - began
        cpu, machine = cpu_seconds() - cpu, procfs.system().busy_seconds - machine
        # At once, before the kernel writes of its own accord what a system has left unwritten.
        flushed, cached = durability.flushes(self._folder), durability.cached(self._folder)
        extra = procfs.memory().peak - self._before - mapped_bytes(self._folder) + self.children_bytes()
        return SaveTimes(
            blocked,
            durable,
            cpu,
            machine,
            max(extra, 0),
            cached.cached if cached else None,
            cached.dirty if cached else None,
            flushed - flushes if flushed is not None and flushes is not None else None,
        )


def measure(settings: Settings) -> dict[str, Any]:
    """The first save and the later ones, then the newest checkpoint restored and compared bit for bit."""
    folder = Path(settings.folder)
    kind = entry_of(settings.system).load()
    state = kind.state_class(settings.state_bytes, settings.seed)
    meter = Meter(folder)
    began = time.monotonic()
    system = kind(folder, state)
    system.open()
    opened = time.monotonic() - began
    saves = []
    for step in range(1, settings.saves + 1):
        state.change()
        system.changed()
        saves.append(dataclasses.asdict(meter.save(system, step)))
        if step > 1:
            system.forget(step - 1)
    facts = system.facts()
    system.close()
    del system
    target = state.target()
    system = kind(folder, state)
    durability.drop_cache(folder)
    began = time.monotonic()
    system.reopen()
    reopened = time.monotonic()
    cpu = cpu_seconds()
    step, restored = system.restore(settings.saves, target)
    ended = time.monotonic()
    cpu = cpu_seconds() - cpu
    if step != settings.saves or (wrong := state.differing(restored)):
        raise RuntimeError(
            f"{settings.system}: restored step {step}, expected {settings.saves}; tensors that differ: {wrong}"
        )
    return {
        "state_bytes": state.nbytes,
        "tensors": len(state.tensors),
        "open_seconds": opened,
        "saves": saves,
        "reopen_seconds": reopened - began,
        "restore_seconds": ended - reopened,
        "restore_cpu": cpu,
        "facts": facts,
    }


if __name__ == "__main__":
    given = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measure(given) if given.saves else probes.probe(given)))
