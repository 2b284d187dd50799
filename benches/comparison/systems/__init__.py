"""The systems that are compared, by name. Their modules are imported only in the process that measures them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .base import System

Group = Literal["ceiling", "pccheck", "peer"]


@dataclass(frozen=True)
class Entry:
    """What is known of a system before it is loaded."""

    name: str
    #: in tables and pictures
    label: str
    group: Group
    #: module:Class; a module without a dot is one of this package
    place: str
    #: copies of the state that its files hold at most
    disk_states: int = 2
    #: copies that its process holds at most: the state, what it is restored into, and what the system takes
    memory_states: int = 2
    #: its files are in memory: in /dev/shm, not in the folder that is measured
    in_memory: bool = False
    #: measured only where the state is larger than this, because below it is another system over again
    above_bytes: int = 0

    def load(self) -> type[System]:
        """The class that drives it."""
        module, _, name = self.place.partition(":")
        path = module if "." in module else f"{__name__}.{module}"
        found: type[System] = getattr(importlib.import_module(path), name)
        return found


#: the engine's default staging pool
DEFAULT_POOL_BYTES = 256 << 20

_ENTRIES = (
    Entry("ceiling", "plain O_DIRECT", "ceiling", "ceiling:PlainDirect", disk_states=1, memory_states=3),
    Entry("ceiling-memory", "plain copy, tmpfs", "ceiling", "ceiling:PlainCopy", disk_states=1, in_memory=True),
    Entry("pccheck", "PCcheck direct", "pccheck", "engine:Direct"),
    Entry(
        "pccheck-whole",
        "PCcheck direct, pool = state",
        "pccheck",
        "engine:DirectWhole",
        memory_states=3,
        above_bytes=DEFAULT_POOL_BYTES,
    ),
    Entry("pccheck-fresh", "PCcheck direct, not prewritten", "pccheck", "engine:DirectFresh"),
    Entry("pccheck-threads", "PCcheck direct, no io_uring", "pccheck", "engine:Threads"),
    Entry(
        "pccheck-threads-whole",
        "PCcheck no io_uring, pool = state",
        "pccheck",
        "engine:ThreadsWhole",
        memory_states=3,
        above_bytes=DEFAULT_POOL_BYTES,
    ),
    Entry("pccheck-mmap", "PCcheck mmap", "pccheck", "engine:Mapped"),
    Entry(
        "pccheck-mmap-whole",
        "PCcheck mmap, pool = state",
        "pccheck",
        "engine:MappedWhole",
        memory_states=3,
        above_bytes=DEFAULT_POOL_BYTES,
    ),
    Entry("pccheck-tmpfs", "PCcheck tmpfs", "pccheck", "engine:Tmpfs", in_memory=True),
    Entry("torch-save", "torch.save + fsync", "peer", "plain_files:TorchSave", memory_states=3),
    Entry("safetensors", "safetensors + fsync", "peer", "plain_files:Safetensors", memory_states=3),
    Entry("dcp", "dcp.save", "peer", "dcp:Dcp"),
    Entry("dcp-async", "dcp.async_save", "peer", "dcp:DcpAsync", memory_states=3),
    Entry("dcp-cached", "dcp.async_save, cached", "peer", "dcp:DcpCached", memory_states=3),
    Entry("deepspeed", "DeepSpeed FastFileWriter", "peer", "fast_file_writer:FastFile", memory_states=3),
    Entry("orbax", "Orbax async", "peer", "orbax_async:Orbax", memory_states=3),
    Entry("checkfreq", "CheckFreq's way", "peer", "papers:CheckFreq", memory_states=3),
    Entry("gpm", "GPM's way", "peer", "papers:Gpm"),
)

SYSTEMS = {entry.name: entry for entry in _ENTRIES}


def entry_of(name: str) -> Entry:
    """One of the table, or one of your own as `package.module:Class`."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    module, _, label = name.partition(":")
    if "." not in module or not label:
        raise ValueError(f"{name!r}: expected {', '.join(SYSTEMS)}, or your own as package.module:Class")
    return Entry(name, label, "peer", name)
