"""Medians with their spreads, and columns of text."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

#: where there is no figure
ABSENT = "-"


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest over the rounds."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(values: list[float]) -> Spread | None:
        return Spread(median(values), min(values), max(values)) if values else None

    def text(self, scale: float = 1, digits: int = 0) -> str:
        """`1.23 (1.10..1.40)`"""
        middle, least, greatest = (f"{x * scale:.{digits}f}" for x in (self.median, self.least, self.greatest))
        return f"{middle} ({least}..{greatest})"


def cell(found: dict[str, Any] | None, scale: float = 1, digits: int = 0, spread: bool = False) -> str:
    """A spread, as JSON holds it, for a table: its median, or all of it."""
    if found is None:
        return ABSENT
    return Spread(**found).text(scale, digits) if spread else f"{found['median'] * scale:.{digits}f}"


def size_text(size: int) -> str:
    """`100 MB`, `4 GB`"""
    return f"{size / 1e9:g} GB" if size >= 1e9 else f"{size / 1e6:g} MB"


def columns(rows: list[list[str]]) -> str:
    """A table: the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """The same as a table of Markdown."""
    head, *body = rows
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))
