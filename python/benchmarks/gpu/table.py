"""What was measured on a GPU, as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any


def median(values: list[float]) -> float:
    """Not a number where there is none."""
    return statistics.median(values) if values else float("nan")


def table(found: dict[str, Any]) -> str:
    """All that was measured."""
    state = f"{found['state_bytes'] / 1e9:.2f} GB"
    lines = [f"{found['gpu']}, torch {found['torch']}, state of {state}, {found['dir']}", ""]
    if "copying" in found:
        lines += [*_copying(**found["copying"]), ""]
    if "restoring" in found:
        lines += [*_restoring(**found["restoring"]), ""]
    if "hashing" in found:
        lines += [*_hashing(found["hashing"]), ""]
    if "direct" in found:
        lines += [*_direct(**found["direct"]), ""]
    if "training" in found:
        lines += _training(found["training"])
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _column(rounds: list[dict[str, float]], name: str) -> float:
    return median([row[name] for row in rounds])


def _copying(bytes: int, rounds: list[dict[str, float]]) -> Iterator[str]:
    yield "from begin to copied, the staging pool holds the state (medians over rounds)"
    plain, copied = (bytes / _column(rounds, name) / 1e9 for name in ("plain", "copied"))
    whole, copies = ([row["plain"] / row[name] for row in rounds] for name in ("copied", "since_begun"))
    yield f"  plain copy {plain:.1f} GB/s, save {copied:.1f} GB/s"
    yield f"  ratio {_spread(whole)}, after begin {_spread(copies)}"
    for what, suffix in (
        ("", ""),
        ("asked 50 ms later: ", "_late"),
        ("by spare memory: ", "_spare"),
        ("a pool of 256 MiB: ", "_small"),
        ("the same, flag_waits: ", "_flags"),
        ("that asked 50 ms later: ", "_flags_late"),
    ):
        begin, library, wait = (1e3 * _column(rounds, name + suffix) for name in ("begin", "library", "wait"))
        both = 1e3 * median([row["library" + suffix] + row["wait" + suffix] for row in rounds])
        speeds = (bytes / _column(rounds, name + suffix) / 1e9 for name in ("copied", "durable"))
        # A pause is no part of the copying.
        tail = "" if suffix.endswith("late") else "; copied {:.1f} GB/s, durable {:.1f} GB/s".format(*speeds)
        yield (
            f"  {what}begin {begin:.2f} ms, of that in the library {library:.2f}; wait {wait:.2f} ms; "
            f"library and wait {both:.2f} ms{tail}"
        )


def _restoring(bytes: int, rounds: list[dict[str, float]]) -> Iterator[str]:
    yield "restored and verified"
    read, upload, restore = (bytes / _column(rounds, name) / 1e9 for name in ("read", "upload", "restore"))
    ratios = [max(row["read"], row["upload"]) / row["restore"] for row in rounds]
    yield f"  to host {read:.1f} GB/s, plain copy to the GPU {upload:.1f} GB/s, restore {restore:.1f} GB/s"
    yield f"  over the slower of the two: {_spread(ratios)}"


def _hashing(shapes: list[dict[str, Any]]) -> Iterator[str]:
    yield "chunks hashed on the GPU"
    for shape in shapes:
        what = f"{shape['count']} of {shape['chunk_bytes'] >> 10} KiB"
        yield f"  {what:<18}{shape['bytes_per_second'] / 1e9:8.0f} GB/s"


def _direct(
    bytes: int, nvidia_fs: bool, rounds: list[dict[str, float]], direct_bytes: int, error: str = ""
) -> Iterator[str]:
    with_or_without = "with" if nvidia_fs else "without"
    yield f"from GPU memory to durable on a disk (GPUDirect Storage {with_or_without} nvidia-fs)"
    if error:
        yield f"  not by cuFile: {error}"
    names = {"cufile": "by cuFile", "spare": "by spare memory and the pool", "pinned": "by the pool"}
    for name, words in names.items():
        if all(name in row for row in rounds):
            ratios = [row["pinned"] / row[name] for row in rounds]
            speed = bytes / _column(rounds, name) / 1e9
            yield f"  {words}: {speed:.2f} GB/s, {_spread(ratios)} of by the pool"
    yield f"  {direct_bytes / 1e9:.1f} GB were written by cuFile"


_COLUMNS = ("iteration ms", "cost", "least", "most", "begin ms", "wait ms", "plain apart")


def _training(results: list[dict[str, Any]]) -> Iterator[str]:
    trained = [row for row in results if "error" not in row]
    yield f"{'arm':<18}" + "".join(f"{column:>14}" for column in _COLUMNS)
    for arm, every in dict.fromkeys((row["arm"], row["every"]) for row in trained):
        rows = [row for row in trained if (row["arm"], row["every"]) == (arm, every)]
        costs = [row["cost"] for row in rows]
        cells = (
            f"{median([1e3 * row['plain_seconds'] / row['iterations'] for row in rows]):.1f}",
            f"{median(costs):.2%}",
            f"{min(costs):.2%}",
            f"{max(costs):.2%}",
            f"{median([value for row in rows for value in row['save_ms']]):.2f}",
            f"{median([value for row in rows for value in row['wait_ms']]):.2f}",
            f"{max(row['plain_apart'] for row in rows):.2%}",
        )
        yield f"{f'{arm}/{every}':<18}" + "".join(f"{cell:>14}" for cell in cells)
    for row in results:
        if "error" in row:
            yield f"{row['arm']}/{row['every']} failed: {row['error']}"
