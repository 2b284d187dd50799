"""PCcheck beside other ways to save the same state: one command that builds, installs, measures and reports.

Makes a Python environment below ~/.cache/pccheck the first time (some 7 GB and several minutes), builds the wheel of
this checkout in release mode, and measures every system in turn, each time in a fresh process: how long until a save
is durable and until the trainer may go on, what it takes of memory and CPU, and how long restoring takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import machine

from . import plan, rounds, summary, table
from .environment import ROOT, Environment, SetupError, prepare
from .progress import Progress
from .systems import SYSTEMS, Entry, entry_of

DEFAULT_SIZES = "10MB,100MB,1GB,4GB"
SMALLEST_BYTES = 1_000_000
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

EXAMPLES = f"""systems:
  {", ".join(SYSTEMS)}
  or one of your own, package.module:Class on PYTHONPATH, a subclass of comparison.systems.base.System

examples:
  benches/compare                                              everything; about an hour and a half, 13 GB of disk
  benches/compare --dir /mnt/nvme --json result.json --picture result.svg
  benches/compare --sizes 100MB,1GB --repeat 7 --systems ceiling,pccheck,pccheck-whole,checkfreq,gpm,deepspeed
  benches/compare --sizes 10MB --repeat 1 --later 1            does everything run? (its times mean little)
  benches/compare --from result.json --picture result.png      shows and draws a saved result again
  benches/compare --from small.json large.json                 as one, if they have no size in common
"""


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 100MB or 4GB")
    size = int(float(found[1]) * UNITS[found[2].upper()]) // 4 * 4
    if size < SMALLEST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1MB or more")
    return size


def _sizes(text: str) -> list[int]:
    return [_size(each) for each in text.split(",")]


def _systems(text: str) -> list[Entry]:
    try:
        return list({name: entry_of(name) for name in text.split(",")}.values())
    except ValueError as why:
        raise argparse.ArgumentTypeError(str(why)) from None


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .svg or .png")
    return Path(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="benches/compare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", type=_sizes, default=DEFAULT_SIZES, metavar="A,B", help="of the state (default: %(default)s)")
    add("--repeat", type=_count, default=5, metavar="N", help="rounds (default: %(default)s)")
    add("--later", type=_count, default=3, metavar="N", help="saves after each first one (default: %(default)s)")
    add("--systems", type=_systems, default=",".join(SYSTEMS), metavar="A,B", help="(default: all)")
    add("--dir", type=Path, default=Path(), metavar="DIR", help="on the disk to measure (default: this folder)")
    add("--memory-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="in memory (default: %(default)s)")
    add("--seed", type=int, default=0, help="of contents and order (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write every single measurement to OUT")
    add("--markdown", action="store_true", help="print the tables in Markdown")
    add("--picture", type=_picture, metavar="OUT", help="draw: .svg or .png")
    add("--no-probes", action="store_true", help="do not try whether each system copies and verifies")
    add("--from", type=Path, nargs="+", dest="sources", metavar="IN", help="measure nothing: show results of --json")
    add(
        "--python",
        type=Path,
        metavar="EXE",
        help="a Python that has them and pccheck: install and build nothing",
    )
    options = parser.parse_args(arguments)
    if not options.sources:
        if not options.dir.is_dir():
            parser.error(f"--dir {options.dir}: expected a folder")
        if machine.file_system(options.dir) in machine.IN_MEMORY:
            parser.error(f"--dir {options.dir}: is memory, not a disk; name a folder on the disk to measure")
    return options


def measure(options: argparse.Namespace, environment: Environment) -> dict[str, Any]:
    """Everything that the options ask for."""
    planned = plan.make(options.systems, options.sizes, options.repeat, options.seed, options.dir, options.memory_dir)
    # A ceiling has no state of a trainer to copy, and no format to verify.
    probed = [] if options.no_probes else [entry for entry in options.systems if entry.group != "ceiling"]
    progress = Progress(len(planned.jobs) + len(probed))
    folder, memory_folder = options.dir.resolve(), options.memory_dir.resolve()
    runner = rounds.Runner(environment, folder, memory_folder, options.seed, 1 + options.later)
    began = datetime.datetime.now(datetime.timezone.utc)
    found = runner.run(planned, probed, progress)
    return {
        "version": 1,
        "began": began.isoformat(timespec="seconds"),
        "settings": {name: getattr(options, name) for name in ("sizes", "repeat", "later", "seed")},
        "machine": machine.describe(folder),
        "versions": _versions(environment),
        "left_out": [vars(each) for each in planned.left_out],
        **found,
        "summary": summary.summarise(found["runs"], {entry.name: entry for entry in options.systems}),
    }


def _versions(environment: Environment) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json\n"
        "names = ['pccheck', 'torch', 'safetensors', 'deepspeed', 'orbax-checkpoint', 'jax', 'numpy']\n"
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name'] in names}))"
    )
    env = os.environ | ({"PYTHONPATH": str(environment.site)} if environment.site else {})
    done = subprocess.run([str(environment.python), "-c", program], env=env, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return dict(sorted(found.items()))


def _draw(environment_python: Path, measured: dict[str, Any], picture: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(measured, file)
        file.flush()
        command = [str(environment_python), "-m", "comparison.picture", file.name, str(picture.absolute())]
        subprocess.run(command, cwd=ROOT / "benches", check=True)


def main(arguments: list[str] | None = None) -> int:
    """The command. 1: a system failed, 2: the arguments are wrong or something is missing."""
    options = parse(arguments)
    # Who pipes into `head` wants no more.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # So that workers and temporary folders go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        environment = None
        if options.python:
            environment = Environment(options.python.absolute(), None)
        elif options.picture or not options.sources:
            environment = prepare(Progress(0).say)
    except SetupError as why:
        print(f"compare: {why}", file=sys.stderr)
        return 2
    if options.sources:
        try:
            measured = summary.merge([json.loads(source.read_text()) for source in options.sources])
        except (OSError, ValueError) as why:
            print(f"compare: --from: {why}", file=sys.stderr)
            return 2
    else:
        assert environment is not None
        measured = measure(options, environment)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    names = dict.fromkeys(entry["system"] for entry in measured["summary"])
    print(table.render(measured, {name: entry_of(name) for name in names}, options.markdown))
    if options.picture:
        assert environment is not None
        _draw(environment.python, measured, options.picture)
    return 1 if measured["failed"] or measured["interrupted"] else 0
