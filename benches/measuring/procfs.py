"""What Linux tells about processes: memory, CPU time, threads and children. Readings cost microseconds."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    resident: int
    #: highest resident since start, or since `reset_peak()`
    peak: int
    #: anonymous part of `resident`: not shared with other processes, not backed by files
    anonymous: int


def memory(pid: int | str = "self") -> Memory:
    """Memory of a process; 0 where the kernel does not say."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, peak, anonymous = (
        int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")
    )
    return Memory(resident, peak, anonymous)


def reset_peak() -> None:
    """Lets `peak` of this process begin again at what is resident now, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def children(pid: int) -> list[int]:
    """All living descendants of a process."""
    found: list[int] = []
    for task in threads(pid):
        try:
            direct = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:  # it ended meanwhile
            continue
        for child in map(int, direct):
            found += [child, *children(child)]
    return found


def threads(pid: int) -> list[int]:
    """Thread ids of a process; empty where it has ended."""
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants, all threads, in steps of a clock tick."""
    ticks = 0
    for each in (pid, *children(pid)):
        try:
            # The command name, in parentheses, may hold spaces.
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_SECOND


@dataclass(frozen=True)
class System:
    """Counters of the whole machine since it started."""

    #: seconds of all cores that were not idle
    busy_seconds: float
    #: threads and processes ever started, by anybody
    tasks_started: int


def system() -> System:
    """Counters that show work which the kernel does in nobody's name, and threads too short-lived to be seen."""
    fields = {line.split()[0]: line.split()[1:] for line in Path("/proc/stat").read_text().splitlines()}
    user, nice, kernel, _idle, _wait, interrupt, soft = map(int, fields["cpu"][:7])
    return System((user + nice + kernel + interrupt + soft) / _TICKS_PER_SECOND, int(fields["processes"][0]))
