"""What a caller in Python gets: a run that a notebook shows as a table, and progress in a cell.

Input: the content of `run.json`, and `Progress` records. Output: HTML, and lines of text. Invariant: the figures are
those of the summary, and no name in them is read as HTML.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, TextIO

from pipeline.results.progress import Progress, progress_line
from pipeline.results.summary import classifier_rows

_LINE_SECONDS = 0.2


class Run(dict[str, Any]):
    """A finished run, as `evaluate` returns it: what `run.json` holds, by the same keys.

    The accuracies are in `run["metrics"]`, a dictionary for each row of `metrics.parquet`; the tables are in the folder
    `run["out"]`. A notebook shows the table of classifiers.
    """

    def _repr_html_(self) -> str:
        header, *rows = classifier_rows(self["metrics"])
        caption = (
            f"{self['num_valid']:,} validation images of {self['dataset']['root']}, {self['num_train']:,} to train on; "
            f"results in {self['out']}"
        )
        body = "".join(_html_row(row, "td") for row in rows)
        return (
            f"<table><caption>{escape(caption)}</caption><thead>{_html_row(header, 'th')}</thead>"
            f"<tbody>{body}</tbody></table>"
        )


def _html_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def progress(stream: TextIO | None = None) -> Callable[[Progress], None]:
    """Return a function that shows how far a job is, for `evaluate`'s `on_progress`, in a notebook's cell or a log.

    Each phase is a line, written anew from its beginning several times a second: a cell needs no widget for it.

    Args:
        stream: Where to; standard output by default.
    """
    out = stream or sys.stdout
    first: Progress | None = None
    last: Progress | None = None
    shown, next_time, is_open = "", 0.0, False

    def write(now: Progress) -> None:
        nonlocal shown
        line = progress_line(now, first)
        # Blanks over the rest of a longer line: not every cell knows how to erase one.
        out.write(f"\r{line.ljust(len(shown))}")
        shown = line

    def end_line() -> None:
        nonlocal is_open
        out.write("\n")
        is_open = False

    def show(now: Progress) -> None:
        nonlocal first, last, shown, next_time, is_open
        if last is None or last.phase != now.phase or last.units > now.units:
            if last is not None and is_open:
                write(last)
                end_line()
            first, shown, next_time, is_open = now, "", 0.0, True
        last = now
        is_done = now.share in (None, 1.0)  # what has no known length never changes, and what comes next is not ours
        if is_open and (is_done or time.monotonic() >= next_time):
            write(now)
            next_time = time.monotonic() + _LINE_SECONDS
            if is_done:
                end_line()
            out.flush()

    return show
