"""A training loop that ends in one of many ways with a save in flight. It never closes its checkpointer.

Arguments: path of the region, how (name of the ending), exit_timeout, width of the model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pccheck.torch import Checkpointer
from pccheck.torch.snapshot import Snapshot


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((4,), float(i))


def own_handler(number: int, frame: Any) -> None:
    # What it finds is what a restart would find.
    print("own handler after", CKPT.checkpoints()[0].step if CKPT.checkpoints() else None, flush=True)
    sys.exit(7)


def interrupted(snapshot: Snapshot, changed: Any = Snapshot.changed) -> Any:
    """The check of a snapshot, in the middle of which the signal comes. The settling thread may do it instead."""
    if threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), signal.SIGTERM)
    return changed(snapshot)


def fork_and_exit(how: str) -> int:
    """A child that ends like a program of its own, its interpreter's exit included. Returns its status."""
    child = os.fork()
    if child == 0:
        # Updates of its own are none of the parent's business.
        optimizer.step()
        if how == "fork-sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


arguments = json.loads(sys.argv[1])
how = arguments["how"]
if how.startswith("own-handler"):
    signal.signal(signal.SIGTERM, own_handler)
if how == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
WIDTH = arguments.get("width", 500)
model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(2, WIDTH)).sum().backward()
optimizer.step()


def checkpointer(path: str) -> Checkpointer:
    pool: Any = {"chunk_bytes": 256 << 10, "staging_bytes": 2 << 20}
    timeout = arguments.get("exit_timeout", 50.0)
    return Checkpointer(path, model=model, optimizer=optimizer, exit_timeout=timeout, max_in_flight=3, **pool)


CKPT = checkpointer(arguments["path"])
if how == "own-handler-again":
    # Ours calls this one; a second checkpointer puts itself before it again, and each does its part once.
    ours = signal.getsignal(signal.SIGTERM)

    def chained(number: int, frame: Any) -> None:
        print("chained", flush=True)
        ours(number, frame)  # type: ignore[operator, misc]

    signal.signal(signal.SIGTERM, chained)
    other = checkpointer(arguments["path"] + "2")
    other.step(2)
if how == "replaced":
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(9))
    other = checkpointer(arguments["path"] + "2")
    other.step(2)
save = CKPT.step(1)
assert save is not None
print("in flight", save.progress().ended, flush=True)

if how == "end":
    pass
elif how == "sys.exit":
    sys.exit(5)
elif how == "exception":
    raise RuntimeError("a defect of the training script")
elif how == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
elif how in ("sigterm", "own-handler", "own-handler-again", "replaced", "ignored"):
    os.kill(os.getpid(), signal.SIGTERM)
    print("went on", flush=True)
elif how == "sigterm-while-closing":
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
    CKPT.close()
    time.sleep(60)
elif how in ("sigterm-anywhere", "sigterm-in-settling"):
    if how == "sigterm-in-settling":
        Snapshot.changed = interrupted  # type: ignore[method-assign]
    for i in range(2, 10**9):
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        CKPT.step(i)
        print(f"begun {i}", flush=True)
elif how == "unfinished-worker":
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()
elif how.startswith("fork"):
    print("child", fork_and_exit(how), flush=True)
    save.durable(50)
    # Hooks, settling and exit are as before.
    optimizer.step()
    CKPT.step(2)
elif how == "workers":
    for epoch in range(2):
        for i, batch in enumerate(DataLoader(Numbers(), batch_size=2, num_workers=2, multiprocessing_context="fork")):
            assert batch.shape == (2, 4)
            optimizer.step()
            assert CKPT.step(10 * epoch + i) is not None
    CKPT.wait()
    assert CKPT.failures == 0
    print("newest", CKPT.checkpoints()[0].step, flush=True)
    CKPT.step(99)
else:
    raise AssertionError(how)
