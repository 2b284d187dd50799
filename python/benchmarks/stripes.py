"""Whether the bandwidth of members adds up: saves and restores over the first path alone and over all of them, in turn.

    python stripes.py PATH PATH... [--mib 512] [--rounds 7]

Every path is a file to be made or a block device, AND WHAT IT HOLDS IS LOST. Prints GB/s to durable and to restored in
each round, and the ratio of all members to one as medians. The paths should be limited independently: different disks,
or devices with a limit each (docs/performance.md says how to make some).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

import pccheck


def measure(paths: list[str], state: dict[str, np.ndarray], rounds: int) -> tuple[float, float]:
    """GB/s to durable and to restored: medians of ``rounds`` after one that is not counted."""
    payload_bytes = pccheck.payload_bytes(state)
    pccheck.format_region(
        paths[0], slots=3, payload_bytes=payload_bytes, stripe=paths[1:], medium="direct", prewrite=True, force=True
    )
    size = sum(array.nbytes for array in state.values()) / 1e9
    saved, restored = [], []
    with pccheck.Store(paths[0], medium="direct", durability="process") as store:
        for step in range(rounds + 1):
            begun = time.monotonic()
            store.save(step, state).durable()
            saved.append(size / (time.monotonic() - begun))
            into = {name: np.empty_like(array) for name, array in state.items()}
            for array in into.values():
                array.fill(0)
            begun = time.monotonic()
            store.restore(into).close()
            restored.append(size / (time.monotonic() - begun))
            assert all((into[name] == array).all() for name, array in state.items())
    return statistics.median(saved[1:]), statistics.median(restored[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="member; the first one alone is the baseline")
    parser.add_argument("--mib", type=int, default=512, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7, help="how often one and all are measured in turn")
    args = parser.parse_args()
    state = {"w": np.random.default_rng(1).integers(0, 256, args.mib << 20, dtype=np.uint8)}
    ratios: dict[str, list[float]] = {"durable": [], "restored": []}
    for _ in range(args.rounds):
        one = measure(args.paths[:1], state, 2)
        every = measure(args.paths, state, 2)
        for name, alone, together in zip(ratios, one, every, strict=True):
            ratios[name].append(together / alone)
            print(f"{name}: {alone:.3f} GB/s over 1, {together:.3f} over {len(args.paths)}", flush=True)
    for name, found in ratios.items():
        low, high = min(found), max(found)
        print(f"{name}: {len(args.paths)} members over 1: {statistics.median(found):.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
