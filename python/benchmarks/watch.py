"""Watches a process from outside, without a thread in it: threads that come and go, memory of its children."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field

from measuring import procfs

SAMPLE_SECONDS = 0.02


@dataclass
class Watched:
    """What was seen of one process until it ended. Times are of time.monotonic()."""

    #: when each thread, of the process or of its children, was first seen
    thread_first_seen: dict[int, float] = field(default_factory=dict)
    #: when each child was first seen
    child_first_seen: dict[int, float] = field(default_factory=dict)
    #: time and sum of the anonymous memory of its children; what they share with it counts there
    children_bytes: list[tuple[float, int]] = field(default_factory=list)

    def threads_started(self, began: float, ended: float) -> int:
        """Threads first seen in an interval; one that lives for less than a sample may be missed."""
        return sum(began <= seen <= ended for seen in self.thread_first_seen.values())

    def children_started(self, began: float, ended: float) -> int:
        """Processes first seen in an interval."""
        return sum(began <= seen <= ended for seen in self.child_first_seen.values())

    def children_peak_bytes(self, began: float, ended: float) -> int:
        """Highest memory of its children in an interval. A child just forked still counts its parent's as its own."""
        return max((size for seen, size in self.children_bytes if began <= seen <= ended), default=0)


def watch(process: subprocess.Popen[bytes], sample_seconds: float = SAMPLE_SECONDS) -> Watched:
    """Samples until the process has ended."""
    watched = Watched()
    while process.poll() is None:
        now = time.monotonic()
        children = procfs.children(process.pid)
        anonymous = 0
        for child in children:
            watched.child_first_seen.setdefault(child, now)
            try:
                anonymous += procfs.memory(child).anonymous
            except OSError:  # it ended meanwhile
                continue
        if children:
            watched.children_bytes.append((now, anonymous))
        for pid in (process.pid, *children):
            for thread in procfs.threads(pid):
                watched.thread_first_seen.setdefault(thread, now)
        time.sleep(sample_seconds)
    return watched
