"""How long a trainer's thread is in the call that begins a save of many small tensors.

    python begin.py                       # 12 layers: 594 tensors with Adam's moments and step counters
    python begin.py --layers 48 --json
    python begin.py --device cuda --region /dev/shm/begin.pccheck

Medians of ``--saves`` calls, each begun after the one before was durable; beside them what torch's own
``state_dict()`` of model and optimizer takes, which any checkpoint needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pccheck
from pccheck.torch import Checkpointer

WIDTH = 32


class Layer(nn.Module):
    """The parameters of a GPT's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wider, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


def timed(call: Callable[[int], Any], settle: Callable[[], None], step: int) -> float:
    """Milliseconds. What it began is settled and durable when this returns."""
    began = time.perf_counter()
    result = call(step)
    taken = time.perf_counter() - began
    settle()
    if isinstance(result, pccheck.Save):
        result.durable()
    return 1e3 * taken


def measure(region: Path, layers: int, saves: int, device: str) -> dict[str, Any]:
    model = nn.Sequential(*(Layer() for _ in range(layers)), nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    named = {f"model.{name}": value for name, value in model.state_dict().items()}
    for at, state in optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{at}.{name}": value for name, value in state.items()}
    with Checkpointer(region, model=model, optimizer=optimizer, durability="process") as checkpointer:
        calls: dict[str, Callable[[int], Any]] = {
            "state_dict": lambda _: (model.state_dict(), optimizer.state_dict()),
            "Store.save": lambda step: checkpointer.store.save(step, named),
            "Checkpointer.save": checkpointer.save,
        }
        taken = {
            name: [timed(call, checkpointer.before_update, step) for step in range(saves + 5)][5:]
            for name, call in calls.items()
        }
    return {"version": pccheck.__version__, "device": device, "tensors": len(named), "milliseconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the model (default 12)")
    parser.add_argument("--saves", type=int, default=50, help="how many saves (default 50)")
    parser.add_argument("--device", default="cpu", help="where the state is (default cpu)")
    parser.add_argument("--region", type=Path, help="a region to be made (default: in a temporary folder)")
    parser.add_argument("--json", action="store_true", help="all times, for machines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.region or Path(folder) / "region.pccheck", args.layers, args.saves, args.device)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['tensors']} tensors on {found['device']}; milliseconds: median (least..greatest)")
    for name, times in found["milliseconds"].items():
        print(f"{name:18} {statistics.median(times):6.2f} ({min(times):.2f}..{max(times):.2f})")


if __name__ == "__main__":
    main()
