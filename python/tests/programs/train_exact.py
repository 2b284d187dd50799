"""Trains a small model with everything that a resumed run may get wrong, and prints every loss exactly.

Arguments: optimizer, steps, path of the region (None: train without checkpoints), n (saves in flight), rng (whether
generators are saved).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from pccheck.torch import Checkpointer


class Net(nn.Module):
    """Convolution, both BatchNorms, dropout, and one wide layer that makes the state large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(512, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


# name -> width of the model and its optimizers; states take 20 to 30 MB
def build(name: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(1)
    width = {"sgd": 5000, "lbfgs": 600, "muon": 1000}.get(name, 3400)
    model = Net(width)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    optim = torch.optim
    made: dict[str, Any] = {
        "sgd": lambda: [optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)],
        "adam": lambda: [optim.Adam(parameters, lr=1e-3, amsgrad=False)],
        "adamw": lambda: [optim.AdamW(parameters, lr=1e-3)],
        "adamw-foreach": lambda: [optim.AdamW(parameters, lr=1e-3, foreach=True, amsgrad=True)],
        "adamw-fused": lambda: [optim.AdamW(parameters, lr=1e-3, fused=True)],
        "adamw-tensor-lr": lambda: [optim.AdamW(parameters, lr=torch.tensor(1e-3), fused=True)],
        "sgd-fused": lambda: [optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)],
        "muon": lambda: [optim.Muon(matrices, lr=1e-3), optim.AdamW(others, lr=1e-3)],
        "lbfgs": lambda: [optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe")],
    }
    if name == "adamw-channels-last":
        model = model.to(memory_format=torch.channels_last)
        return model, [optim.AdamW(model.parameters(), lr=1e-3, fused=True)]
    return model, made[name]()


def digest(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> str:
    """Of every byte of model and optimizer state."""
    found = hashlib.sha256()
    states = [model.state_dict(), *(o.state_dict() for o in optimizers)]

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            found.update(repr(value).encode())

    for state in states:
        add(state)
    return found.hexdigest()


def main(optimizer: str, steps: int, path: str | None, n: int, rng: bool = True) -> None:
    torch.set_num_threads(1)
    model, optimizers = build(optimizer)
    cycles: Any = {"total_steps": steps + 1, "cycle_momentum": optimizer != "lbfgs"}
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.01, **cycles) for o in optimizers]
    random.seed(2)
    np.random.seed(3)
    first, ckpt = 0, None
    if path is not None:
        members: Any = {"model": model, "optimizer": optimizers, "scheduler": schedulers}
        ckpt = Checkpointer(path, max_in_flight=n, staging_bytes=12 << 20, chunk_bytes=1 << 20, rng=rng, **members)
        last = ckpt.restore()
        print(f"restored {last}", flush=True)
        first = 0 if last is None else last + 1

    for i in range(first, steps):
        # Each of the three generators has a part in the loss.
        x = torch.randn(4, 2, 8, 8) * (1 + random.random()) + float(np.random.rand())
        target = torch.randint(0, 10, (4,))

        def closure(x: torch.Tensor = x, target: torch.Tensor = target) -> torch.Tensor:
            for o in optimizers:
                o.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if optimizer == "lbfgs":
            closing: Any = optimizers[0]
            loss = closing.step(closure)
        else:
            loss = closure()
            for o in optimizers:
                o.step()
        for scheduler in schedulers:
            scheduler.step()
        in_flight = 0
        if ckpt is not None:
            assert ckpt.step(i) is not None
            in_flight = ckpt.store.stats().in_flight
        print(f"step {i} {loss.item().hex()} {in_flight}", flush=True)
    if ckpt is not None:
        ckpt.close()
        assert ckpt.failures == 0, ckpt.last_error
    print(f"final {digest(model, optimizers)}", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
