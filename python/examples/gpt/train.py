"""Trains a GPT on the sources of Python's standard library, saves after every step, and resumes bit for bit.

The lines that checkpoint are the four with `checkpointer` in `train()`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from data import Corpus, Sampler
from model import GPT, SIZES, parameter_count
from torch.optim.lr_scheduler import CosineAnnealingLR

import pccheck.torch

EXAMPLES = """examples:
  python train.py --size 38m --steps 200                       train; save after every step into gpt.pcc
  python train.py --size 38m --steps 200                       the same again: goes on from the newest checkpoint
  python train.py --size tiny --steps 50 --kill-at 20          kill itself (SIGKILL) right after step 20
  python train.py --size tiny --steps 50 --log losses.jsonl    resume, and write the exact losses
  python train.py --every 0                                    train without checkpoints

Steps are numbered from 0. For the same losses, resume with the same --size, --batch, --seed, --lr, --steps (the
learning rate falls until there) and --threads (sums are ordered by thread).
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="38m", help="of the model (default: %(default)s)")
    add("--steps", type=int, default=100, metavar="N", help="steps in all (default: %(default)s)")
    add("--every", type=int, default=1, metavar="K", help="save every K steps; 0: never (default: %(default)s)")
    add("--region", type=Path, default=Path("gpt.pcc"), metavar="PATH", help="(default: %(default)s)")
    add("--max-in-flight", type=int, default=2, metavar="N", help="saves at once (default: %(default)s)")
    add("--batch", type=int, metavar="B", help="windows of text per step (default: depends on the size)")
    add("--lr", type=float, default=6e-4, help="highest learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, dropout and data order (default: %(default)s)")
    add("--text", type=Path, metavar="FOLDER", help="train on FOLDER/*.py (default: Python's library)")
    add("--log", type=Path, metavar="FILE", help="append a JSON line per step, the loss as float.hex()")
    add("--kill-at", type=int, metavar="N", help="SIGKILL itself right after step N")
    add("--threads", type=int, metavar="T", help="of torch (default: torch's own choice)")
    add("--quiet", action="store_true", help="no progress line")
    return parser.parse_args(arguments)


def progress(steps: int, start: int, quiet: bool) -> Callable[[int, float], None]:
    """A progress line: tqdm's where it is installed, else one line every ten steps."""
    if quiet:
        return lambda step, loss: None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return lambda step, loss: print(f"step {step}/{steps}  loss {loss:.4f}") if step % 10 == 0 else None
    bar = tqdm(total=steps, initial=start, unit="step")

    def show(step: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        bar.update()

    return show


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    size = SIZES[options.size]
    if options.batch is not None:
        size = dataclasses.replace(size, batch=options.batch)
    corpus = Corpus(options.text)
    sampler = Sampler(corpus, batch=size.batch, context=size.context, seed=options.seed)
    model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1, fused=True)
    scheduler = CosineAnnealingLR(optimizer, T_max=options.steps, eta_min=options.lr / 10)

    start, checkpointer = 0, None
    if options.every:
        checkpointer = pccheck.torch.Checkpointer(
            options.region,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            data=sampler,
            every=options.every,
            max_in_flight=options.max_in_flight,
        )
        newest = checkpointer.restore()
        start = 0 if newest is None else newest + 1
    print(f"text: {corpus.description}")
    print(f"model: {parameter_count(model):,} parameters; first step: {start}", flush=True)

    log = options.log.open("a", buffering=1) if options.log else None
    show = progress(options.steps, start, options.quiet)
    for step in range(start, options.steps):
        inputs, targets = sampler.next_batch()
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        value = loss.item()
        if log:  # before the save: a step that can be restored must not be missing from the log
            log.write(json.dumps({"step": step, "loss": value.hex()}) + "\n")
        if checkpointer:
            checkpointer.step(step)
        show(step, value)
        if step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    if checkpointer:
        checkpointer.close()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
