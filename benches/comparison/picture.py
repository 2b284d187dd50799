"""Draws a result: a row per system, a panel per measure, a dot per size. Also `python -m comparison.picture IN OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from measuring.figures import size_text  # noqa: E402

from .summary import spans  # noqa: E402
from .systems import entry_of  # noqa: E402

#: from the smallest size to the largest, light to dark
SHADES = {
    "ceiling": ("#d9b38c", "#8c5a1f"),
    "pccheck": ("#9fd0de", "#0b4f66"),
    "peer": ("#c3c9cf", "#2f353b"),
}
GROUPS = ("ceiling", "pccheck", "peer")
#: between the dots of one row, of its height
STEP = 0.19
LOG_TICKS = (1, 2, 5)

Entry = dict[str, Any]
Measure = Callable[[Entry], dict[str, float] | None]


def _measure(name: str) -> Measure:
    return lambda entry: entry["measures"].get(name)


def _cost(name: str) -> Measure:
    """Of systems only: a ceiling has no trainer beside it."""
    return lambda entry: None if entry_of(entry["system"]).group == "ceiling" else entry["measures"].get(name)


def _memory(entry: Entry) -> dict[str, float] | None:
    """Process and page cache together, as a multiple of the state."""
    if entry_of(entry["system"]).group == "ceiling":
        return None
    extra, cached = entry["measures"]["extra_bytes"], entry["measures"].get("cached_bytes")
    if cached is None:
        return None
    return {name: (extra[name] + cached[name]) / entry["size"] for name in extra}


WAITS = "←  trainer waits, s per GB"
#: title, measure, measure of the first save, logarithmic
PANELS: tuple[tuple[str, Measure, Measure | None, bool], ...] = (
    ("GB/s to durable  →", _measure("durable_gb_per_second"), _measure("first_durable_gb_per_second"), False),
    (WAITS, _cost("blocked_seconds_per_gb"), None, True),
    ("←  CPU seconds per GB", _cost("cpu_seconds_per_gb"), None, True),
    ("←  memory + cache, × state", _memory, None, True),
    ("GB/s to restored  →", _measure("restore_gb_per_second"), None, False),
)


def _mix(light: str, dark: str, share: float) -> str:
    (r, g, b), (to_r, to_g, to_b) = to_rgb(light), to_rgb(dark)
    return to_hex((r + (to_r - r) * share, g + (to_g - g) * share, b + (to_b - b) * share))


def _color(group: str, sizes: list[int], size: int) -> str:
    return _mix(*SHADES[group], sizes.index(size) / (len(sizes) - 1) if len(sizes) > 1 else 1.0)


def _rows(summary: list[Entry]) -> list[str]:
    """Ceilings, PCcheck, then peers, the fastest at the largest size first."""
    largest = {}
    for entry in summary:
        largest[entry["system"]] = entry["measures"]["durable_gb_per_second"]["median"]
    return sorted(largest, key=lambda name: (GROUPS.index(entry_of(name).group), -largest[name]))


def _panel(axes: Axes, summary: list[Entry], rows: list[str], sizes: list[int], panel: Any, uncopied: set[str]) -> None:
    title, measure, first, logarithmic = panel
    for entry in summary:
        group = entry_of(entry["system"]).group
        color = _color(group, sizes, entry["size"])
        at = rows.index(entry["system"]) + (sizes.index(entry["size"]) - (len(sizes) - 1) / 2) * STEP
        for what, filled in ((first, False), (measure, True)):
            found = what(entry) if what else None
            if found is None:
                continue
            axes.plot([found["least"], found["greatest"]], [at, at], color=color, linewidth=1.4, alpha=0.7, zorder=2)
            face = color if filled else "white"
            marker = "x" if title == WAITS and entry["system"] in uncopied else "o"
            axes.plot(found["median"], at, marker, markersize=5, color=color, markerfacecolor=face, zorder=3)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=LOG_TICKS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", color="#e3e6e8", linewidth=0.8, zorder=0)
    axes.tick_params(axis="both", which="both", length=0, labelsize=8.5)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f6f7f8", zorder=0)


def _legend(figure: Any, sizes: list[int]) -> None:
    handles = []
    for size in sizes:
        color = _color("peer", sizes, size)
        handles.append(Line2D([], [], marker="o", linestyle="", color=color, label=size_text(size)))
    hollow = Line2D([], [], marker="o", linestyle="", color="#3c434a", markerfacecolor="white", label="first save")
    cross = Line2D([], [], marker="x", linestyle="", color="#3c434a", label="goes on before it is copied")
    handles += [hollow, cross]
    figure.legend(handles=handles, loc="upper right", ncol=len(handles), frameon=False, fontsize=9)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Writes the picture; the suffix of the path says in which format."""
    # What is not durable when it says so, or lies in memory, has not done the same work.
    summary = [entry for entry in measured["summary"] if not entry["flaws"] and not entry_of(entry["system"]).in_memory]
    sizes, rows = sorted({entry["size"] for entry in summary}), _rows(summary)
    uncopied = {name for name, probe in measured["probes"].items() if probe["immutable"] or not probe["copied"]}
    height = 1.1 + 0.42 * len(rows)
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(15.5, height), sharey=True)
    for axes, panel in zip(panels, PANELS, strict=True):
        _panel(axes, summary, rows, sizes, panel, uncopied)
    panels[0].set_yticks(range(len(rows)), [entry_of(name).label for name in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for label, name in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_color(SHADES[entry_of(name).group][1])
    _legend(figure, sizes)
    machine = measured["machine"]
    figure.text(
        0.005,
        0.008,
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; "
        f"{machine['file_system']} on {machine['device']}; float32 CPU tensors; "
        f"{spans(summary)}, each time in a fresh process; dots: medians, lines: ranges, arrows: better",
        fontsize=8.5,
        color="#555",
    )
    figure.suptitle("Saving the same state", x=0.005, y=1 - 0.08 / height, ha="left", va="top", fontsize=13)
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.3 / height), w_pad=1.2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m comparison.picture RESULT.json PICTURE.svg (or .png)")
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
