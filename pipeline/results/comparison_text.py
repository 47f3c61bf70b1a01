"""A comparison as a terminal shows it, and as JSON.

Input: a `Comparison`. Output: text, or what `--json` prints. Invariant: both have the figures of the tables, which are
rounded in the text alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.errors import counted, printable, without_secrets
from pipeline.results.comparison import Paired
from pipeline.results.finished import FinishedRun
from pipeline.results.texts import chance, figure, plain_table, short, signed
from pipeline.results.two_runs import Comparison, Pair

# The classes with the smallest p-values, and of each kind of change the most certain images.
_MAX_CLASSES, _MAX_CHANGES, _MAX_JSON_CHANGES = 10, 5, 100
# How the names of classifiers begin that see an image as pixels, or as a model's features.
_ON_IMAGES = ("knn_", "nearest_mean_", "sgd_linear")
CHANGES = {"right_to_wrong": "right in A and wrong in B", "wrong_to_right": "wrong in A and right in B"}


def comparison_text(comparison: Comparison) -> str:
    """Format a comparison: all pairs; of the best one, or of those that were asked for, classes and changed images."""
    header = ["B less A, of all images", "A", "B", "B - A", "95 % interval", "only A", "only B", "p"]
    rows = [header, *([pair_name(pair), *_figures(pair.rows[0], pair.rows[0].p_value)] for pair in comparison.pairs)]
    lines = [*_heading(comparison), "", *plain_table(rows)]
    for pair in [pair for pair in comparison.pairs if pair.is_best] or comparison.pairs:
        if pair.changes.num_rows:
            lines += ["", *_class_lines(pair), *_change_lines(pair)]
        else:
            lines += ["", f"{pair_name(pair)}: no image changed"]
    if comparison.a is not comparison.b:
        lines += ["", *_difference_lines(comparison)]
    return "\n".join(lines)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Lay a comparison out for `--json`; of the changed images the most certain ones, a hundred of each kind."""
    return {
        "a": _about(comparison, "a"),
        "b": _about(comparison, "b"),
        "num_images": comparison.num_images,
        "num_only_in_a": comparison.num_only_in_a,
        "num_only_in_b": comparison.num_only_in_b,
        "differences": [{"name": name, "a": own, "b": other} for name, own, other in comparison.differences],
        "pairs": [
            {
                "classifier_a": pair.classifier_a,
                "classifier_b": pair.classifier_b,
                "is_best": pair.is_best,
                "all": _plain(pair.rows[0]),
                "classes": [{"class": row.class_name, **_plain(row)} for row in pair.rows[1:]],
                **{change: changed_rows(pair, change, _MAX_JSON_CHANGES) for change in CHANGES},
            }
            for pair in comparison.pairs
        ],
    }


def _about(comparison: Comparison, side: str) -> dict[str, Any]:
    finished = comparison.a if side == "a" else comparison.b
    run = finished.run
    return {
        "out": without_secrets(finished.given),
        "began": run.get("began"),
        "num_valid": run["num_valid"],
        "results_sha256": run.get("results_sha256"),
        "classifiers": finished.classifiers,
    }


def _plain(row: Paired) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in ("scope", "class_name")}


def changed_rows(pair: Pair, change: str, most: int) -> list[dict[str, Any]]:
    """Return the first changed images of a kind, without what all of them share."""
    num = pair.rows[0].num_only_a
    rows = pair.changes[:num] if change == "right_to_wrong" else pair.changes[num:]
    found: list[dict[str, Any]] = rows[:most].drop_columns(["classifier_a", "classifier_b", "change"]).to_pylist()
    return found


def about_lines(comparison: Comparison) -> list[str]:
    """Say what two runs have in common, and what of them is not compared."""
    a, b = comparison.a, comparison.b
    if a is b:
        return [counted(comparison.num_images, "validation image")]
    lines = [
        f"{counted(comparison.num_images, 'validation image')} in both, {comparison.num_only_in_a:,} only in A, "
        f"{comparison.num_only_in_b:,} only in B"
    ]
    if "dataset.root" in (name for name, _, _ in comparison.differences):
        lines.append("the runs read different datasets, or one at two places: images are matched by their keys alone")
    # Of the same name, but not of the same kind.
    if unlike := [name for name in a.classifiers if name in b.classifiers and name.startswith(_ON_IMAGES)]:
        words = f"compare {_kind(a)} in A and {_kind(b)} in B"
        if a.features and b.features:
            words = "compare features of two models"
        if a.features != b.features:
            lines.append(f"{', '.join(unlike)} {words}: two classifiers of one name")
    for name, own, others in (("A", a.classifiers, b.classifiers), ("B", b.classifiers, a.classifiers)):
        if alone := [classifier for classifier in own if classifier not in others]:
            lines.append(f"only {name} has {', '.join(alone)}")
    return lines


def _kind(run: FinishedRun) -> str:
    return "features of a model" if run.features else "pixels"


def _heading(comparison: Comparison) -> list[str]:
    a, b = (printable(without_secrets(run.given)) for run in (comparison.a, comparison.b))
    lines = about_lines(comparison)
    if comparison.a is comparison.b:
        return [f"two classifiers, A and B, of {a}: {lines[0]}"]
    return [f"A  {a}", f"B  {b}", *lines]


def pair_name(pair: Pair) -> str:
    """Name a pair of classifiers as an option does, and say whether it is that of the best."""
    same = pair.classifier_a == pair.classifier_b
    name = pair.classifier_a if same else f"{pair.classifier_a}:{pair.classifier_b}"
    return f"{name} (best)" if pair.is_best else name


def _figures(row: Paired, p_value: float | None) -> list[str]:
    if row.difference is None:
        return ["-"] * 7
    return [
        figure(row.accuracy_a),
        figure(row.accuracy_b),
        signed(row.difference),
        f"{signed(row.difference_low)} to {signed(row.difference_high)}",
        f"{row.num_only_a:,}",
        f"{row.num_only_b:,}",
        chance(p_value),
    ]


def _class_lines(pair: Pair) -> list[str]:
    rows = [row for row in pair.rows[1:] if row.p_value is not None]
    title = f"{pair_name(pair)} by class, p corrected for {len(rows)} classes by Holm's method"
    shown = rows
    if len(rows) > _MAX_CLASSES:
        shown = sorted(rows, key=lambda row: row.p_value or 0.0)[:_MAX_CLASSES]
        title += f"; the {_MAX_CLASSES} that differ most"
    header = ["class", "A", "B", "B - A", "95 % interval", "only A", "only B", "p (Holm)"]
    return [
        title,
        *plain_table([header, *([printable(str(row.class_name)), *_figures(row, row.p_value_holm)] for row in shown)]),
    ]


def _change_lines(pair: Pair) -> list[str]:
    lines = []
    numbers = (pair.rows[0].num_only_a, pair.rows[0].num_only_b)
    for (change, words), number in zip(CHANGES.items(), numbers, strict=True):
        shown = changed_rows(pair, change, _MAX_CHANGES)
        lines += ["", f"{counted(number, 'image')} {words}" + (f", the {len(shown)} most certain" if shown else "")]
        header = ["key", "class", "in A", "in B", "certainty"]
        if shown:
            lines += plain_table([header, *([_text(value) for value in row.values()] for row in shown)])
    return lines


def _text(value: str | float | None) -> str:
    return printable(value) if isinstance(value, str) else figure(value)


def _difference_lines(comparison: Comparison) -> list[str]:
    if not comparison.differences:
        return ["the runs have the same options and versions"]
    rows = [[name, printable(short(own)), printable(short(other))] for name, own, other in comparison.differences]
    return ["what the runs were made with, where it differs", *plain_table([["", "A", "B"], *rows])]
