"""From single measurements to figures per system and size. Ratios are formed within a round, then spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

from measuring.figures import Spread

from .systems import Entry

#: the system that peers are compared with: the default one, and the one whose staging pool holds the state
OURS = ("pccheck", "pccheck-whole")
CEILINGS = {False: "ceiling", True: "ceiling-memory"}

Run = dict[str, Any]


def flaw(run: Run) -> str | None:
    """Why its saves were not durable when it said so; none where nothing speaks against it."""
    for number, save in enumerate(run["saves"], 1):
        if save["dirty_bytes"]:
            return f"save {number} said durable with {save['dirty_bytes']} bytes of its files not yet written"
        if save["flushes"] == 0:
            return f"save {number} said durable, and the device was not told to flush"
    return None


def measures(run: Run) -> dict[str, float]:
    """The figures of one process; those without `first` are medians over its later saves."""
    size, first, later = run["state_bytes"], run["saves"][0], run["saves"][1:]

    def of_later(name: str) -> float:
        return float(median(save[name] for save in later))

    found = {
        "first_blocked_seconds": first["blocked"],
        "first_durable_seconds": first["durable"],
        "blocked_seconds": of_later("blocked"),
        "durable_seconds": of_later("durable"),
        "first_durable_gb_per_second": size / first["durable"] / 1e9,
        "durable_gb_per_second": size / of_later("durable") / 1e9,
        "blocked_seconds_per_gb": of_later("blocked") / size * 1e9,
        "first_over_later": first["durable"] / of_later("durable"),
        "cpu_seconds_per_gb": of_later("cpu") / size * 1e9,
        "machine_cpu_seconds_per_gb": of_later("machine_cpu") / size * 1e9,
        "extra_bytes": max(save["extra_bytes"] for save in run["saves"]),
        "open_seconds": run["open_seconds"],
        "reopen_seconds": run["reopen_seconds"],
        "restore_seconds": run["restore_seconds"],
        "restore_gb_per_second": size / run["restore_seconds"] / 1e9,
    }
    if all(save["cached_bytes"] is not None for save in later):
        found["cached_bytes"] = of_later("cached_bytes")
    return found


def summarise(runs: list[Run], systems: dict[str, Entry]) -> list[dict[str, Any]]:
    """One entry per size and system, with a spread for each measure and for each ratio."""
    found = []
    for size in sorted({run["size"] for run in runs}):
        at_size = [run for run in runs if run["size"] == size]
        by_system = {name: _by_round(name, at_size) for name in systems if any(r["system"] == name for r in at_size)}
        found += [_entry(size, systems[name], at_size, by_system) for name in by_system]
    return found


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of other sizes into the first one: each size was measured in one run. ValueError where one was in two."""
    first, *others = results
    merged = dict(first)
    for other in others:
        twice = {run["size"] for run in merged["runs"]} & {run["size"] for run in other["runs"]}
        if twice:
            raise ValueError(f"expected each size in one result, found {sorted(twice)} bytes in two of them")
        for name in ("runs", "summary", "left_out", "failed"):
            merged[name] = merged[name] + other[name]
        merged["probes"] = other["probes"] | merged["probes"]
        merged["interrupted"] = merged["interrupted"] or other["interrupted"]
    return merged


def spans(summary: list[dict[str, Any]]) -> str:
    """`5 x (1 + 3) saves`: how often everything was measured; `3-5` where that is not the same everywhere."""

    def span(name: str) -> str:
        found = sorted({entry[name] for entry in summary})
        return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"

    return f"{span('rounds')} x (1 + {span('later_saves')}) saves"


def _by_round(name: str, runs: list[Run]) -> dict[int, dict[str, float]]:
    return {run["round"]: measures(run) for run in runs if run["system"] == name}


def _entry(
    size: int, system: Entry, runs: list[Run], by_system: dict[str, dict[int, dict[str, float]]]
) -> dict[str, Any]:
    mine = by_system[system.name]
    own = [run for run in runs if run["system"] == system.name]
    flaws = [f"round {run['round'] + 1}: {text}" for run in own if (text := flaw(run))] if not system.in_memory else []
    names = sorted({name for each in mine.values() for name in each})
    found: dict[str, Any] = {
        "size": size,
        "system": system.name,
        "rounds": len(mine),
        "later_saves": min(len(run["saves"]) for run in own) - 1,
        "flaws": flaws,
        "measures": {name: _spread(each[name] for each in mine.values() if name in each) for name in names},
    }
    # What is not durable when it says so has not done the work that the others have done.
    if not flaws:
        found["share_of_ceiling"] = _ratio("durable_seconds", by_system.get(CEILINGS[system.in_memory], {}), mine)
        if system.group == "peer":
            for ours in OURS:
                base = by_system.get(ours, {})
                found[f"durable_over_{ours}"] = _ratio("durable_seconds", mine, base)
                found[f"first_durable_over_{ours}"] = _ratio("first_durable_seconds", mine, base)
                found[f"blocked_over_{ours}"] = _ratio("blocked_seconds", mine, base)
    return found


def _ratio(measure: str, above: dict[int, dict[str, float]], below: dict[int, dict[str, float]]) -> Any:
    return _spread(above[each][measure] / below[each][measure] for each in sorted(above.keys() & below.keys()))


def _spread(values: Iterator[float]) -> dict[str, float] | None:
    found = Spread.of(list(values))
    return asdict(found) if found else None
