"""Draws what training.py measured: slowdown, stall per save and memory of each arm. Also a command: plot.py IN OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

OURS, OTHERS = "#1f6f8b", "#b8bec4"
PANELS = (
    ("slowdown", 100, "training slowdown, %"),
    ("stall_seconds_per_save", 1000, "trainer stalled per save, ms"),
    ("extra_memory_bytes", 1e-6, "peak extra memory, MB"),
)


def _panel(axes: Axes, summary: dict[str, Any], names: list[str], measure: str, scale: float, title: str) -> None:
    spreads = [summary[name].get(measure, {"median": 0, "least": 0, "greatest": 0}) for name in names]
    middles = [spread["median"] * scale for spread in spreads]
    errors = [
        [middle - spread["least"] * scale for middle, spread in zip(middles, spreads, strict=True)],
        [spread["greatest"] * scale - middle for middle, spread in zip(middles, spreads, strict=True)],
    ]
    colors = [OURS if name.startswith("pccheck") else OTHERS for name in names]
    axes.barh(names, middles, xerr=errors, color=colors, error_kw={"elinewidth": 1, "capsize": 2})
    for row, (middle, spread) in enumerate(zip(middles, spreads, strict=True)):
        axes.annotate(
            f"{middle:.1f}" if abs(middle) < 10 else f"{middle:.0f}",
            (max(spread["greatest"] * scale, 0), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()


def draw(measured: dict[str, Any], path: Path) -> None:
    """Writes the picture; the suffix of the path says in which format."""
    summary = measured["summary"]
    # By interval, then arm, so that what should be compared stands together.
    names = sorted(
        (name for name in summary if name != "none"), key=lambda n: (int(n.rsplit("/", 1)[1]), n != "pccheck")
    )
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(12, 1.2 + 0.32 * len(names)), sharey=True)
    for axes, (measure, scale, title) in zip(panels, PANELS, strict=True):
        _panel(axes, summary, names, measure, scale, title)
    machine, iteration = measured["machine"], summary["none"]["iteration_seconds"]["median"]
    figure.text(
        0.01,
        0.01,
        f"GPT, state of {measured['state_bytes'] / 1e6:.0f} MB, {iteration:.2f} s per iteration without saves, "
        f"{machine['cores']} cores, {machine['file_system']}; arm/iterations per save; "
        "bars: medians over rounds, lines: least to greatest",
        fontsize=8,
        color="#555",
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: plot.py RESULT.json PICTURE.svg (or .png)")
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
