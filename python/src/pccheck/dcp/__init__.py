"""torch.distributed.checkpoint on regions: `dcp.save`, `dcp.async_save` and `dcp.load` with PCcheck's guarantees.

    writer = pccheck.dcp.RegionWriter("checkpoints")
    dcp.save(state, storage_writer=writer)                       # or dcp.async_save
    dcp.load(state, storage_reader=pccheck.dcp.RegionReader("checkpoints"))

A folder holds one region per rank and one, the coordinator's, for metadata; see `docs/dcp.md`. Every save adds a
checkpoint to each rank's region and then publishes it with one metadata checkpoint: until that is durable, loading
gives the checkpoint before. Metadata is JSON, never pickle. What is not a tensor is stored as the bytes that the
planner makes of it, which torch's default planner makes by pickling; :class:`JsonSavePlanner` makes JSON instead.
"""

from __future__ import annotations

from ._document import Stored
from .planners import JsonLoadPlanner, JsonSavePlanner
from .reader import RegionReader
from .writer import RegionWriter

__all__ = ["JsonLoadPlanner", "JsonSavePlanner", "RegionReader", "RegionWriter", "Stored"]
