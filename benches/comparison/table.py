"""What was measured, as text."""

from __future__ import annotations

from typing import Any

from measuring import figures
from measuring.figures import ABSENT, cell, size_text

from .summary import OURS, spans
from .systems import Entry

Rows = list[list[str]]


def _copied(probe: dict[str, Any] | None) -> str:
    if probe is None:
        return ABSENT
    return "kept" if probe["immutable"] else "yes" if probe["copied"] else "NO"


def _verifies(probe: dict[str, Any] | None) -> str:
    if probe is None:
        return ABSENT
    return {"refused": "yes", "restored unnoticed": "no"}.get(probe["damage"].split(":")[0], "?")


def render(measured: dict[str, Any], systems: dict[str, Entry], markdown: bool = False) -> str:
    """For every size tables of times, costs and ratios, then what must be said beside them."""
    text = figures.markdown if markdown else figures.columns
    machine = measured["machine"]
    parts = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; "
        f"{machine['file_system']} on {machine['device']}; Linux {machine['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in measured["versions"].items()),
        "",
        "Medians over the rounds (least..greatest); later saves unless a column says first. benches/README.md "
        "explains the columns.",
    ]
    for size in sorted({entry["size"] for entry in measured["summary"]}):
        entries = [entry for entry in measured["summary"] if entry["size"] == size]
        parts += [
            f"\n{size_text(size)}, {spans(entries)}, each time in a fresh process",
            "",
            text(_times(entries, measured["probes"], systems)),
            "",
            text(_costs(entries, measured["probes"], systems)),
        ]
        peers = [entry for entry in entries if any(entry.get(f"durable_over_{ours}") for ours in OURS)]
        if peers:
            parts += [
                "\nTimes of a peer over those of PCcheck direct in the same round; *: of PCcheck with pool = state",
                "",
                text(_ratios(peers, measured["probes"], systems)),
            ]
    parts += _remarks(measured)
    return "\n".join(parts)


def _times(entries: list[dict[str, Any]], probes: dict[str, Any], systems: dict[str, Entry]) -> Rows:
    head = ["system", "GB/s to durable", "of the ceiling", "first GB/s", "first/later"]
    rows = [[*head, "trainer waits ms", "first ms", "copied"]]
    for entry in entries:
        found, system = entry["measures"], systems[entry["system"]]
        # No trainer waits for a ceiling.
        waits = {} if system.group == "ceiling" else found
        rows.append(
            [
                system.label,
                cell(found["durable_gb_per_second"], 1, 2, True),
                "NOT DURABLE" if entry["flaws"] else cell(entry.get("share_of_ceiling"), 1, 2, True),
                cell(found["first_durable_gb_per_second"], 1, 2),
                cell(found["first_over_later"], 1, 2),
                cell(waits.get("blocked_seconds"), 1e3, 1, True),
                cell(waits.get("first_blocked_seconds"), 1e3, 1),
                _copied(probes.get(entry["system"])),
            ]
        )
    return rows


def _costs(entries: list[dict[str, Any]], probes: dict[str, Any], systems: dict[str, Entry]) -> Rows:
    head = ["system", "CPU s/GB", "machine s/GB", "extra MB", "cache MB"]
    rows = [[*head, "opened s", "reopened s", "restored s", "verifies"]]
    for entry in entries:
        found = entry["measures"]
        rows.append(
            [
                systems[entry["system"]].label,
                cell(found["cpu_seconds_per_gb"], 1, 2, True),
                cell(found["machine_cpu_seconds_per_gb"], 1, 2),
                cell(found["extra_bytes"], 1e-6),
                cell(found.get("cached_bytes"), 1e-6),
                cell(found["open_seconds"], 1, 2),
                cell(found["reopen_seconds"], 1, 2),
                cell(found["restore_seconds"], 1, 3, True),
                _verifies(probes.get(entry["system"])),
            ]
        )
    return rows


def _ratios(entries: list[dict[str, Any]], probes: dict[str, Any], systems: dict[str, Entry]) -> Rows:
    marks = ("", "*")
    rows = [["peer", *(f"{what}{mark}" for mark in marks for what in ("durable", "first durable", "trainer waits"))]]
    for entry in entries:
        # Who has not copied the state by then has not let the trainer go on in the same sense.
        copied = _copied(probes.get(entry["system"]))
        row = [systems[entry["system"]].label]
        for ours in OURS:
            row += [cell(entry.get(f"{what}_over_{ours}"), 1, 2, True) for what in ("durable", "first_durable")]
            waits = cell(entry.get(f"blocked_over_{ours}"), 1, 2, True)
            row.append(waits if copied in ("yes", ABSENT) else "not copied")
        rows.append(row)
    return rows


def _remarks(measured: dict[str, Any]) -> list[str]:
    remarks = [
        f"{size_text(entry['size'])}, {entry['system']}: not durable, so not compared: {entry['flaws'][0]}"
        for entry in measured["summary"]
        if entry["flaws"]
    ]
    remarks += [
        f"{name}: {probe['damage']}" for name, probe in measured["probes"].items() if "not tried" in probe["damage"]
    ]
    remarks += [
        f"{size_text(each['size'])}, {each['system']}: left out: {each['reason']}" for each in measured["left_out"]
    ]
    failures: dict[tuple[str, str], int] = {}
    for each in measured["failed"]:
        # The JSON holds all that it said.
        found = (each["system"], each["message"].splitlines()[-1])
        failures[found] = failures.get(found, 0) + 1
    remarks += [f"{system}: FAILED {count} times: {why}" for (system, why), count in failures.items()]
    if measured["interrupted"]:
        remarks.append("interrupted: not every round is complete")
    return ["", *remarks] if remarks else []
