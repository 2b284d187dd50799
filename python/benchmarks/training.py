"""How much checkpointing slows training down: PCcheck beside torch.distributed.checkpoint and torch.save.

A GPT trains on the CPU. Every arm runs in a process of its own, once per round, in an order shuffled anew; within
a process, iterations without saves come first, then the first save, then iterations with saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))
import report  # noqa: E402
from arms import ARMS  # noqa: E402
from measuring import machine  # noqa: E402
from watch import watch  # noqa: E402
from worker import Settings  # noqa: E402

WORKER = Path(__file__).with_name("worker.py")
DEFAULT_ARMS = (
    "none,pccheck/1,pccheck/10,dcp/1,dcp/10,dcp-cached/1,dcp-cached/10,"
    "dcp-overlap/1,dcp-overlap/10,dcp-process/1,torch.save/1"
)
WRITE_BYTES = 8 << 20

EXAMPLES = """examples:
  python training.py                                       all arms, five rounds: about half an hour
  python training.py --rounds 1 --size tiny                does everything run? (its times mean nothing)
  python training.py --arms none,pccheck/10,dcp/10 --rounds 9 --iterations 40
  python training.py --output result.json --plot result.png
  python training.py --json | jq .summary

An arm is NAME or NAME/K, which saves every K iterations. Names: """ + ", ".join(ARMS)


class WorkerFailedError(RuntimeError):
    """A worker ended without a result; the message holds what it wrote."""


def plain_write_seconds(folder: Path, size_bytes: int) -> float:
    """One sequential O_DIRECT write of so many bytes into space that is already allocated, then fdatasync."""
    buffer = mmap.mmap(-1, WRITE_BYTES)  # page-aligned, as O_DIRECT demands
    buffer.write(os.urandom(WRITE_BYTES))
    path = folder / "plain"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(file, 0, -(-size_bytes // WRITE_BYTES) * WRITE_BYTES)
        os.fsync(file)
        began = time.monotonic()
        for offset in range(0, size_bytes, WRITE_BYTES):
            os.pwrite(file, buffer, offset)
        os.fdatasync(file)
        return time.monotonic() - began
    finally:
        os.close(file)
        path.unlink()


def run_arm(settings: Settings, folder: Path) -> dict[str, Any]:
    """Runs one worker to its end and returns its result, with what was seen from outside under "watched"."""
    settings_file, result_file, said = folder / "settings.json", folder / "result.json", folder / "said.txt"
    settings_file.write_text(json.dumps(dataclasses.asdict(settings)))
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(settings_file), str(result_file)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        watched = watch(process)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        text = said.read_text(errors="replace")
        raise WorkerFailedError(f"{settings.arm}: the worker ended with code {process.returncode} and said:\n{text}")
    result: dict[str, Any] = json.loads(result_file.read_text())
    phase = result["phases"]["with"]
    result["watched"] = {
        "threads_started": watched.threads_started(phase["began"], phase["ended"]),
        "children_started": watched.children_started(phase["began"], phase["ended"]),
        "children_peak_bytes": watched.children_peak_bytes(phase["began"], phase["ended"]),
    }
    return result


def parse_arms(text: str) -> list[tuple[str, int]]:
    """`none,pccheck/10` -> [("none", 0), ("pccheck", 10)]."""
    arms = []
    for item in text.split(","):
        name, _, every = item.partition("/")
        if name not in ARMS or (every and not every.isdigit()) or every == "0":
            raise argparse.ArgumentTypeError(f"{item!r}: expected NAME or NAME/K, with NAME of {', '.join(ARMS)}")
        arms.append((name, 0 if name == "none" else int(every or 1)))
    if ("none", 0) not in arms:
        arms.insert(0, ("none", 0))
    return arms


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", type=parse_arms, default=DEFAULT_ARMS, metavar="A,B", help="(default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    add("--iterations", type=int, default=20, metavar="N", help="per phase, per arm and round (default: %(default)s)")
    add("--size", default="38m", help="of the model, as of the GPT example (default: %(default)s)")
    add("--batch", type=int, default=6, metavar="B", help="windows of text per iteration (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), metavar="T", help="of torch (default: all cores, %(default)s)")
    add("--region-dir", type=Path, default=Path(), metavar="DIR", help="a folder on the disk (default: this one)")
    add("--seed", type=int, default=0, help="of the order of the arms (default: %(default)s)")
    add("--json", action="store_true", help="print everything that was measured as JSON instead of a table")
    add("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    add("--plot", type=Path, metavar="FILE", help="also draw a picture: .svg or .png (needs matplotlib)")
    options = parser.parse_args(arguments)
    longest = max(every for _, every in options.arms)
    if options.iterations % max(longest, 1):
        parser.error(f"--iterations {options.iterations}: expected a multiple of {longest}, the longest interval")
    if options.region_dir.is_dir() and machine.file_system(options.region_dir) in machine.IN_MEMORY:
        parser.error(f"--region-dir {options.region_dir}: is memory, not a disk; name a folder on a disk")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds. Progress goes to stderr."""
    dice = random.Random(options.seed)
    results: list[dict[str, Any]] = []
    plain: list[float] = []
    for round_index in range(options.rounds):
        arms = list(options.arms)
        dice.shuffle(arms)
        for position, (name, every) in enumerate(arms):
            label = report.label(name, every)
            with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.region_dir) as folder:
                settings = Settings(
                    name,
                    every,
                    folder,
                    options.size,
                    options.batch,
                    options.iterations,
                    options.threads,
                    options.seed,
                )
                result = run_arm(settings, Path(folder)) | {"label": label, "round": round_index}
            results.append(result)
            phase = result["phases"]["with"]
            seconds = (phase["ended"] - phase["began"]) / options.iterations
            print(
                f"round {round_index + 1}/{options.rounds}  {position + 1:>2}/{len(arms)}  {label:<15} {seconds:.3f} s",
                file=sys.stderr,
                flush=True,
            )
        plain.append(plain_write_seconds(options.region_dir, results[-1]["state_bytes"]))
    return {
        "machine": machine.describe(options.region_dir) | {"torch": torch.__version__},
        "state_bytes": results[-1]["state_bytes"],
        "plain_write_seconds": plain,
        "summary": report.summarise(results),
        "results": results,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # So that workers and temporary folders go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.region_dir.mkdir(parents=True, exist_ok=True)
    measured = run(options)
    text = json.dumps(measured, indent=1)
    if options.output:
        options.output.write_text(text)
    print(text if options.json else report.table(measured))
    if options.plot:
        import plot

        plot.draw(measured, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
