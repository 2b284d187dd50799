"""What a checkpoint is made of: modules, optimizers, and other things with state, each saved and restored its own way.

A member gives its state as a tree of plain Python values and tensors; on restore it is given the saved tree, names the
memory that the stored tensors are to be read into, and takes the filled tree.
"""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from .. import errors
from .planning import Leaf, ReadPlan, describe, laid_out_as

__all__ = ["Member", "members_of"]

# Entries of an optimizer's parameter groups that others than the optimizer made: schedulers, and named parameters.
_ADDED_HYPERPARAMETERS = frozenset(
    ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "param_names")
)


_PLAIN, _DICTS = frozenset((torch.Tensor, torch.nn.Parameter)), frozenset((dict,))


class Member(ABC):
    """One named part of the state."""

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target

    @abstractmethod
    def state(self) -> Any:
        """The state as it is now; its tensors are the live ones."""

    def steady(self) -> Iterable[torch.Tensor]:
        """Tensors that change in the update alone: they may be copied while the next iteration runs."""
        return ()

    @abstractmethod
    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        """The saved tree with each leaf replaced by the tensor that it will be read into. Changes nothing."""

    @abstractmethod
    def load(self, filled: Any, plan: ReadPlan) -> None:
        """Takes the tree that :meth:`plan` returned, now filled."""


class ModuleMember(Member):
    target: torch.nn.Module

    def state(self) -> Any:
        return self.target.state_dict()

    def steady(self) -> Iterable[torch.Tensor]:
        return self.target.parameters()

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        if not isinstance(saved, Mapping):
            plan.mismatch(self.name, "a module here, something else in the checkpoint")
            return None
        live = self.target.state_dict()
        filled: OrderedDict[str, Any] = OrderedDict()
        if hasattr(saved, "_metadata"):
            # Versions of the modules, by which they convert what an older one saved.
            filled._metadata = saved._metadata  # type: ignore[attr-defined]
        for key, value in saved.items():
            where = f"{self.name}.{key}"
            if not plan.wanted(where):
                continue
            if key not in live:
                plan.unexpected.append(where)
            elif isinstance(value, Leaf) != isinstance(live[key], torch.Tensor):
                plan.mismatch(where, f"{describe(live[key])} here, {describe(value)} in the checkpoint")
            else:
                filled[key] = plan.fill(value, live[key], where)
        plan.missing += [f"{self.name}.{key}" for key in live if key not in saved and plan.wanted(f"{self.name}.{key}")]
        # Tensors on the meta device have no memory that would tell.
        for names in self._meta().values():
            stored = {leaf.info.tied_to or leaf.info.name for leaf in map(saved.get, names) if isinstance(leaf, Leaf)}
            if len(stored) > 1:
                plan.tied(f"{self.name}.{names[0]}", *sorted(stored)[:2])
        return filled

    def load(self, filled: Any, plan: ReadPlan) -> None:
        for tensor, names in self._meta().items():
            found = next((filled[name] for name in names if name in filled), None)
            if found is not None:
                _materialise(tensor, found)
        live = self.target.state_dict()
        # Those that the module's own hooks save under other names than it has them.
        on_meta = any(isinstance(live[key], torch.Tensor) and live[key].is_meta for key in filled)
        # Live tensors are filled already; this also runs the module's own hooks and sets what is no tensor. What is
        # missing or unexpected was reported, or allowed, by the plan.
        self.target.load_state_dict(filled, strict=False, assign=on_meta)

    def _meta(self) -> dict[torch.Tensor, list[str]]:
        """Parameters and buffers on the meta device, with all their names."""
        found: dict[torch.Tensor, list[str]] = {}
        parameters = self.target.named_parameters(remove_duplicate=False)
        for name, tensor in chain(parameters, self.target.named_buffers(remove_duplicate=False)):
            if tensor.is_meta:
                found.setdefault(tensor, []).append(name)
        return found


class OptimizerMember(Member):
    target: torch.optim.Optimizer

    def state(self) -> Any:
        return self.target.state_dict()

    def steady(self) -> Iterable[torch.Tensor]:
        # Hyperparameters may be tensors too (capturable optimizers), but schedulers change those.
        return _tensors(self.target.state, [])

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        if not isinstance(saved, Mapping) or "param_groups" not in saved or "state" not in saved:
            plan.mismatch(self.name, "an optimizer here, something else in the checkpoint")
            return None
        found = [len(group["params"]) for group in saved["param_groups"]]
        expected = [len(group["params"]) for group in self.target.param_groups]
        if found != expected:
            plan.mismatch(self.name, f"parameter groups of {expected} parameters here, of {found} in the checkpoint")
            return None
        if plan.strict:
            self._compare_kinds(saved["param_groups"], plan)
        live = self.target.state_dict()["state"]
        parameters = dict(enumerate(self._parameters()))
        state = {
            key: plan.fill(value, live.get(key), f"{self.name}.state.{key}", like=parameters.get(key))
            for key, value in saved["state"].items()
        }
        rest = {key: value for key, value in saved.items() if key != "state"}
        return {"state": state, **plan.fill(rest, None, self.name)}

    def _compare_kinds(self, saved_groups: list[dict[str, Any]], plan: ReadPlan) -> None:
        for index, (group, saved) in enumerate(zip(self.target.param_groups, saved_groups, strict=True)):
            missing = group.keys() - saved.keys() - _ADDED_HYPERPARAMETERS
            unexpected = saved.keys() - group.keys() - _ADDED_HYPERPARAMETERS
            # A version of torch may add some, or drop some; another kind of optimizer does both.
            if missing and unexpected:
                plan.mismatch(
                    f"{self.name}.param_groups.{index}",
                    f"another kind of optimizer: hyperparameters {sorted(missing)} here, {sorted(unexpected)} in the "
                    "checkpoint",
                )

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.target.param_groups for p in group["params"]]

    def load(self, filled: Any, plan: ReadPlan) -> None:
        self.target.load_state_dict(filled)
        # torch casts state to a floating-point parameter's dtype, which would round moments kept in a wider one.
        ids = [key for group in filled["param_groups"] for key in group["params"]]
        for key, parameter in zip(ids, self._parameters(), strict=True):
            values = filled["state"].get(key)
            if isinstance(values, Mapping):
                state = self.target.state[parameter]
                for name in values.keys() & state.keys():
                    value = _as_saved(state[name], values[name])
                    state[name] = laid_out_as(parameter, value) if isinstance(value, torch.Tensor) else value


class StatefulMember(Member):
    """Anything with ``state_dict`` and ``load_state_dict``: schedulers, scalers, loaders, samplers."""

    def state(self) -> Any:
        return self.target.state_dict()

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        return plan.fill(saved, None, self.name)

    def load(self, filled: Any, plan: ReadPlan) -> None:
        self.target.load_state_dict(filled)


class TensorMember(Member):
    target: torch.Tensor

    def state(self) -> Any:
        return self.target.detach()

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        if not isinstance(saved, Leaf):
            plan.mismatch(self.name, f"a tensor here, {describe(saved)} in the checkpoint")
            return None
        if self.target.is_meta:
            plan.mismatch(self.name, "a tensor on the meta device; materialise it first")
            return None
        return plan.fill(saved, self.target.detach(), self.name)

    def load(self, filled: Any, plan: ReadPlan) -> None:
        """It was filled in place."""


class PlainMember(Member):
    """A dict or list of plain values, tensors and arrays. It is restored in place, and so are its tensors, and its
    arrays of unchanged shape; containers inside it are replaced."""

    target: Any

    def state(self) -> Any:
        return self.target

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        if not isinstance(saved, (dict, list)) or isinstance(saved, dict) != isinstance(self.target, dict):
            plan.mismatch(self.name, f"{describe(self.target)} here, {describe(saved)} in the checkpoint")
            return None
        return plan.fill(saved, self.target, self.name)

    def load(self, filled: Any, plan: ReadPlan) -> None:
        if isinstance(self.target, dict):
            self.target.clear()
            self.target.update(filled)
        else:
            self.target[:] = filled


class GeneratorMember(Member):
    """A random-number generator of torch, numpy or Python."""

    def state(self) -> Any:
        if isinstance(self.target, torch.Generator):
            return self.target.get_state()
        if isinstance(self.target, random.Random):
            return self.target.getstate()
        if hasattr(self.target, "set_state"):
            return self.target.get_state(legacy=False)
        return self.target.bit_generator.state

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        return plan.fill(saved, None, self.name)

    def load(self, filled: Any, plan: ReadPlan) -> None:
        if isinstance(self.target, torch.Generator):
            self.target.set_state(filled)
        elif isinstance(self.target, random.Random):
            self.target.setstate(filled)
        elif hasattr(self.target, "set_state"):
            self.target.set_state(filled)
        else:
            self.target.bit_generator.state = filled


def members_of(named: Mapping[str, Any]) -> dict[str, Member]:
    """One member for each named thing; lists and dicts of stateful things count one by one, as ``name.key``.

    Raises:
        InvalidArgument: something has no state that could be saved and restored.
    """
    members: dict[str, Member] = {}
    for name, target in named.items():
        items = target.items() if isinstance(target, dict) else enumerate(target) if _is_sequence(target) else ()
        parts = list(items)
        if parts and all(_has_own_state(part) for _, part in parts):
            found = [item for key, part in parts for item in members_of({f"{name}.{key}": part}).items()]
        else:
            found = [(name, _member(name, target))]
        for full_name, member in found:
            if full_name in members:
                raise errors.InvalidArgument(f"two members are called {full_name!r}; rename one")
            members[full_name] = member
    return members


def _member(name: str, target: Any) -> Member:
    numpy = sys.modules.get("numpy")
    numpy_generator = numpy is not None and isinstance(target, (numpy.random.Generator, numpy.random.RandomState))
    if isinstance(target, torch.nn.Module):
        return ModuleMember(name, target)
    if isinstance(target, torch.optim.Optimizer):
        return OptimizerMember(name, target)
    if isinstance(target, (torch.Generator, random.Random)) or numpy_generator:
        return GeneratorMember(name, target)
    if isinstance(target, torch.Tensor):
        return TensorMember(name, target)
    if hasattr(target, "state_dict") and hasattr(target, "load_state_dict"):
        return StatefulMember(name, target)
    if type(target) in (dict, list):
        return PlainMember(name, target)
    raise errors.InvalidArgument(
        f"{name}={target!r}: a {type(target).__name__} has no state that can be restored in place; expected something "
        "with state_dict() and load_state_dict(), a dict, a list, a tensor, or a random-number generator"
    )


def _is_sequence(target: Any) -> bool:
    return isinstance(target, (list, tuple)) and not hasattr(target, "state_dict")


def _has_own_state(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _tensors(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """Adds the tensors in a value to ``found``."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (dict, Mapping)):
        parts = list(value.values())
        if _DICTS.issuperset(map(type, parts)):
            # As an optimizer's state is, with tensors by the hundreds.
            parts = list(chain.from_iterable(map(dict.values, parts)))
        if _PLAIN.issuperset(map(type, parts)):
            found += parts
        else:
            for part in parts:
                _tensors(part, found)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _tensors(part, found)
    return found


def _materialise(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    """Gives memory to a tensor on the meta device, which stays the object that optimizers and tied names refer to."""
    real = torch.Tensor._make_subclass(type(tensor), memory.detach(), tensor.requires_grad)
    real.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]


def _as_saved(loaded: Any, saved: Any) -> Any:
    """What torch loaded, on the device that it chose, with the dtypes and texts that were saved."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _as_saved(loaded.get(key), value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)(_as_saved(part, value) for part, value in zip(loaded, saved, strict=True))
    # torch takes a text apart like a list.
    return saved if isinstance(saved, str) else loaded
