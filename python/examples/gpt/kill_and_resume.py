"""Trains once undisturbed and once SIGKILLed at random moments and resumed, and compares the losses bit for bit.

The undisturbed run saves nothing, so the comparison also shows that saving changes nothing. Exit code 0 where
every loss of the killed run, those of repeated steps included, equals the undisturbed one exactly; else 1.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")
POLL_SECONDS = 0.001

EXAMPLES = """examples:
  python kill_and_resume.py                        the tiny model, killed three times: a minute
  python kill_and_resume.py --size 38m --steps 40  38 million parameters; takes 2 GB of disk
  python kill_and_resume.py --seed 7 --kills 10    other moments, and more of them
"""


class TrainingFailedError(RuntimeError):
    """A training process ended by itself where it should not have; the message holds what it wrote."""


@dataclass(frozen=True)
class Attempt:
    """One process of the killed run, and the first and the last step that it finished."""

    first: int
    last: int
    killed: bool


def read_losses(log: Path) -> list[tuple[int, float]]:
    """The (step, loss) pairs of a log, in the order they were written."""
    if not log.exists():
        return []
    lines = (json.loads(line) for line in log.read_text().splitlines())
    return [(line["step"], float.fromhex(line["loss"])) for line in lines]


def start(options: argparse.Namespace, log: Path, output: Path, *extra: str) -> subprocess.Popen[bytes]:
    """Starts train.py; what it prints goes to `output`."""
    command = [sys.executable, str(TRAIN), "--size", options.size, "--steps", str(options.steps)]
    command += ["--seed", str(options.seed), "--threads", str(options.threads), "--log", str(log), "--quiet"]
    with output.open("wb") as stream:
        return subprocess.Popen([*command, *extra], stdout=stream, stderr=subprocess.STDOUT)


def check(process: subprocess.Popen[bytes], output: Path, allowed: tuple[int, ...]) -> None:
    """Waits for the process, which must end with one of the allowed codes."""
    if process.wait() not in allowed:
        said = output.read_text(errors="replace")
        raise TrainingFailedError(f"train.py ended with code {process.returncode} and said:\n{said}")


def kill_within(process: subprocess.Popen[bytes], log: Path, known: int, ahead: int, fraction: float) -> None:
    """SIGKILLs the process in the middle of a step: `fraction` of a step after its log grew by `ahead` lines.

    Returns early where the process ended by itself before that.
    """
    first_line_at = None
    grown = 0
    while process.poll() is None and grown < ahead:
        time.sleep(POLL_SECONDS)
        grown = log.read_bytes().count(b"\n") - known if log.exists() else 0
        if grown and first_line_at is None:
            first_line_at = time.monotonic()
    if first_line_at is not None and grown > 1:
        time.sleep(fraction * (time.monotonic() - first_line_at) / (grown - 1))
    process.kill()
    process.wait()


def killed_run(options: argparse.Namespace, folder: Path) -> list[Attempt]:
    """Trains to the end through `options.kills` kills at random moments."""
    dice = random.Random(options.seed)
    log, output = folder / "killed.jsonl", folder / "killed.txt"
    region = ["--region", str(folder / "gpt.pcc"), "--every", str(options.every)]
    attempts: list[Attempt] = []
    while not attempts or attempts[-1].killed:
        known = read_losses(log)
        process = start(options, log, output, *region)
        kills_left = options.kills - len(attempts)
        if kills_left > 0:
            # Leave steps for the kills to come; the process first repeats what was lost.
            reached = max((step for step, _ in known), default=-1) + 1
            ahead = max(1, (options.steps - reached) // (kills_left + 1))
            kill_within(process, log, len(known), dice.randint(1, ahead), dice.random())
        check(process, output, allowed=(0, -signal.SIGKILL))
        steps = [step for step, _ in read_losses(log)[len(known) :]]
        attempts.append(Attempt(steps[0], steps[-1], killed=process.returncode != 0))
    return attempts


def differences(expected: dict[int, float], found: list[tuple[int, float]]) -> list[str]:
    """What is wrong with the killed run's losses; empty where all are equal bit for bit and none is missing."""
    wrong = [
        f"step {step}: {loss!r} instead of {expected.get(step)!r}" for step, loss in found if loss != expected.get(step)
    ]
    missing = sorted(expected.keys() - dict(found).keys())
    return wrong + [f"step {step}: missing" for step in missing]


def table(attempts: list[Attempt]) -> str:
    """One line per process: where it began and ended, and how many steps the next one had to repeat."""
    lines = ["process  first step  last step  ended by  steps repeated by the next"]
    for number, attempt in enumerate(attempts):
        following = attempts[number + 1].first if number + 1 < len(attempts) else None
        repeated = "" if following is None else str(attempt.last + 1 - following)
        ended = "SIGKILL" if attempt.killed else "itself"
        lines.append(f"{number:>7}  {attempt.first:>10}  {attempt.last:>9}  {ended:>8}  {repeated:>26}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny", help="as of train.py (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="steps per save (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and of kills (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="T", help="of torch (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for region and logs, which stay (default: a temporary one)")
    options = parser.parse_args(arguments)
    if options.steps <= options.kills:
        parser.error(f"{options.kills} kills need more than {options.kills} steps; pass a larger --steps")
    return options


def run(options: argparse.Namespace, folder: Path) -> int:
    """The whole comparison in `folder`, which must be empty of logs; returns the exit code."""
    print(f"undisturbed: {options.steps} steps of {options.size}, no checkpoints ...", flush=True)
    log, output = folder / "undisturbed.jsonl", folder / "undisturbed.txt"
    check(start(options, log, output, "--every", "0"), output, allowed=(0,))
    expected = dict(read_losses(log))

    print(f"killed: {options.kills} times, saving every {options.every} ...", flush=True)
    attempts = killed_run(options, folder)
    print(table(attempts))
    found = read_losses(folder / "killed.jsonl")
    wrong = differences(expected, found)
    if wrong:
        print(f"DIFFERENT: {len(wrong)} losses", *wrong[:10], sep="\n  ")
        return 1
    print(f"equal: all {len(found)} losses of {len(attempts)} processes match the undisturbed run bit for bit")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        return run(options, options.folder)
    with tempfile.TemporaryDirectory(prefix="gpt-") as folder:
        return run(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
