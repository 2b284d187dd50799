"""From what the workers measured to figures per arm, and to a table in text."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from measuring.figures import Spread, cell, columns

#: of the state, allowed beyond the staging pool
MEMORY_ALLOWANCE = 0.05


def label(name: str, every: int) -> str:
    """`pccheck/10`: the arm and how many iterations there are per save."""
    return f"{name}/{every}" if every else name


def _seconds_per_iteration(phase: dict[str, Any]) -> float:
    return float(phase["ended"] - phase["began"]) / len(phase["iterations"])


def _stall(iterations: list[dict[str, float]]) -> float:
    return sum(each["call"] + each["wait"] for each in iterations)


def _measures(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """One arm in one round; `base` is the arm that saves nothing, of the same round."""
    phases = result["phases"]
    saving, without = phases["with"], phases["without"]
    count = len(saving["iterations"])
    found = {
        "iteration_seconds": _seconds_per_iteration(saving),
        "median_iteration_seconds": median(each["total"] for each in saving["iterations"]),
        "slowdown": _seconds_per_iteration(saving) / _seconds_per_iteration(base["phases"]["with"]) - 1,
        "slowdown_within": _seconds_per_iteration(saving) / _seconds_per_iteration(without) - 1,
        "cpu_seconds_per_iteration": saving["cpu_seconds"] / count,
        "system_cpu_seconds_per_iteration": saving["system_busy_seconds"] / count,
        "setup_seconds": result["setup_seconds"],
        "close_seconds": result["close_seconds"],
        "extra_memory_bytes": saving["peak_bytes"]
        + result["watched"]["children_peak_bytes"]
        - base["phases"]["with"]["peak_bytes"],
        "threads_before": without["threads"],
        "threads_after": saving["threads"],
        "processes_before": without["processes"],
        "processes_after": saving["processes"],
    }
    every = result["settings"]["every"]
    if every:
        saves = count // every
        first = phases["first"]["iterations"]
        found |= {
            "stall_seconds_per_save": _stall(saving["iterations"]) / saves,
            # The call, and the wait of the iteration after it.
            "first_stall_seconds": first[0]["call"] + first[1]["wait"],
            "threads_started_per_save": result["watched"]["threads_started"] / saves,
            "processes_started_per_save": result["watched"]["children_started"] / saves,
            "tasks_started_system_per_save": saving["system_tasks_started"] / saves,
        }
        durable = [save["durable"] - save["began"] for save in result["saves"] if save["durable"] is not None]
        if durable:
            found["first_durable_seconds"] = durable[0]
        if len(durable) > 1:
            found["durable_seconds"] = median(durable[1:])
    if result["pool_bytes"] is not None:
        found["memory_budget_bytes"] = result["pool_bytes"] + MEMORY_ALLOWANCE * result["state_bytes"]
    return found


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label of the arm -> measure -> spread over the rounds, in the order of the labels."""
    base = {result["round"]: result for result in results if result["label"] == "none"}
    by_label: dict[str, list[dict[str, float]]] = {}
    for result in results:
        by_label.setdefault(result["label"], []).append(_measures(result, base[result["round"]]))
    summary = {}
    for name in sorted(by_label, key=lambda name: (name != "none", name)):
        rounds = by_label[name]
        measures = sorted({measure for each in rounds for measure in each})
        spreads = {measure: Spread.of([each[measure] for each in rounds if measure in each]) for measure in measures}
        summary[name] = {measure: asdict(spread) for measure, spread in spreads.items() if spread}
    return summary


def table(measured: dict[str, Any]) -> str:
    """Two tables: times, and what else it takes. Medians over the rounds (least..greatest)."""
    summary, machine = measured["summary"], measured["machine"]
    base = summary["none"]
    times = [
        [
            "arm/every",
            "s/iteration",
            "slowdown %",
            "within process %",
            "stall/save ms",
            "first ms",
            "durable s",
            "first s",
        ]
    ]
    costs = [
        ["arm/every", "CPU s/iter", "+", "machine +", "extra MB", "budget MB", "threads", "processes", "started/save"]
    ]
    for name, measures in summary.items():
        times.append(
            [
                name,
                cell(measures.get("iteration_seconds"), digits=3, spread=True),
                cell(measures.get("slowdown"), 100, 1, spread=True),
                cell(measures.get("slowdown_within"), 100, 1, spread=True),
                cell(measures.get("stall_seconds_per_save"), 1000),
                cell(measures.get("first_stall_seconds"), 1000),
                cell(measures.get("durable_seconds"), digits=2),
                cell(measures.get("first_durable_seconds"), digits=2),
            ]
        )
        more = {
            key: f"{measures[key]['median'] - base[key]['median']:+.3f}"
            for key in ("cpu_seconds_per_iteration", "system_cpu_seconds_per_iteration")
        }
        costs.append(
            [
                name,
                cell(measures.get("cpu_seconds_per_iteration"), digits=3),
                more["cpu_seconds_per_iteration"],
                more["system_cpu_seconds_per_iteration"],
                cell(measures.get("extra_memory_bytes"), 1e-6, spread=True),
                cell(measures.get("memory_budget_bytes"), 1e-6),
                f"{cell(measures.get('threads_before'))} > {cell(measures.get('threads_after'))}",
                f"{cell(measures.get('processes_before'))} > {cell(measures.get('processes_after'))}",
                cell(measures.get("threads_started_per_save"), digits=2),
            ]
        )
    plain = median(measured["plain_write_seconds"])
    state = measured["state_bytes"]
    return "\n".join(
        [
            f"state {state / 1e6:.0f} MB; {machine['cores']} cores; {machine['file_system']}; torch {machine['torch']}",
            f"a plain O_DIRECT write of the state takes {plain:.2f} s ({state / plain / 1e9:.2f} GB/s)",
            "",
            columns(times),
            "",
            columns(costs),
        ]
    )
