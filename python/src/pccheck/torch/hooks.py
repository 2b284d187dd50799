"""torch's optimizer hooks: being told just before any optimizer updates, and knowing of gradients not yet used."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .planning import local_part

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

        own_process = os.getpid()

        def pre(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = alive()
            # In a forked child the saves are the parent's, and their locks may be held by threads that are not there.
            if found is not None and os.getpid() == own_process:
                before(found)

        def post(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = alive()
            if found is not None and os.getpid() == own_process:
                after(found, optimizer)

        # Compiled steps call the hooks as they are: traced, they would be part of the graph.
        disable: Any = torch.compiler.disable
        self._handles = [
            register_optimizer_step_pre_hook(disable(pre)),
            register_optimizer_step_post_hook(disable(post)),
        ]
        weakref.finalize(owner, self.remove)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class GradientWatch:
    """Tells whether gradients were accumulated since the last update.

    Of several optimizers any update counts: a GAN's generator leaves gradients in the discriminator that nobody uses.

    Args:
        optimizers: those that are saved. Where there are none, all that make an update are watched.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._optimizers = weakref.WeakSet(optimizers)
        self._learns = not self._optimizers
        #: parameter, its gradient when it was last used, version counter of that
        self._used: list[tuple[torch.Tensor, weakref.ref[torch.Tensor] | None, int]] = []
        self.forget()

    def updated(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has just used the gradients of its parameters."""
        if self._learns:
            self._optimizers.add(optimizer)
        # Wrapped optimizers are not the ones that update: what counts are the parameters.
        updated = {id(parameter) for parameter in _parameters(optimizer)}
        if self._learns or any(id(parameter) in updated for parameter, _, _ in self._used):
            self.forget()

    def accumulating(self) -> bool:
        """True where some gradient is neither used nor zero. A skipped update (inf or nan) counts as used."""
        unused = any(
            gradient is not None
            and not (used is not None and gradient is used() and gradient._version == version)
            and bool(_values(gradient).any())
            for parameter, used, version in self._used
            for gradient in (parameter.grad,)
        )
        return unused and all(
            bool(torch.isfinite(_values(parameter.grad)).all())
            for optimizer in self._optimizers
            for parameter in _parameters(optimizer)
            if parameter.grad is not None
        )

    def forget(self) -> None:
        """The gradients that there are now count as used: after an update, and after a restore."""
        self._used = []
        for optimizer in self._optimizers:
            parameters = [p for p in _parameters(optimizer) if p.requires_grad]
            for p in parameters[:: max(1, len(parameters) // _SAMPLES)]:
                self._used.append((p, None, 0) if p.grad is None else (p, weakref.ref(p.grad), p.grad._version))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    groups: Iterable[Any] = optimizer.param_groups
    return (parameter for group in groups for parameter in group["params"])


def _values(gradient: torch.Tensor) -> torch.Tensor:
    local = local_part(gradient).detach()
    return local.coalesce().values() if local.is_sparse else local
