"""Folders of torch.distributed.checkpoint, with torch's own reader and writer, in one process.

DCP names tensors by their path and turns integer keys into texts; tuples, and empty dicts, are lost to it. The state's
exact tree is therefore kept beside them, as one more entry, which DCP's own loading ignores.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .. import errors, trees
from . import dcp_metadata
from .torch_files import refused_global

__all__ = ["read", "write"]

#: entry with the JSON of the tree, of the names of its tensors here, of metadata and step
TREE_ENTRY = "pccheck_tree"
#: what tensors are called that DCP gives no name, before their own
_TENSOR_PREFIX = "pccheck_tensor."


class _Reader(FileSystemReader):
    """torch's reader, but for what unpickles without limits."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return dcp_metadata.read(Path(self.path, ".metadata"))


class _LoadPlanner(DefaultLoadPlanner):
    """torch's planner, but for what unpickles without limits."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as why:
            raise errors.Unsupported(
                f"the entry {name!r} is more than a plain value: {refused_global(why)}",
                advice="load it in a program that trusts it, and save its plain state",
            ) from None


def read(folder: Path) -> tuple[Any, dict[str, str], int]:
    """State, metadata and step of the checkpoint in ``folder``."""
    reader = _Reader(folder)
    try:
        metadata = reader.read_metadata()
        entries = metadata.state_dict_metadata
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for name, entry in entries.items()
        }
        planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _one_process():
            load(state, storage_reader=reader, planner=planner, no_dist=True)
    except errors.PccheckError:
        raise
    except OSError:
        raise
    except CheckpointException as why:
        raise _damaged(folder, _cause(why)) from None
    except Exception as why:  # of whatever kind an unpickler raises when its bytes are damaged
        raise _damaged(folder, why) from None
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    exact = state.pop(TREE_ENTRY, None)
    if isinstance(exact, str):
        return _exact(folder, exact, state)
    return _nested(state, paths), {}, 0


def _cause(why: CheckpointException) -> BaseException:
    """What torch's reader or writer raised."""
    cause: BaseException = next(iter(why.failures.values()))[0]
    return cause


def _damaged(folder: Path, why: BaseException) -> errors.PccheckError:
    if isinstance(why, errors.PccheckError):
        return why
    text = (str(why) or repr(why)).splitlines()[0]
    return errors.Corrupt(f"{folder} cannot be read as a DCP folder: {text}", path=str(folder))


def _exact(folder: Path, text: str, state: dict[str, Any]) -> tuple[Any, dict[str, str], int]:
    from ..torch.states import as_kind

    try:
        noted = json.loads(text)
        names: dict[str, str] = noted["names"]
        tree = trees.unflatten(noted["tree"], lambda name, kind: as_kind(state[names[name]], kind))
        return tree, dict(noted["metadata"]), int(noted["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as why:
        raise errors.Corrupt(f"the tree in {folder} does not fit its tensors: {why!r}", path=str(folder)) from None


def _nested(state: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """Entries at the paths that they were saved from: texts are keys of dicts, numbers places in lists."""
    root: dict[Any, Any] = {}
    for name, value in state.items():
        path = paths.get(name, (name,))
        at: Any = root
        for key, following in zip(path, [*path[1:], None], strict=True):
            made: Any = value if following is None else [] if isinstance(following, int) else {}
            if isinstance(key, int):
                at.extend([None] * (key + 1 - len(at)))
                if following is None or at[key] is None:
                    at[key] = made
            elif following is None or key not in at:
                at[key] = made
            at = at[key]
    return root


def write(folder: Path, state: Any, flat: trees.Flat, metadata: dict[str, str], step: int) -> None:
    """Saves a state to an empty folder."""
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise errors.UnsupportedValue(
            f"a DCP folder holds a dict with texts as keys, found a {type(state).__name__}", at="the root of the state"
        )
    planner = DefaultSavePlanner()
    saved = dict(state)
    planner.set_up_planner(dict(state), None, True)
    # Tied tensors get one name in the tree, and so are tied when it is read.
    named = {_memory(value): name for name, value in planner.state_dict.items() if isinstance(value, torch.Tensor)}
    names = {}
    for name, tensor in trees.flatten(state).tensors.items():
        if isinstance(tensor, torch.Tensor) and _memory(tensor) in named:
            names[name] = named[_memory(tensor)]
            continue
        plain = flat.tensors[name]
        names[name] = _TENSOR_PREFIX + name
        saved[names[name]] = plain if isinstance(plain, torch.Tensor) else torch.from_numpy(plain)
    saved[TREE_ENTRY] = json.dumps({"tree": flat.json, "names": names, "metadata": metadata, "step": step})
    try:
        with _one_process():
            save(saved, storage_writer=FileSystemWriter(folder), no_dist=True)
    except CheckpointException as why:
        raise _cause(why) from None


def _memory(tensor: torch.Tensor) -> Any:
    """What two tensors have in common that are tied."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)


@contextmanager
def _one_process() -> Iterator[None]:
    """torch remarks that there is no process group, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
