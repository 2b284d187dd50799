"""``python -m pccheck``: conversion of checkpoints, and a look at regions."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import __version__, errors
from .convert import convert
from .convert.progress import Progress
from .store import Store

_EXAMPLES = """\
examples:
  python -m pccheck convert model.pt region.pccheck          make a region of a file of torch.save
  python -m pccheck convert region.pccheck model.safetensors   its newest checkpoint, as a safetensors file
  python -m pccheck convert region.pccheck --step 400 m.pt   the newest checkpoint of step 400
  python -m pccheck convert epoch-3.ckpt plain.ckpt          what a reference file of a path store names
  python -m pccheck convert dcp_folder region.pccheck        a folder of torch.distributed.checkpoint
  python -m pccheck list region.pccheck
  python -m pccheck verify region.pccheck
"""
_KINDS = """\
kinds: a region (.pccheck), torch.save (.pt, .pth, .ckpt, .bin), .safetensors, and DCP folders (no suffix). The source's
kind is found by its content. Nothing that a file holds is executed: what is more than tensors and plain values is
refused. Exit status: 0, 1 for an error or damage, 2 for wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return 0
    try:
        status: int = parsed.run(parsed)
        return status
    except (errors.PccheckError, OSError, ImportError) as why:
        print(f"pccheck: error: {' '.join(str(why).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pccheck: interrupted; nothing was changed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pccheck", description=__doc__, epilog=_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"pccheck {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command = commands.add_parser(
        "convert", help="make one kind of checkpoint of another", description=_KINDS, epilog=_EXAMPLES,
        formatter_class=raw,
    )  # fmt: skip
    command.add_argument("source", metavar="SRC", help="checkpoint to read")
    command.add_argument("destination", metavar="DST", help="what to make; whole and durable, or absent")
    command.add_argument("--step", type=int, help="checkpoint of a region; for other sources: the step to note")
    command.add_argument("--generation", type=int, help="checkpoint of a region; the default is the newest")
    kinds = ["region", "torch", "safetensors", "dcp"]
    command.add_argument("--to", choices=kinds, help="kind of DST, whatever its name says")
    command.add_argument("--slots", type=int, default=3, help="slots of a region that is made (default 3)")
    command.add_argument("--force", action="store_true", help="replace what is at DST")
    command.add_argument("--json", action="store_true", help="print what was done as JSON")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run=_convert)

    command = commands.add_parser("list", help="the checkpoints in a region, newest first")
    command.add_argument("region", metavar="REGION")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_list)

    command = commands.add_parser("verify", help="read and verify every byte of a region's checkpoints")
    command.add_argument("region", metavar="REGION")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_verify)
    return parser


def _convert(parsed: argparse.Namespace) -> int:
    done = convert(
        parsed.source,
        parsed.destination,
        step=parsed.step,
        generation=parsed.generation,
        to=parsed.to,
        slots=parsed.slots,
        force=parsed.force,
        progress=Progress(quiet=parsed.quiet),
    )
    for note in done.notes:
        print(f"pccheck: note: {note}", file=sys.stderr)
    if parsed.json:
        print(json.dumps(asdict(done)))
    else:
        size = _size(done.tensor_bytes)
        print(f"{done.destination} ({done.destination_kind}): step {done.step}, {done.tensors} tensors, {size}")
    return 0


def _list(parsed: argparse.Namespace) -> int:
    with _opened(parsed.region) as store:
        found = store.checkpoints()
        slots = store.got().slot_count
    if parsed.json:
        print(json.dumps({"path": parsed.region, "slots": slots, "checkpoints": [asdict(info) for info in found]}))
        return 0
    print(f"{'generation':>12} {'step':>10} {'size':>9} {'tensors':>8}  {'saved':<19}")
    for info in found:
        saved = datetime.datetime.fromtimestamp(info.unix_ns / 1e9).isoformat(" ", "seconds")
        row = f"{info.generation:>12} {info.step:>10} {_size(info.payload_bytes):>9} {info.tensor_count:>8}  {saved}"
        print(row + (" pinned" if info.pinned else ""))
    print(f"{len(found)} checkpoints, {slots} slots")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    with _opened(parsed.region) as store:
        found = store.verify()
    if parsed.json:
        print(json.dumps({"path": parsed.region, **asdict(found)}))
    else:
        print(found.text.rstrip("\n"))
        print(f"{found.intact} intact, {found.damaged} damaged, {found.reclaimed} overwritten meanwhile")
    return 1 if found.damaged else 0


def _opened(region: str) -> Store:
    return Store(region, read_only=True, durability="process")


def _size(count: Any) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
