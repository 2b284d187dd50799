"""torch's optimizer hooks: being told just before any optimizer updates, and knowing of gradients not yet used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["GradientWatch", "UpdateHooks"]

# Gradients of so many parameters are looked at, evenly spread: a backward pass touches nearly all.
_SAMPLES = 8


class UpdateHooks:
    """Calls ``before`` ahead of every optimizer's step in this process, and ``after`` once it is done.

    The hooks are torch's global ones: they fire for every subclass of torch.optim.Optimizer, whichever way it is
    called (fused, foreach, by a GradScaler, with a closure, wrapped), and also for those made later.
    """

    def __init__(
        self,
        owner: Any,
        before: Callable[[Any], None],
        after: Callable[[Any, torch.optim.Optimizer], None],
    ) -> None:
        # The hooks must not keep the owner alive.
        alive = weakref.ref(owner)

        def pre(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = alive()
            if found is not None:
                before(found)

        def post(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = alive()
            if found is not None:
                after(found, optimizer)

        self._handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
        weakref.finalize(owner, self.remove)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class GradientWatch:
    """Tells whether gradients were accumulated since the last update."""

    def __init__(self) -> None:
        #: parameter -> (its gradient, version counter) when it was last used
        self._used: list[tuple[torch.Tensor, weakref.ref[torch.Tensor], int]] = []

    def updated(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has just used the gradients of its parameters."""
        with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        stride = max(1, len(with_gradient) // _SAMPLES)
        samples = with_gradient[::stride]
        own = {id(p) for p in samples}
        self._used = [entry for entry in self._used if id(entry[0]) not in own and not _in(optimizer, entry[0])]
        self._used += [(p, weakref.ref(p.grad), p.grad._version) for p in samples]

    def accumulating(self) -> bool:
        """True where some gradient is neither used nor zero. A skipped update (inf or nan) counts as used."""
        for parameter, used, version in self._used:
            gradient = parameter.grad
            if gradient is None or (gradient is used() and gradient._version == version):
                continue
            if bool(gradient.any()) and bool(torch.isfinite(gradient).all()):
                return True
        return False

    def forget(self) -> None:
        """After a restore: what was used before says nothing."""
        self._used = []


def _in(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    groups: Iterable[Any] = optimizer.param_groups
    return any(parameter is p for group in groups for p in group["params"])
