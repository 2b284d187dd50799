"""Restoring a whole trainer: choosing the checkpoint, planning all reads, reading once, loading."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import errors, trees
from ..checkpoint import Checkpoint, CheckpointInfo
from ..store import Store
from .members import Member, ModuleMember, members_of
from .planning import Leaf, ReadPlan, laid_out_as
from .retention import TRAINER_KEY
from .rng import RNG
from .sizing import region_path

__all__ = ["GRADIENTS", "TREE_KEY", "Restored", "restore", "restore_newest"]

#: metadata key of the state's tree, see docs/trees.md
TREE_KEY = "tree"
# Of a store that only reads: four chunks for each of its readers, of which there are at most 16.
_STAGING_BYTES = 64 << 20
#: member that holds gradients, where they are saved
GRADIENTS = "gradients"

# So many checkpoints are tried: a region has at most 240 slots, and a live writer may overwrite what is being read.
_ATTEMPTS = 300


@dataclass(frozen=True)
class Restored:
    """What was restored."""

    step: int
    generation: int


def restore(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    generation: int | None = None,
    strict: bool = True,
    only: Sequence[str] = (),
    device: torch.device | str = "cpu",
    **members: Any,
) -> int | None:
    """Restores members from any region, also one that a trainer is writing, without saving to it: for evaluation and
    for starting from another run's weights.

    Arguments, result and errors are those of :meth:`Checkpointer.restore`; what the checkpoint holds beyond the
    members is left alone. The global random-number generators are not touched.
    """
    with Store(region_path(path), read_only=True, durability="process", staging_bytes=_STAGING_BYTES) as store:
        found = restore_newest(
            store,
            members_of(members),
            step=step,
            generation=generation,
            strict=strict,
            only=(only,) if isinstance(only, str) else tuple(only) or tuple(members),
            device=torch.device(device),
            gradients=None,
        )
    return None if found is None else found.step


def restore_newest(
    store: Store,
    members: Mapping[str, Member],
    *,
    step: int | None,
    generation: int | None,
    strict: bool,
    only: tuple[str, ...],
    device: torch.device,
    gradients: Mapping[str, torch.nn.Parameter] | None,
) -> Restored | None:
    """Restores from the newest checkpoint that fits the arguments and is intact; None where the region holds none."""
    unread: errors.PccheckError | None = None
    tried: set[int] = set()
    while (info := _newest(store, step, generation, tried)) is not None and len(tried) < _ATTEMPTS:
        tried.add(info.generation)
        try:
            with store.open(generation=info.generation, verify=False) as checkpoint:
                _restore(checkpoint, members, ReadPlan(device, strict, only), gradients)
        except (errors.NotFound, errors.Reclaimed) as why:
            # Overwritten since it was listed, by a writer that has made newer ones.
            unread = unread or why
        except errors.Corrupt as why:
            warnings.warn(f"the checkpoint of step {info.step} cannot be read, taking another one: {why}", stacklevel=3)
            unread = why
        else:
            return Restored(info.step, info.generation)
    if unread is not None:
        raise unread
    if step is not None or generation is not None:
        wanted = f"step {step}" if step is not None else f"generation {generation}"
        held = ", ".join(str(info.step) for info in store.checkpoints()) or "none"
        raise errors.NotFound(f"no checkpoint of {wanted}; the steps held are: {held}", path=store.path)
    return None


def _newest(store: Store, step: int | None, generation: int | None, tried: set[int]) -> CheckpointInfo | None:
    """The newest checkpoint that is asked for and was not tried; listed anew, as a live writer goes on meanwhile."""
    for info in store.checkpoints():
        asked = step in (None, info.step) and generation in (None, info.generation)
        if asked and info.generation not in tried:
            return info
    return None


def _restore(
    checkpoint: Checkpoint,
    members: Mapping[str, Member],
    plan: ReadPlan,
    gradients: Mapping[str, torch.nn.Parameter] | None,
) -> None:
    saved = _tree(checkpoint)
    wanted = {name: member for name, member in members.items() if _concerns(plan, name)}
    for name, member in wanted.items():
        if not plan.wanted(name) and not isinstance(member, ModuleMember):
            raise errors.InvalidArgument(
                f"only={list(plan.only)!r}: parts of {name}, which is no module, cannot be restored; name all of it"
            )
    plan.missing += [name for name in wanted if name not in saved]
    known = {*members, GRADIENTS, RNG}
    plan.unexpected += [name for name in saved if name not in known and plan.wanted(name)]
    filled = {name: member.plan(saved[name], plan) for name, member in wanted.items() if name in saved}
    if GRADIENTS in saved and gradients is None and saved[GRADIENTS] and plan.wanted(GRADIENTS):
        # Without them a run that was stopped amid accumulation would go on otherwise.
        plan.unexpected.append(f"{GRADIENTS} (restore with gradients=True)")
    if gradients is not None and GRADIENTS in saved and not plan.only:
        filled[GRADIENTS] = {
            name: plan.fill(value, None, f"{GRADIENTS}.{name}", like=gradients.get(name))
            for name, value in saved[GRADIENTS].items()
        }
    plan.raise_mismatches(checkpoint.path)
    plan.read(checkpoint)
    # Modules first: optimizers put their state where the parameters are. Generators last: loading may draw numbers.
    for name in sorted(filled, key=lambda name: (name == RNG, not isinstance(wanted.get(name), ModuleMember))):
        if name in wanted:
            wanted[name].load(filled[name], plan)
    if gradients is not None and GRADIENTS in filled:
        for name, parameter in gradients.items():
            # Without a saved one it had none then, whatever has been gathered since.
            gradient = filled[GRADIENTS].get(name)
            parameter.grad = None if gradient is None else laid_out_as(parameter, gradient.to(parameter.device))


def _concerns(plan: ReadPlan, member: str) -> bool:
    """A prefix may name a member, or a part of one."""
    return plan.wanted(member) or any(prefix.startswith(f"{member}.") for prefix in plan.only)


def _tree(checkpoint: Checkpoint) -> dict[str, Any]:
    text = checkpoint.metadata.get(TREE_KEY)
    if text is None:
        raise errors.StateMismatch(
            f"the checkpoint of step {checkpoint.step} was not made by a Checkpointer: it holds no tree",
            path=checkpoint.path,
            advice="read it with pccheck.Store, or convert it with python -m pccheck convert",
        )
    try:
        shardings = json.loads(checkpoint.metadata[TRAINER_KEY]).get("shardings", {})
    except (KeyError, ValueError, AttributeError):
        shardings = {}

    def leaf(name: str, kind: str) -> Leaf:
        if name not in checkpoint.tensors:
            raise errors.Corrupt(
                f"the tree names the tensor {name!r}, which the checkpoint lacks", path=checkpoint.path
            )
        return Leaf(checkpoint.tensors[name], kind, shardings.get(name))

    tree = trees.unflatten(text, leaf)
    if not isinstance(tree, dict):
        raise errors.Corrupt("the tree is no dict of members", path=checkpoint.path)
    return tree
