"""Figures and tables as plain text, alike on the terminal and on the pages.

Input: figures, None where there are none. Output: text. Invariant: figures are rounded here, and nowhere before.
"""

from __future__ import annotations

from collections.abc import Sequence


def figure(value: float | None) -> str:
    """Write a figure with four decimals."""
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """Write a difference."""
    return "-" if value is None else f"{value:+.4f}"


def with_minus(text: str) -> str:
    """Write the sign of a figure as pages do: a minus, as wide as a plus; a hyphen alone stands for no figure."""
    return f"\u2212{text[1:]}" if text.startswith("-") and len(text) > 1 else text


def chance(value: float | None) -> str:
    """Write a p-value, a small one by its power of ten, and one that is too small for a float as less than that."""
    return figure(value) if value is None or value >= 0.0001 else f"{value:.0e}" if value else "<1e-300"


def option_name(name: str) -> str:
    """Write the name of a field of `Config` as the command line has it."""
    return "--scores FILE" if name == "scores_file" else f"--{name.replace('_', '-')}"


def short(value: object) -> str:
    """Write the value of an option or a fact of a run."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table, the first one to the left; a line each, the header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
