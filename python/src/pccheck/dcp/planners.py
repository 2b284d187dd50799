"""Planners that store values other than tensors as JSON: no pickle anywhere in a checkpoint."""

from __future__ import annotations

import io
from typing import Any

from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

from .. import errors, trees

__all__ = ["JsonLoadPlanner", "JsonSavePlanner"]


class JsonSavePlanner(DefaultSavePlanner):
    """torch's default planner, with JSON (:mod:`pccheck.trees`) in place of pickle for what is not a tensor.

    Values come back as they were, with their types: numbers exactly, tuples as tuples. What JSON cannot represent
    raises :class:`pccheck.UnsupportedValue`, which names its place. Load with :class:`JsonLoadPlanner`.
    """

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """JSON of what torch would pickle; tensors as they are."""
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        flat = trees.flatten(object, prefix=write_item.index.fqn)
        for name in flat.tensors:
            raise errors.UnsupportedValue("a tensor inside a value that is not a dict or a list", at=name)
        return io.BytesIO(flat.json.encode())


class JsonLoadPlanner(DefaultLoadPlanner):
    """Loads what :class:`JsonSavePlanner` saved. Loading runs nothing that the checkpoint names."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a value that is not a tensor in its place."""
        name = read_item.dest_index.fqn
        try:
            loaded = trees.unflatten(value.getvalue().decode(), _no_tensor)
        except UnicodeDecodeError:
            raise errors.Corrupt(
                f"{name}: expected JSON, found other bytes",
                operation="load",
                advice="it was saved with torch's default planner, which pickles: load with DefaultLoadPlanner",
            ) from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def _no_tensor(name: str, kind: str) -> Any:
    raise errors.Corrupt(f"expected a value without tensors, found {name!r}", operation="load")
