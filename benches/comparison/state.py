"""The state that is saved: float32 tensors of a transformer's shapes, every chunk of which changes between saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

LAYERS_PER_GB = 12
#: floats that are drawn at random; tensors repeat them, each with an offset of its own
DRAWN = 4 << 20
#: between the values of one tensor and of the next; no multiple is the 1.0 of a change, so that nothing comes twice
OFFSET = 0.6180339887


def shapes(state_bytes: int) -> dict[str, tuple[int, ...]]:
    """Per GB 12 layers of 4 matrices and 2 vectors, and an embedding that takes what is left of `state_bytes`."""
    floats = state_bytes // 4
    layers = LAYERS_PER_GB * max(1, round(state_bytes / 1e9))
    # A layer takes 12 width^2 + 13 width.
    width = int(((169 + 48 * floats / layers) ** 0.5 - 13) / 24)
    if width >= 128:
        width -= width % 64
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        prefix = f"layers.{layer}"
        found[f"{prefix}.attention.qkv"] = (3 * width, width)
        found[f"{prefix}.attention.out"] = (width, width)
        found[f"{prefix}.mlp.up"] = (4 * width, width)
        found[f"{prefix}.mlp.down"] = (width, 4 * width)
        found[f"{prefix}.norms"] = (4, width)
        found[f"{prefix}.biases"] = (9 * width,)
    used = sum(int(np.prod(shape)) for shape in found.values())
    if width < 1 or used >= floats:
        raise ValueError(f"expected a state of more than {4 * max(used, 25 * layers)} bytes, found {state_bytes}")
    found["embedding"] = (floats - used,)
    return found


class State:
    """Named tensors, in whatever kind of array a system takes."""

    #: true where arrays cannot change, so that a system may keep them instead of copying
    immutable = False

    def __init__(self, state_bytes: int, seed: int) -> None:
        self.tensors: dict[str, Any] = {}
        self.fill(state_bytes, seed)

    def fill(self, state_bytes: int, seed: int) -> None:
        """The same values for the same arguments."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())

    def change(self) -> None:
        """What a training step does: every element gets another value."""
        raise NotImplementedError

    def target(self) -> dict[str, Any]:
        """Memory to restore into, of the same names and shapes, touched."""
        raise NotImplementedError

    def differing(self, restored: Mapping[str, Any]) -> int:
        """How many of these tensors are not, bit for bit, in what was restored."""
        raise NotImplementedError


class TorchState(State):
    """CPU tensors of torch."""

    def fill(self, state_bytes: int, seed: int) -> None:
        drawn = torch.from_numpy(np.random.Generator(np.random.SFC64(seed)).random(DRAWN, dtype=np.float32))
        for index, (name, shape) in enumerate(shapes(state_bytes).items()):
            tensor = torch.empty(shape, dtype=torch.float32)
            for piece in torch.split(tensor.view(-1), DRAWN):
                torch.add(drawn[: len(piece)], index * OFFSET, out=piece)
            self.tensors[name] = tensor

    def change(self) -> None:
        for tensor in self.tensors.values():
            tensor.add_(1.0)

    def target(self) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(tensor, -1.0) for name, tensor in self.tensors.items()}

    def differing(self, restored: Mapping[str, Any]) -> int:
        return sum(
            name not in restored or not torch.equal(tensor.view(torch.int32), restored[name].view(torch.int32))
            for name, tensor in self.tensors.items()
        )
