"""The summary of a run: plain lines in a log, tables drawn by `rich` on a terminal.

Input: the content of `run.json`. Output: text. Invariant: `rich`, 30 ms of start-up, is loaded
only where a terminal is attached; both forms show the same figures, which are rounded only for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.data.files import name_ignored
from pipeline.errors import counted, printable
from pipeline.results.figures import best_classifier, classifier_names
from pipeline.results.progress import make_console
from pipeline.results.texts import figure, plain_table
from pipeline.results.writing import REPORT_FILE

if TYPE_CHECKING:
    from rich.table import Table

# With more classes than this, the worst and the best are shown, so many of each.
_MAX_CLASSES = 10
_ENDS = 5
# Why training ended, by `stopped_by`.
STOPS = {
    "epochs": "as many as asked for",
    "target_accuracy": "the target accuracy was reached",
    "patience": "the validation accuracy got no better",
    "max_seconds": "the time was over",
}
_COPIED = ("results", "sha256", "page")
_LABEL_WIDTH, _MIN_NAME_WIDTH, _TEXT_WIDTH = 9, 16, 109
_GAP = 3  # between the columns of a table of `rich`


def headline(run: Mapping[str, Any]) -> str:
    """Say in one line which classifier is best, how good that is, and how the training went."""
    totals = {row["classifier"]: row for row in run["metrics"] if row["scope"] == "all"}
    best, guessing = totals[best_classifier(run["metrics"])], totals.get("majority_class")
    interval = f"{figure(best['accuracy_low'])} to {figure(best['accuracy_high'])}"
    parts = [f"best: {best['classifier']} {figure(best['accuracy'])} ({interval})"]
    if guessing is not None:
        parts.append(f"guessing {figure(guessing['accuracy'])}")
    if last := run["last_epoch"]:
        epochs = f"{last['epoch']} epoch{'' if last['epoch'] == 1 else 's'} ({STOPS[run['stopped_by']]})"
        parts.append(f"sgd_linear {figure(last['train_accuracy'])} on training images after {epochs}")
    return "; ".join(parts)


def summary(run: Mapping[str, Any]) -> str:
    """Format a finished run for a log: a headline, classifiers, accuracies by class, counts, times, the page."""
    title, classes = _class_rows(run["metrics"])
    facts = [line for label, text in _facts(run) for line in _lines(label, text)]
    table = plain_table(classifier_rows(run["metrics"]))
    return "\n".join([headline(run), "", *table, "", title, *plain_table(classes), "", *facts])


def _lines(label: str, text: str) -> list[str]:
    """Write a fact as lines that a log shows whole, or as one line if it is there to be copied."""
    parts = [text]
    if label not in _COPIED:
        parts = textwrap.wrap(text, _TEXT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"{label if not number else '':<{_LABEL_WIDTH}}  {part}" for number, part in enumerate(parts)]


def print_summary(run: Mapping[str, Any], stream: TextIO) -> None:
    """Show a finished run on a terminal: the same as `summary`, as tables that fit its width."""
    from rich.table import Table
    from rich.text import Text

    console, best = make_console(stream), best_classifier(run["metrics"])
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


def classifier_rows(metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of classifiers, its header first, from the rows of `metrics.parquet`."""
    found = {(row["classifier"], row["scope"]): row for row in metrics if row["scope"] != "class"}
    has_top = any(row["top5_accuracy"] is not None for row in found.values())
    rows = [["classifier", "accuracy", "95 % interval", *["top 5"][:has_top], "mean of classes", "mean F1", "right"]]
    for name in classifier_names(metrics):
        total, mean = found[name, "all"], found[name, "mean_of_classes"]
        interval = f"{figure(total['accuracy_low'])} to {figure(total['accuracy_high'])}"
        right = f"{total['num_correct']:,} of {total['num_images']:,}"
        top = [figure(total["top5_accuracy"])][:has_top]
        means = [figure(mean["accuracy"]), figure(mean["f1"])]
        rows.append([name, figure(total["accuracy"]), interval, *top, *means, right])
    return rows


def _class_rows(metrics: Sequence[Mapping[str, Any]]) -> tuple[str, list[list[str]]]:
    """Return a title, and the table of accuracies by class (rows) and classifier (columns), its header first.

    Of many classes, the worst and the best for the classifier with the highest accuracy are shown.
    """
    names, best = classifier_names(metrics), best_classifier(metrics)
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
            *(figure(by_class[name][each]["accuracy"]) for each in names),
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
        *([("model", _model(run["model"]))] if run.get("model") else []),
        ("twins", _twins(run)),
        *([("labels", _labels(run["neighbors"], run["duplicates"]["num_conflicts"]))] if run["neighbors"] else []),
        ("seconds", f"{seconds['total']:.1f} ({phases})"),
        ("computed", "on " + ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))),
        ("results", printable(run["out"])),
        ("sha256", run["results_sha256"]),
        *([("page", f"{run['out']}/{REPORT_FILE}")] if run["options"]["report"] else []),
    ]


def _model(model: Mapping[str, Any]) -> str:
    wanted = model["input"]
    kind = f"{model['num_outputs']:,} {'logits' if model['output'] == 'logits' else 'features'}"
    batches = f"batches of {model['batch_size']}, {model['images_per_s']:,.0f} images a second"
    shape = f"{wanted['height']}x{wanted['width']} {wanted['mode']}"
    return f"{kind} of {shape} from {printable(model['file'])}, {batches}; the limit was {model['limit']}"


def _twins(run: Mapping[str, Any]) -> str:
    counts, neighbors = run["duplicates"], run["neighbors"]
    parts = ["no images with the same pixels"]
    if counts["num_exact_groups"]:
        groups = counted(counts["num_exact_groups"], "group")
        parts = [f"{counts['num_exact_images']:,} images in {groups} with the same pixels (duplicates.parquet)"]
    if counts["num_conflicts"]:
        parts.append(f"{counts['num_conflicts']:,} of several classes (suspects.parquet)")
    if neighbors is None:
        return "; ".join([*parts, _have_twins(counts["num_exact_twins"])])
    by = " by the model's features" if neighbors.get("by") == "features" else ""
    twins = f"{_have_twins(neighbors['num_twins'])}{by}"
    if neighbors["num_twins"]:
        figures = ", ".join(f"{name} {figure(value)}" for name, value in neighbors["accuracy_without_twins"].items())
        near, them = neighbors["num_near_twins"], "it" if neighbors["num_twins"] == 1 else "them"
        twins += f", {near:,} of them changed a little; accuracy without {them}: {figures}"
    return "; ".join([*parts, twins])


def _have_twins(number: int) -> str:
    return f"{counted(number, 'validation image')} {'has' if number == 1 else 'have'} a twin in training"


def _labels(neighbors: Mapping[str, Any], num_conflicts: int) -> str:
    number = neighbors["num_suspects"] - num_conflicts  # which the line before counts
    noun = "image" if neighbors["of"] == "all" else "validation image"
    look = "looks" if number == 1 else "look"
    if neighbors.get("by") == "features":
        look = f"{'is' if number == 1 else 'are'} by the model's features"
    return f"{counted(number, noun)} {look} more like another class (suspects.parquet)"


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
