"""Small checkpointers, and the measure of whether a state came back: for the tests of states."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pccheck.torch

MIB = 1 << 20

#: options that keep tests quick
SMALL: dict[str, Any] = {
    "staging_bytes": 16 * MIB,
    "chunk_bytes": MIB,
    "durability": "process",
    "medium": "mmap",
    "on_sigterm": False,
}


def checkpointer(path: Path | str, **options: Any) -> pccheck.torch.Checkpointer:
    return pccheck.torch.Checkpointer(path, **(SMALL | options))


def save_once(path: Path, step: int = 1, **members: Any) -> None:
    """A region with one checkpoint of these members (and options)."""
    with checkpointer(path, **members) as made:
        made.step(step)
        made.wait(60)
        assert made.failures == 0, made.last_error


def restored(path: Path, **members: Any) -> int | None:
    with checkpointer(path, **members) as made:
        return made.restore()


def steps(made: pccheck.torch.Checkpointer) -> list[int]:
    return [info.step for info in made.checkpoints()]


def pins(made: pccheck.torch.Checkpointer) -> list[int]:
    """The steps of pinned checkpoints, in their order."""
    return sorted(info.step for info in made.checkpoints() if info.pinned)


def content(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def same(a: Any, b: Any) -> bool:
    """Equal in type, dtype, shape, order and bits, all the way down."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and content(a) == content(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and repr(a) == repr(b)


def bits_of(*things: Any) -> list[tuple[str, int, bytes]]:
    """Names, addresses and bytes of all tensors in the state dicts of these: what must not change."""
    found: list[tuple[str, int, bytes]] = []

    def walk(where: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((where, value.data_ptr(), content(value)))
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{where}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                walk(f"{where}.{index}", part)
        else:
            found.append((where, 0, repr(value).encode()))

    for index, thing in enumerate(things):
        walk(str(index), thing.state_dict() if hasattr(thing, "state_dict") else thing)
    return found


class Holder:
    """Anything with a state dict."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> float:
    """One iteration; its loss."""
    optimizer.zero_grad()
    loss = model(inputs).float().square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def run_python(program: str, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    """Runs a program in another Python process, which must succeed; returns what it printed."""
    command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def can_mount() -> bool:
    """Whether this process may mount file systems of its own."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False
