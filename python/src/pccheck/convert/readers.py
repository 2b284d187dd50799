"""What a checkpoint of any kind holds: a tree of values and tensors, read without executing anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import dtypes, errors, trees
from ..checkpoint import Checkpoint
from ..store import Store
from .kinds import Kind
from .progress import Progress

__all__ = ["STEP_KEY", "Found", "opened"]

#: metadata key of a safetensors file that was made here: the trainer's step
STEP_KEY = "step"


@dataclass
class Found:
    """A checkpoint that is being converted."""

    step: int
    #: texts beside the state, without the tree
    metadata: dict[str, str] = field(default_factory=dict)
    #: the open checkpoint of a region
    checkpoint: Checkpoint | None = None
    #: its state, where it is not in a region
    loaded: Any = None
    #: what the caller should know
    notes: list[str] = field(default_factory=list)

    @cached_property
    def state(self) -> Any:
        """The whole tree; of a region, it is read now."""
        if self.checkpoint is None:
            return self.loaded
        from ..torch.states import read_state

        return read_state(self.checkpoint)

    @cached_property
    def flat(self) -> trees.Flat:
        """The tree taken apart; tensors contiguous and in host memory."""
        from ..torch.states import host_tensors

        flat = trees.flatten(self.state)
        return trees.Flat(flat.json, host_tensors(flat.tensors))

    @property
    def tensor_count(self) -> int:
        """Tensors, tied ones included."""
        return len(self.flat.tensors if self.checkpoint is None else self.checkpoint.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors, tied ones counted once."""
        if self.checkpoint is not None:
            return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values() if tensor.tied_to is None)
        sizes = {}
        for name, tensor in self.flat.tensors.items():
            address = tensor.ctypes.data if hasattr(tensor, "ctypes") else tensor.data_ptr()
            sizes[address or name] = tensor.nbytes
        return sum(sizes.values())


@contextmanager
def opened(
    source: Path, kind: Kind, *, step: int | None, generation: int | None, progress: Progress
) -> Iterator[Found]:
    """The checkpoint at ``source``, for as long as the block lasts."""
    if kind is Kind.REGION:
        chosen = {"step": step} if generation is None else {"generation": generation}
        with Store(source, read_only=True, durability="process") as store, store.open(**chosen) as checkpoint:
            if step is not None and checkpoint.step != step:
                text = f"generation {generation} of {source} is of step {checkpoint.step}, not {step}"
                raise errors.NotFound(text, path=str(source))
            yield _of_region(checkpoint)
    elif kind is Kind.REFERENCE:
        from ..torch.paths import opened_reference

        with opened_reference(source) as checkpoint:
            yield _of_region(checkpoint)
    else:
        state, metadata, noted = {
            Kind.TORCH: _read_torch,
            Kind.SAFETENSORS: _read_safetensors,
            Kind.DCP: _read_dcp,
        }[kind](source)
        yield Found(step=step if step is not None else noted or _step_in(state), metadata=metadata, loaded=state)


def _of_region(checkpoint: Checkpoint) -> Found:
    from ..torch.restoring import TREE_KEY
    from ..torch.retention import TRAINER_KEY

    metadata = {key: value for key, value in checkpoint.metadata.items() if key != TREE_KEY}
    notes = [f"passed over: {line}" for line in checkpoint.rejected.splitlines()]
    try:
        sharded = list(json.loads(metadata.get(TRAINER_KEY, "{}")).get("shardings", {}))
    except (ValueError, AttributeError):
        sharded = []
    if sharded:
        notes.append(f"{len(sharded)} tensors, such as {sharded[0]}, are the parts of one rank of a sharded state")
    return Found(step=checkpoint.step, metadata=metadata, checkpoint=checkpoint, notes=notes)


_Read = tuple[Any, dict[str, str], int]


def _step_in(state: Any) -> int:
    """The step as Lightning, DeepSpeed and many scripts note it."""
    for key in ("global_step", "global_steps", "step") if isinstance(state, dict) else ():
        value = state.get(key)
        if type(value) is int and 0 <= value < 2**64:
            return value
    return 0


def _read_torch(source: Path) -> _Read:
    from . import torch_files

    return torch_files.read(source), {}, 0


def _read_safetensors(source: Path) -> _Read:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise errors.Unsupported(
            "reading .safetensors needs the package safetensors", advice="pip install safetensors"
        ) from None
    from ..torch.restoring import TREE_KEY

    try:
        with safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as why:
        raise errors.Corrupt(f"{source} is no intact safetensors file: {_first_line(why)}", path=str(source)) from None
    metadata = _undo_payload_rules(source, tensors, metadata)
    text = metadata.pop(TREE_KEY, None)
    state: Any = tensors
    if text is not None:
        state = trees.unflatten(text, lambda name, kind: _of_kind(source, tensors, name, kind))
    step = metadata.pop(STEP_KEY, "")
    return state, metadata, int(step) if step.isdecimal() else 0


def _undo_payload_rules(source: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """Tied and complex tensors as they were before docs/format.md's rules made safetensors of them."""
    import torch

    own = {key: metadata.pop(key) for key in list(metadata) if key.startswith("pccheck.")}
    try:
        for name in json.loads(own.get("pccheck.complex128", "[]")):
            tensors[name] = torch.view_as_complex(tensors[name])
        for name, tied in json.loads(own.get("pccheck.tied", "{}")).items():
            of = tensors[tied["of"]].reshape(-1)
            tensors[name] = of.view(dtypes.to_torch(tied["dtype"])).view(tied["shape"])
        holder = own.get("pccheck.metadata_tensor")
        if holder is not None:
            metadata = {**metadata, **json.loads(tensors.pop(holder).numpy().tobytes())}
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as why:
        raise errors.Corrupt(f"the metadata of {source} does not fit its tensors: {why!r}", path=str(source)) from None
    return metadata


def _of_kind(source: Path, tensors: dict[str, Any], name: str, kind: str) -> Any:
    if name not in tensors:
        raise errors.Corrupt(f"the tree in {source} names a tensor {name!r} that it lacks", path=str(source))
    from ..torch.states import as_kind

    return as_kind(tensors[name], kind)


def _read_dcp(source: Path) -> _Read:
    from . import dcp_folders

    return dcp_folders.read(source)


def _first_line(why: BaseException) -> str:
    return (str(why) or repr(why)).strip().splitlines()[0]
