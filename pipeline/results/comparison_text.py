"""A comparison as a terminal shows it, and as JSON.

Input: a `Comparison`. Output: text, or what `--json` prints. Invariant: both have the figures of the tables, which are
rounded in the text alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.errors import printable, without_secrets
from pipeline.results.comparison import Paired
from pipeline.results.terminal import plain_table
from pipeline.results.two_runs import Comparison, Pair

# The classes with the smallest p-values, and of each kind of change the most certain images.
_MAX_CLASSES, _MAX_CHANGES, _MAX_JSON_CHANGES = 10, 5, 100
_CHANGES = {"right_to_wrong": "right in A and wrong in B", "wrong_to_right": "wrong in A and right in B"}


def comparison_text(comparison: Comparison) -> str:
    """Format a comparison: all pairs; of the best one, or of those that were asked for, classes and changed images."""
    header = ["B less A, of all images", "A", "B", "B - A", "95 % interval", "only A", "only B", "p"]
    rows = [header, *([_pair_name(pair), *_figures(pair.rows[0], pair.rows[0].p_value)] for pair in comparison.pairs)]
    lines = [*_heading(comparison), "", *plain_table(rows)]
    for pair in [pair for pair in comparison.pairs if pair.is_best] or comparison.pairs:
        if pair.changes.num_rows:
            lines += ["", *_class_lines(pair), *_change_lines(pair)]
        else:
            lines += ["", f"{_pair_name(pair)}: no image changed"]
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
                **{change: _changed(pair, change, _MAX_JSON_CHANGES) for change in _CHANGES},
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


def _changed(pair: Pair, change: str, most: int) -> list[dict[str, Any]]:
    """Return the first changed images of a kind, without what all of them share."""
    num = pair.rows[0].num_only_a
    rows = pair.changes[:num] if change == "right_to_wrong" else pair.changes[num:]
    found: list[dict[str, Any]] = rows[:most].drop_columns(["classifier_a", "classifier_b", "change"]).to_pylist()
    return found


def _heading(comparison: Comparison) -> list[str]:
    a, b = comparison.a, comparison.b
    if a is b:
        where = printable(without_secrets(a.given))
        return [f"two classifiers, A and B, of {where}: {comparison.num_images:,} validation images"]
    lines = [f"{name}  {printable(without_secrets(run.given))}" for name, run in (("A", a), ("B", b))]
    lines.append(
        f"{comparison.num_images:,} validation images in both, {comparison.num_only_in_a:,} only in A, "
        f"{comparison.num_only_in_b:,} only in B"
    )
    if "dataset.root" in (name for name, _, _ in comparison.differences):
        lines.append("the runs read different datasets, or one at two places: images are matched by their keys alone")
    for name, own, others in (("A", a.classifiers, b.classifiers), ("B", b.classifiers, a.classifiers)):
        if alone := [classifier for classifier in own if classifier not in others]:
            lines.append(f"only {name} has {', '.join(alone)}")
    return lines


def _pair_name(pair: Pair) -> str:
    same = pair.classifier_a == pair.classifier_b
    name = pair.classifier_a if same else f"{pair.classifier_a}:{pair.classifier_b}"
    return f"{name} (best)" if pair.is_best else name


def _figures(row: Paired, p_value: float | None) -> list[str]:
    if row.difference is None:
        return ["-"] * 7
    return [
        f"{row.accuracy_a:.4f}",
        f"{row.accuracy_b:.4f}",
        f"{row.difference:+.4f}",
        f"{row.difference_low:+.4f} to {row.difference_high:+.4f}",
        f"{row.num_only_a:,}",
        f"{row.num_only_b:,}",
        _p_text(p_value),
    ]


def _p_text(p_value: float | None) -> str:
    return "-" if p_value is None else f"{p_value:.4f}" if p_value >= 0.0001 else f"{p_value:.0e}"


def _class_lines(pair: Pair) -> list[str]:
    rows = [row for row in pair.rows[1:] if row.p_value is not None]
    title = f"{_pair_name(pair)} by class, p corrected for {len(rows)} classes by Holm's method"
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
    for (change, words), number in zip(_CHANGES.items(), numbers, strict=True):
        shown = _changed(pair, change, _MAX_CHANGES)
        lines += ["", f"{number:,} images {words}" + (f", the {len(shown)} most certain" if shown else "")]
        header = ["key", "class", "in A", "in B", "certainty"]
        if shown:
            lines += plain_table([header, *([_text(value) for value in row.values()] for row in shown)])
    return lines


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def _difference_lines(comparison: Comparison) -> list[str]:
    if not comparison.differences:
        return ["the runs have the same options and versions"]
    rows = [[name, _short(own), _short(other)] for name, own, other in comparison.differences]
    return ["what the runs were made with, where it differs", *plain_table([["", "A", "B"], *rows])]


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return printable(",".join(map(str, value))) or "none"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else printable(str(value))
