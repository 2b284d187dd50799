"""The machine that something was measured on, and the file system of a folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

#: file systems that keep files in memory
IN_MEMORY = {"tmpfs", "ramfs"}


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as ext4."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def block_device(folder: Path) -> Path | None:
    """The folder in /sys of the device below a folder's file system; none where it is not one device."""
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    return path.resolve() if path.exists() else None


def memory_available_bytes() -> int:
    """What can be allocated without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _first(path: str, prefix: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        if line.startswith(prefix):
            return line.split(":", 1)[1].strip()
    return None


def describe(folder: Path) -> dict[str, Any]:
    """What a reader needs to judge figures that were measured in a folder."""
    device = block_device(folder)
    return {
        "cores": os.cpu_count(),
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": file_system(folder),
        "device": device.name if device else None,
        "transparent_huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
