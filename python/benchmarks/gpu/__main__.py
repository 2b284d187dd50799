"""States on a GPU: how fast they are copied and restored, and what saving them costs a training run.

Needs a GPU, and a folder in memory (or on persistent memory) with room for three states, so that storage keeps up.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "gpt"))
from arms import ARMS, Arm, Timed  # noqa: E402
from direct import direct  # noqa: E402
from hashing import hashing  # noqa: E402
from model import GPT, Size  # noqa: E402
from table import median, table  # noqa: E402

import pccheck.store  # noqa: E402

#: parameters, and twice as much for Adam: states of about 0.06, 4 and 16 GB
SIZES = {
    "tiny": Size(layers=4, heads=4, width=320, context=256, batch=8, dropout=0.0),
    "4g": Size(layers=24, heads=16, width=1088, context=1024, batch=8, dropout=0.0),
    "16g": Size(layers=24, heads=16, width=2176, context=1024, batch=8, dropout=0.0),
}

EXAMPLES = """examples:
  python python/benchmarks/gpu --dir /dev/shm                    all of it, with a state of 4 GB
  python python/benchmarks/gpu --dir /dev/shm --size 16g --rounds 1
  python python/benchmarks/gpu --dir /dev/shm --size tiny        does everything run? (its times mean nothing)
  python python/benchmarks/gpu --dir /dev/shm --arms none,pccheck/10,pccheck-spare/1 --json

An arm is NAME/K, which saves every K iterations. Names: """ + ", ".join(ARMS)


class Bed:
    """A model, its optimizer and a batch, on the GPU."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(1)
        self.model = GPT(size).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(0, 256, (size.batch, size.context + 1), device="cuda")
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def backward(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(self.inputs, self.targets)
        self.optimizer.zero_grad()
        loss.backward()

    def iterate(self) -> None:
        self.backward()
        self.optimizer.step()


@contextmanager
def arm_of(name: str, folder: Path, bed: Bed) -> Iterator[Arm]:
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=folder) as own:
        arm = ARMS[name](Path(own), bed.model, bed.optimizer)
        try:
            yield arm
        finally:
            arm.close()
            del arm
            gc.collect()


def train(bed: Bed, arm: Arm, every: int, iterations: int) -> dict[str, Any]:
    """Seconds of so many iterations, of which every K-th saves after its update. Saves end in the measured time."""
    timed = Timed()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for index in range(iterations):
        bed.backward()
        timed.wait(arm)
        bed.optimizer.step()
        if every and index % every == 0:
            timed.save(arm, index)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    arm.finish()
    return {
        "seconds": seconds,
        "finished": time.perf_counter() - began,
        "save_ms": [1e3 * value for value in timed.saves],
        # Only those that had something to wait for.
        "wait_ms": [1e3 * value for i, value in enumerate(timed.waits) if every and i and (i - 1) % every == 0],
    }


def training(bed: Bed, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each arm between iterations without saves, which its own are compared with."""
    results = []
    for round_index in range(options.rounds):
        for name, every in options.arms:
            # What an arm before had is given back.
            torch.cuda.empty_cache()
            try:
                found = train_arm(bed, options, name, every)
            except Exception as why:
                say(f"round {round_index + 1}  {name}/{every}: {type(why).__name__}: {why}")
                results.append(
                    {"arm": name, "every": every, "round": round_index, "error": f"{type(why).__name__}: {why}"}
                )
                continue
            found |= {"arm": name, "every": every, "round": round_index}
            label, begin, wait = f"{name}/{every}", median(found["save_ms"]), median(found["wait_ms"])
            say(f"round {round_index + 1}  {label}: {found['cost']:+.2%}, begin {begin:.2f} ms, wait {wait:.2f} ms")
            results.append(found)
    return results


def train_arm(bed: Bed, options: argparse.Namespace, name: str, every: int) -> dict[str, Any]:
    none = Arm(options.dir, bed.model, bed.optimizer)
    iterations = options.iterations if every != 1 else min(options.iterations, 20)
    with arm_of(name, options.dir, bed) as arm:
        # What is allocated once is allocated now.
        for index in range(2):
            arm.save(index)
            arm.before_update()
            arm.finish()
        plain = [train(bed, none, 0, iterations)["seconds"]]
        found = train(bed, arm, every, iterations)
        plain.append(train(bed, none, 0, iterations)["seconds"])
    mean = statistics.mean(plain)
    return found | {
        "iterations": iterations,
        "plain_seconds": mean,
        "plain_apart": abs(plain[1] - plain[0]) / min(plain),
        "cost": found["seconds"] / mean - 1,
    }


@contextmanager
def store_for(
    named: dict[str, torch.Tensor], options: argparse.Namespace, *, small: bool = False
) -> Iterator[pccheck.Store]:
    """A store in memory whose staging pool holds the state; or is as small as it is by default."""
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.dir) as own:
        payload, region = pccheck.payload_bytes(named), Path(own) / "region.pcc"
        pccheck.format_region(region, slots=3, payload_bytes=payload)
        how: Any = {"writers": options.writers, "readers": options.readers}
        how["staging_bytes"] = None if small else payload + (64 << 20)
        with pccheck.Store(region, durability="process", **how) as store:
            yield store


class Library:
    """The library, with the seconds of its last call that began a save."""

    def __init__(self) -> None:
        self._library, self.seconds = pccheck.store.lib, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def pcc_save_begin(self, *arguments: Any) -> int:
        began = time.perf_counter()
        status = self._library.pcc_save_begin(*arguments)
        self.seconds = time.perf_counter() - began
        return int(status)


def copying(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """A save until it is copied beside a plain copy of the same tensors into page-locked memory, in turns."""
    named = untied(Arm(options.dir, bed.model, bed.optimizer))
    tensors, nbytes = list(named.values()), sum(tensor.nbytes for tensor in named.values())
    pinned, flat = pinned_and_flat(nbytes)
    views, at = [], 0
    for tensor in tensors:
        views.append(pinned[at : at + tensor.nbytes])
        at += tensor.nbytes
    rounds = []
    with patch.object(pccheck.store, "lib", Library()) as library:
        for small in (False, True):
            # Not beside each other: memory holds three states.
            with store_for(named, options, small=small) as store:
                for index in range(2 * options.rounds + 3):
                    if not small:
                        plain = min(
                            timed_gpu(partial(pinned.copy_, flat, non_blocking=True)),
                            timed_gpu(partial(copy_each, views, tensors)),
                        )
                        rounds.append({"plain": plain})
                    ways = [way for way in WAYS if way.small == small]
                    for step, way in enumerate(ways, len(ways) * index):
                        took = timed_save(store, library, step, named, way)
                        rounds[index] |= {name + way.suffix: seconds for name, seconds in took.items()}
    del pinned, views, flat
    gc.collect()
    torch.cuda.empty_cache()
    return {"bytes": nbytes, "rounds": rounds[1:]}


def pinned_and_flat(nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), torch.empty(
        nbytes, dtype=torch.uint8, device="cuda"
    )


@dataclasses.dataclass
class Way:
    """To save a state, and to ask for its stream to wait."""

    suffix: str
    #: with the staging pool that there is by default
    small: bool = False
    #: seconds from begin until that is asked for
    pause: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


WAYS = (
    Way(""),
    Way("_late", pause=0.05),
    Way("_spare", options={"snapshot": "spare"}),
    Way("_small", small=True),
    Way("_flags", small=True, options={"flag_waits": True}),
    Way("_flags_late", small=True, pause=0.05, options={"flag_waits": True}),
)


def timed_save(
    store: pccheck.Store, library: Library, step: int, named: dict[str, torch.Tensor], way: Way
) -> dict[str, float]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    save = store.save(step, named, **way.options)
    begun = time.perf_counter()
    time.sleep(way.pause)
    asked = time.perf_counter()
    save.stream_wait_copied()
    waited = time.perf_counter()
    save.copied()
    copied = time.perf_counter()
    durable = save.durable().durable_seconds
    return {
        "begin": begun - began,
        "library": library.seconds,
        "wait": waited - asked,
        "copied": copied - began,
        "since_begun": copied - begun,
        "durable": durable,
    }


def restoring(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """A restore into the GPU beside reading the region to host memory and copying from page-locked memory, in turns."""
    named = untied(Arm(options.dir, bed.model, bed.optimizer))
    nbytes = sum(tensor.nbytes for tensor in named.values())
    pinned, flat = pinned_and_flat(nbytes)
    rounds = []
    with store_for(named, options) as store:
        store.save(7, named).durable()
        with store.open(step=7, verify=False) as checkpoint:
            hosts = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in named.items()}
            for _ in range(options.rounds + 2):
                began = time.perf_counter()
                checkpoint.read_into(hosts)
                read = time.perf_counter() - began
                upload = timed_gpu(lambda: flat.copy_(pinned, non_blocking=True))
                began = time.perf_counter()
                checkpoint.read_into(named)
                rounds.append({"read": read, "upload": upload, "restore": time.perf_counter() - began})
            same = all(torch.equal(tensor.cpu(), hosts[name]) for name, tensor in named.items())
        if not same:
            raise RuntimeError("what was restored to the GPU is not what was restored to host memory")
        return {"bytes": nbytes, "rounds": rounds[1:]}


def storing(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """Saves until they are durable, by GPUDirect Storage and by way of host memory."""
    arm = Arm(options.dir, bed.model, bed.optimizer)
    return direct(options.disk or options.dir, sum(tensor.nbytes for tensor in untied(arm).values()), options.rounds)


def hashes(bed: Bed, options: argparse.Namespace) -> list[dict[str, Any]]:
    """How fast chunks are hashed on the GPU."""
    return hashing(options.rounds)


MEASURES: dict[str, Callable[[Bed, argparse.Namespace], Any]] = {
    "copying": copying,
    "restoring": restoring,
    "hashing": hashes,
    "direct": storing,
    "training": training,
}


def untied(arm: Arm) -> dict[str, torch.Tensor]:
    """The state's tensors on the GPU, each memory once."""
    found = {tensor.data_ptr(): (name, tensor) for name, tensor in arm.tensors().items() if tensor.is_cuda}
    return dict(found.values())


def copy_each(views: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)


def timed_gpu(work: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arms(text: str) -> list[tuple[str, int]]:
    arms = []
    for item in text.split(","):
        name, _, every = item.partition("/")
        if name not in ARMS or (every and not every.isdigit()):
            raise argparse.ArgumentTypeError(f"{item!r}: expected NAME/K, with NAME of {', '.join(ARMS)}")
        arms.append((name, int(every or 10)))
    return arms


def parse_measures(text: str) -> list[str]:
    for item in text.split(","):
        if item not in MEASURES:
            raise argparse.ArgumentTypeError(f"{item!r}: expected some of {', '.join(MEASURES)}")
    return text.split(",")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="a folder in memory or on persistent memory")
    add("--size", choices=SIZES, default="4g", help="of the model (default: %(default)s)")
    add(
        "--arms",
        type=parse_arms,
        metavar="A,B",
        default="none/10,pccheck/10,pccheck-flags/10,pccheck-pool/10,pccheck-spare/10,pccheck-spare/1,checkfreq/10,dcp-pinned/10,gpm/10,"
        "torch.save/10",
        help="(default: %(default)s)",
    )
    add("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--iterations", type=int, default=40, metavar="N", help="per phase (default: %(default)s)")
    add(
        "--measure",
        type=parse_measures,
        default="copying,restoring,hashing,direct,training",
        metavar="A,B",
        help="(default: %(default)s)",
    )
    add("--disk", type=Path, metavar="DIR", help="for direct: a folder on a disk (default: that of --dir)")
    add("--writers", type=int, metavar="N", help="for copying: threads that hash and write (default: the engine's)")
    add("--readers", type=int, metavar="N", help="for restoring: threads that read and verify (default: the engine's)")
    add("--batch", type=int, metavar="B", help="sequences per iteration")
    add("--json", action="store_true", help="print every measurement as JSON")
    add("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    size = SIZES[options.size]
    bed = Bed(dataclasses.replace(size, batch=options.batch or size.batch))
    for _ in range(5):
        bed.iterate()
    state = sum(tensor.nbytes for tensor in untied(Arm(options.dir, bed.model, bed.optimizer)).values())
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "state_bytes": state,
        "dir": str(options.dir),
        "pccheck": pccheck.__version__,
    }
    for what in options.measure:
        say(f"{what} ...")
        found[what] = MEASURES[what](bed, options)
        if options.output:
            # As far as it has come.
            options.output.write_text(json.dumps(found, indent=1))
    text = json.dumps(found, indent=1)
    print(text if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
