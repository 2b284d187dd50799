"""How large a state will be, before it is complete: optimizers make most of theirs in the first step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch

from .. import dtypes, errors, trees
from .members import Member, OptimizerMember
from .planning import local_part

__all__ = ["estimate", "region_path"]

# Headers and the tree's text, per tensor.
_BYTES_PER_TENSOR = 512


def region_path(path: str | os.PathLike[str]) -> str:
    """``path`` with ``{rank}`` replaced by the rank of this process."""
    text = os.fspath(path)
    if "{rank}" not in text:
        return text
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Before the group is there, what launchers set says the rank.
    rank = torch.distributed.get_rank() if distributed else int(os.environ.get("RANK", "0"))
    return text.replace("{rank}", str(rank))


def estimate(members: Iterable[Member], gradients: bool) -> int:
    """Payload bytes of the complete state. Where it is too low, the region grows at the first save.

    Raises:
        UnsupportedValue: the state holds something that cannot be represented; names where.
    """
    total = 0
    for member in members:
        count, nbytes = _sizes_of({member.name: member.state()})
        total += nbytes + count * _BYTES_PER_TENSOR
        if isinstance(member, OptimizerMember):
            total += _to_come(member.target)
        if gradients and isinstance(member.target, torch.nn.Module):
            total += sum(p.nbytes for p in member.target.parameters() if p.requires_grad)
    return total


def _to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the optimizer has not made yet, judged by its hyperparameters."""
    total = 0
    for group in optimizer.param_groups:
        copies = _copies_per_parameter(group)
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                # A step counter and its names beside the copies.
                total += copies * parameter.nbytes + (copies + 1) * _BYTES_PER_TENSOR
    return total


def _copies_per_parameter(group: dict[str, object]) -> int:
    if "betas" in group:
        return 3 if group.get("amsgrad") else 2
    if "history_size" in group:
        history = group["history_size"]
        return 2 * history + 4 if isinstance(history, int) else 2
    if "momentum" in group:
        return (1 if group["momentum"] else 0) + (2 if "centered" in group else 0)
    return 2


def _sizes_of(tree: Any) -> tuple[int, int]:
    """Number of leaves of a tree and their bytes, tied tensors counted once."""
    flat = trees.flatten(tree, is_tensor=lambda value: isinstance(value, torch.Tensor))
    sizes: dict[Any, int] = {}
    for name, value in flat.tensors.items():
        key: Any = name
        if isinstance(value, torch.Tensor):
            _check_kind(name, value)
            value = local_part(value)
            if value.nbytes and not value.is_meta:
                key = (value.data_ptr(), value.nbytes)
        _check_dtype(name, value)
        sizes[key] = value.nbytes
    return len(flat.tensors), sum(sizes.values()) + len(flat.json.encode())


def _check_kind(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise errors.UnsupportedValue(
            f"a tensor of {tensor.dtype} and layout {tensor.layout} cannot be stored; save its plain parts", at=name
        )


def _check_dtype(name: str, array: Any) -> None:
    numpy = sys.modules.get("numpy")
    try:
        if numpy is not None and isinstance(array, numpy.ndarray):
            dtypes.from_numpy(array.dtype)
        else:
            dtypes.from_torch(array.dtype)
    except errors.InvalidArgument as why:
        raise errors.UnsupportedValue(why.message, at=name) from None
