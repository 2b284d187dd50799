"""One arm in a process of its own: trains without saves, then with, and writes what it measured as JSON.

Started by training.py as `worker.py SETTINGS RESULT`, both paths of JSON files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, Training
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
from data import Corpus, Sampler  # noqa: E402
from measuring import procfs  # noqa: E402
from model import GPT, SIZES  # noqa: E402

WARM_UP_ITERATIONS = 4
SETTLE_ITERATIONS = 2
#: of which one saves: long enough for it to become durable
FIRST_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one arm in one round."""

    arm: str
    #: iterations per save; 0 where the arm saves nothing
    every: int
    folder: str
    size: str
    batch: int
    #: measured without saves, and again with
    iterations: int
    threads: int
    seed: int


@dataclasses.dataclass
class Iteration:
    """Seconds of the trainer's thread."""

    #: all of it
    total: float
    #: waiting, just before the update, for what is still being copied
    wait: float
    #: in the call that saves
    call: float


@dataclasses.dataclass
class Phase:
    """Some iterations in a row. Times are of time.monotonic(), which all processes share."""

    name: str
    began: float
    ended: float
    iterations: list[Iteration]
    cpu_seconds: float
    #: of the whole machine
    system_busy_seconds: float
    system_tasks_started: int
    threads: int
    processes: int
    #: highest resident memory of the process until the phase's end
    peak_bytes: int


class Trainer:
    """The training loop, in phases."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        size = dataclasses.replace(SIZES[settings.size], batch=settings.batch)
        self._sampler = Sampler(Corpus(), batch=size.batch, context=size.context, seed=settings.seed)
        self._model = GPT(size)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-4, fused=True)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, T_max=100_000)
        self._update_began = 0.0
        self._waited = 0.0
        # Around the hooks of the arm, so that what they take can be told from the update itself. Global hooks are
        # called before an optimizer's own, each kind in the order of registration.
        register_optimizer_step_pre_hook(self._before_waiting)
        began = time.monotonic()
        every = max(settings.every, 1)
        folder = Path(settings.folder)
        self.arm: Arm = ARMS[settings.arm](
            Training(folder, self._model, self._optimizer, self._scheduler, self._sampler, every)
        )
        self.setup_seconds = time.monotonic() - began
        self._optimizer.register_step_pre_hook(self._after_waiting)
        self._step = 0

    def _before_waiting(self, *_: Any) -> None:
        self._update_began = time.monotonic()

    def _after_waiting(self, *_: Any) -> None:
        self._waited = time.monotonic() - self._update_began

    def run(self, name: str, count: int, *, saving: int = 0) -> Phase:
        """Trains `count` iterations; the arm is told of the first `saving` ones, and saves where one is due."""
        pid = os.getpid()
        iterations: list[Iteration] = []
        cpu, system, began = procfs.cpu_seconds(pid), procfs.system(), time.monotonic()
        for index in range(count):
            start = time.monotonic()
            inputs, targets = self._sampler.next_batch()
            loss = self._model(inputs, targets)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._scheduler.step()
            called = time.monotonic()
            if index < saving:
                self.arm.step(self._step)
                self._step += 1
            now = time.monotonic()
            iterations.append(Iteration(now - start, self._waited, now - called))
        ended, system_after = time.monotonic(), procfs.system()
        return Phase(
            name,
            began,
            ended,
            iterations,
            procfs.cpu_seconds(pid) - cpu,
            system_after.busy_seconds - system.busy_seconds,
            system_after.tasks_started - system.tasks_started,
            len(procfs.threads(pid)),
            len(procfs.children(pid)),
            procfs.memory().peak,
        )

    def state_bytes(self) -> int:
        """Of parameters and optimizer state."""
        moments = [
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self._model.parameters(), *moments])


def measure(settings: Settings) -> dict[str, Any]:
    """Runs all phases of one arm."""
    torch.set_num_threads(settings.threads)
    trainer = Trainer(settings)
    trainer.run("warm-up", WARM_UP_ITERATIONS)
    phases = [trainer.run("without", settings.iterations), trainer.run("first", FIRST_ITERATIONS, saving=1)]
    # So that what is measured begins, as it ends, with saves in flight.
    trainer.run("settle", SETTLE_ITERATIONS, saving=SETTLE_ITERATIONS)
    phases.append(trainer.run("with", settings.iterations, saving=settings.iterations))
    pool = trainer.arm.pool_bytes()
    began = time.monotonic()
    trainer.arm.close()
    return {
        "settings": dataclasses.asdict(settings),
        "state_bytes": trainer.state_bytes(),
        "pool_bytes": pool,
        "setup_seconds": trainer.setup_seconds,
        "close_seconds": time.monotonic() - began,
        "phases": {phase.name: dataclasses.asdict(phase) for phase in phases},
        "saves": [dataclasses.asdict(save) for save in trainer.arm.saves],
    }


if __name__ == "__main__":
    result = measure(Settings(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(result))
