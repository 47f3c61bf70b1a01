"""Progress and the summary of a run: plain lines in a log, drawn by `rich` on a terminal.

Input: `Progress` records and the content of `run.json`. Output: text. Invariant: `rich`, 30 ms of start-up, is loaded
only where a terminal is attached; both forms show the same figures, which are rounded only here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.data.files import name_ignored
from pipeline.errors import printable
from pipeline.results.writing import REPORT_FILE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# With more classes than this, the worst and the best are shown, so many of each.
_MAX_CLASSES = 10
_ENDS = 5
_BAR_STEP, _MAX_BAR = 10, 30
_NO_FIGURE = "-"
# Why training ended, by `stopped_by`.
STOPS = {
    "epochs": "as many as asked for",
    "target_accuracy": "the target accuracy was reached",
    "patience": "the validation accuracy got no better",
    "max_seconds": "the time was over",
}
_COPIED = ("results", "sha256", "page")
_LABEL_WIDTH, _MIN_NAME_WIDTH = 9, 16
_GAP = 3  # between the columns of a table of `rich`


@dataclass(frozen=True)
class Progress:
    """How far a phase is.

    Attributes:
        phase: `start`, `nodes`, `GPUs`, `scan`, `times`, `decode`, `means`, `train`, `neighbors`, `score`,
            `duplicates` or `report`.
        done: Nodes or GPUs that are there, archives indexed, files whose times are known, images decoded or skipped,
            steps of the epoch, parts written, or buckets of digests grouped.
        total: Of how many.
        seconds: Since the phase began.
        epoch: While training, the epoch under way, from 1.
        num_epochs: The most epochs there will be.
        loss: While training, the mean training loss of the last finished epoch, in nats.
    """

    phase: str
    done: int
    total: int
    seconds: float
    epoch: int | None = None
    num_epochs: int | None = None
    loss: float | None = None

    @property
    def units(self) -> tuple[int, int]:
        """Units done and in all; those of training are the steps of all epochs."""
        if self.epoch is None or self.num_epochs is None or self.phase != "train":
            return self.done, self.total
        return (self.epoch - 1) * self.total + self.done, self.num_epochs * self.total

    @property
    def share(self) -> float | None:
        """The share that is done, 0 to 1; None where it cannot be known."""
        done, total = self.units
        return (
            None if self.phase in ("start", "scores", "means", "duplicates", "report") or total == 0 else done / total
        )


# What is of an unknown length.
_WAITS = {
    "scores": ["the images are listed", "matching the scores with them"],
    "means": ["all images are decoded", "computing the class means"],
    "duplicates": ["all images are scored", "grouping those with the same pixels"],
    "report": ["the results are complete", "making the page"],
}


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines on a stream can be redrawn; a dumb terminal is a log."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def progress_line(progress: Progress, first: Progress | None = None) -> str:
    """Say in one line how far the work is, how fast, and how long it still takes."""
    return ", ".join(progress_parts(progress, first))


def progress_parts(progress: Progress, first: Progress | None = None) -> list[str]:
    """Say how far the work is: the main thing, then details, of which the last is the most important.

    Args:
        progress: As it stands.
        first: The first progress of the phase in this run: a resumed training does not begin at zero.
    """
    done, total = f"{progress.done:,}", f"{progress.total:,}"
    match progress.phase:
        case "start":
            return ["starting Ray and listing the images"]
        case "nodes" | "GPUs":
            return [f"waiting for the cluster's {progress.phase}", f"{done} of {total} are there"]
        case "scan":
            return [f"indexed {done} of {total} archives"]
        case "times":
            return [f"looked up {done} of {total} files for the cache"]
        case "decode" if progress.done == 0:
            return [f"starting to decode {total} images"]
        case "decode":
            return [f"decoded {done} of {total} images", *_speed(progress, first)]
        case "scores" | "means" | "duplicates" | "report":
            return _WAITS[progress.phase]
        case "neighbors":
            return [f"searched the neighbors of {done} of {total} images", *_speed(progress, first)]
        case "train":
            loss = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
            speed = [] if first is None else _speed(progress, first)
            return [f"epoch {progress.epoch} of {progress.num_epochs}", f"step {done} of {total}", *loss, *speed]
        case _:
            return [f"scored {done} of {total} prediction files", *_speed(progress, first)]


def _speed(progress: Progress, first: Progress | None) -> list[str]:
    """Return the mean rate of the phase and the time left at that rate; nothing before there is a rate."""
    done, total = progress.units
    num_done = done - (first.units[0] if first else 0)
    seconds = progress.seconds - (first.seconds if first else 0.0)
    if num_done <= 0 or seconds <= 0:
        return []
    rate = num_done / seconds
    return [
        f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second",
        f"{_duration((total - done) / rate)} left",
    ]


class StatusLine:
    """The last line of a terminal, which is redrawn in place, as wide as the terminal at most.

    This is not `rich.progress.Progress`, which hides the cursor: where Ray's compiled code ends the process, the
    terminal would stay without one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = _make_console(stream)
        self._is_drawn = False

    def draw(self, parts: Sequence[str], share: float | None = None) -> None:
        """Draw a bar, if a share is known and there is space for it, and as many parts of the text as fit."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        _fit_to_terminal(self._console)  # whose size may have changed
        space = self._console.width - 1  # in the last column, terminals wrap
        kept = list(parts)
        while len(kept) > 1 and len(", ".join(kept)) > space:
            kept.pop(-2 if len(kept) > 2 else -1)
        text = Text(", ".join(kept))
        text.truncate(space, overflow="ellipsis")
        # In steps, so that the text stays where it is while its length changes by a digit.
        width = min(_MAX_BAR, (space - text.cell_len - 1) // _BAR_STEP * _BAR_STEP)
        with self._console:  # one write
            self._erase()
            if share is not None and width > 0:
                self._console.print(ProgressBar(1.0, share, width), " ", sep="", end="")
            self._console.print(text, end="")
        self._is_drawn = True

    def clear(self) -> None:
        """Erase the line, before a line that stays."""
        if self._is_drawn:
            self._erase()
            self._is_drawn = False

    def _erase(self) -> None:
        from rich.control import Control
        from rich.segment import ControlType

        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


def headline(run: Mapping[str, Any]) -> str:
    """Say in one line which classifier is best, how good that is, and how the training went."""
    totals = {row["classifier"]: row for row in run["metrics"] if row["scope"] == "all"}
    best, guessing = totals[_best_classifier(run["metrics"])], totals.get("majority_class")
    interval = f"{_figure(best['accuracy_low'])} to {_figure(best['accuracy_high'])}"
    parts = [f"best: {best['classifier']} {_figure(best['accuracy'])} ({interval})"]
    if guessing is not None:
        parts.append(f"guessing {_figure(guessing['accuracy'])}")
    if last := run["last_epoch"]:
        epochs = f"{last['epoch']} epoch{'' if last['epoch'] == 1 else 's'} ({STOPS[run['stopped_by']]})"
        parts.append(f"sgd_linear {_figure(last['train_accuracy'])} on training images after {epochs}")
    return "; ".join(parts)


def summary(run: Mapping[str, Any]) -> str:
    """Format a finished run for a log: a headline, classifiers, accuracies by class, counts, times, the page."""
    title, classes = _class_rows(run["metrics"])
    facts = [f"{label:<{_LABEL_WIDTH}}  {text}" for label, text in _facts(run)]
    table = plain_table(classifier_rows(run["metrics"]))
    return "\n".join([headline(run), "", *table, "", title, *plain_table(classes), "", *facts])


def print_summary(run: Mapping[str, Any], stream: TextIO) -> None:
    """Show a finished run on a terminal: the same as `summary`, as tables that fit its width."""
    from rich.table import Table
    from rich.text import Text

    console, best = _make_console(stream), _best_classifier(run["metrics"])
    console.print(Text(headline(run), style="bold"), "")
    classifiers = _fit(
        classifier_rows(run["metrics"]),
        console.width,
        ["mean F1", "mean of classes", "right", "95 % interval", "top 5"],
    )
    console.print(_rich_table(classifiers, [row[0] == best for row in classifiers]), "")
    title, all_classes = _class_rows(run["metrics"])
    classes = _fit(all_classes, console.width, [*(name for name in all_classes[0][2:] if name != best), "images"])
    if len(classes[0]) < len(all_classes[0]):
        title += "; other classifiers in metrics.parquet"
    console.print(Text(title), _rich_table(classes), "")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", min_width=_LABEL_WIDTH)
    rows = _facts(run)
    for label, text in rows:
        if label not in _COPIED:
            facts.add_row(label, Text(text))
    console.print(facts)
    # Left to the terminal to wrap, so that it can be copied.
    for label, text in (row for row in rows if row[0] in _COPIED):
        console.print(Text.assemble((f"{label:<{_LABEL_WIDTH}}", "bold"), f"  {text}"), soft_wrap=True)


def _make_console(stream: TextIO) -> Console:
    from rich.console import Console

    console = Console(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False)
    _fit_to_terminal(console)
    return console


def _fit_to_terminal(console: Console) -> None:
    """Take the width of the stream's own terminal: COLUMNS, which `rich` prefers, may be that of another one."""
    with suppress(OSError):
        if columns := os.get_terminal_size(console.file.fileno()).columns:
            console.width = columns


def _classifiers(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["classifier"] for row in metrics))


def _best_classifier(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for row in metrics if row["scope"] == "all"]
    return str(max(rows, key=lambda row: row["accuracy"] or 0.0)["classifier"])


def classifier_rows(metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of classifiers, its header first, from the rows of `metrics.parquet`."""
    found = {(row["classifier"], row["scope"]): row for row in metrics if row["scope"] != "class"}
    has_top = any(row["top5_accuracy"] is not None for row in found.values())
    rows = [["classifier", "accuracy", "95 % interval", *["top 5"][:has_top], "mean of classes", "mean F1", "right"]]
    for name in _classifiers(metrics):
        total, mean = found[name, "all"], found[name, "mean_of_classes"]
        interval = f"{_figure(total['accuracy_low'])} to {_figure(total['accuracy_high'])}"
        right = f"{total['num_correct']:,} of {total['num_images']:,}"
        top = [_figure(total["top5_accuracy"])][:has_top]
        means = [_figure(mean["accuracy"]), _figure(mean["f1"])]
        rows.append([name, _figure(total["accuracy"]), interval, *top, *means, right])
    return rows


def _class_rows(metrics: Sequence[Mapping[str, Any]]) -> tuple[str, list[list[str]]]:
    """Return a title, and the table of accuracies by class (rows) and classifier (columns), its header first.

    Of many classes, the worst and the best for the classifier with the highest accuracy are shown.
    """
    names, best = _classifiers(metrics), _best_classifier(metrics)
    by_class: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in metrics:
        if row["scope"] == "class":
            by_class.setdefault(row["class"], {})[row["classifier"]] = row
    title, shown, gap = "accuracy by class", list(by_class), 0
    if len(by_class) > _MAX_CLASSES:
        filled = [name for name, own in by_class.items() if own[best]["accuracy"] is not None]
        shown = sorted(filled, key=lambda name: by_class[name][best]["accuracy"])
        gap = max(0, len(shown) - 2 * _ENDS)
    if gap:
        title += f", the {_ENDS} worst and the {_ENDS} best of {len(filled):,} for {best}"
        shown = [*shown[:_ENDS], *shown[-_ENDS:]]
    rows = [
        [
            printable(name),
            f"{by_class[name][best]['num_images']:,}",
            *(_figure(by_class[name][each]["accuracy"]) for each in names),
        ]
        for name in shown
    ]
    if gap:
        rows.insert(_ENDS, ["..."] + [""] * (1 + len(names)))
    return title, [["class", "images", *names], *rows]


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    target, seconds = run["target"], run["seconds"]
    kept = f", {run['num_shards_from_cache']:,} of {run['num_shards']:,} shards from the cache"
    phases = ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items() if phase != "total")
    ignored = name_ignored(run["dataset"]["num_ignored_files"])
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in run["num_skipped_by_reason"].items())
    skipped = f"{run['num_skipped']:,} skipped" + (f" ({reasons}; see skipped.parquet)" if reasons else "")
    devices = run["actors"]["devices"]
    return [
        (
            "images",
            f"{run['num_listed']:,} listed: {run['num_train']:,} to train on, {run['num_valid']:,} to validate on, "
            f"{skipped}; {run['num_resized']:,} resized; other files ignored: {ignored}",
        ),
        (
            "decoded",
            f"to {target['height']}x{target['width']} {target['mode']}, {run['images_per_s']:,.0f} a second"
            + (kept if run["options"]["cache"] is not None else ""),
        ),
        ("twins", _twins(run)),
        *([("labels", _labels(run["neighbors"]))] if run["neighbors"] else []),
        ("seconds", f"{seconds['total']:.1f} ({phases})"),
        ("computed", "on " + ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))),
        ("results", printable(run["out"])),
        ("sha256", run["results_sha256"]),
        *([("page", f"{run['out']}/{REPORT_FILE}")] if run["options"]["report"] else []),
    ]


def _twins(run: Mapping[str, Any]) -> str:
    counts, neighbors = run["duplicates"], run["neighbors"]
    parts = ["no images with the same pixels"]
    if counts["num_exact_groups"]:
        found = f"{counts['num_exact_images']:,} images in {counts['num_exact_groups']:,} groups with the same pixels"
        parts = [f"{found} (duplicates.parquet)"]
    if counts["num_conflicts"]:
        parts.append(f"{counts['num_conflicts']:,} of several classes (suspects.parquet)")
    if neighbors is None:
        return "; ".join([*parts, f"{counts['num_exact_twins']:,} validation images have a twin in training"])
    twins = f"{neighbors['num_twins']:,} validation images have a twin in training"
    if neighbors["num_twins"]:
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in neighbors["accuracy_without_twins"].items())
        twins += f", {neighbors['num_near_twins']:,} of them changed a little; accuracy without them: {figures}"
    return "; ".join([*parts, twins])


def _labels(neighbors: Mapping[str, Any]) -> str:
    split = "images" if neighbors["of"] == "all" else "validation images"
    return f"{neighbors['num_suspects']:,} {split} look more like another class (suspects.parquet)"


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table, the first one to the left; a line each, the header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _rich_table(rows: Sequence[Sequence[str]], is_bold: Sequence[bool] = ()) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text(rows[0][0]), overflow="fold")
    for heading in rows[0][1:]:
        table.add_column(Text(_foldable(heading)), justify="right", no_wrap=True)
    for index, row in enumerate(rows[1:], 1):
        table.add_row(*map(Text, row), style="bold" if is_bold and is_bold[index] else None)
    return table


def _fit(rows: list[list[str]], width: int, droppable: Sequence[str]) -> list[list[str]]:
    """Leave out columns, by their headings, until a table fits a width; names in the first column can be folded."""
    for heading in droppable:
        if heading not in rows[0]:
            continue
        lines = [[rows[0][0], *map(_foldable, rows[0][1:])], *rows[1:]]
        widths = [max(_cell_width(cell) for cell in column) for column in zip(*lines, strict=True)]
        if min(widths[0], _MIN_NAME_WIDTH) + sum(widths[1:]) + _GAP * (len(widths) - 1) <= width:
            break
        index = rows[0].index(heading)
        rows = [[*row[:index], *row[index + 1 :]] for row in rows]
    return rows


def _cell_width(cell: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, cell.split("\n")))


def _foldable(heading: str) -> str:
    """Break a heading in two: a classifier's name after its first word, "mean of classes" after "of"."""
    return heading.replace("_", "_\n", 1).replace(" of ", " of\n")


def _figure(value: float | None) -> str:
    return _NO_FIGURE if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
