"""The page that shows two finished runs side by side, in the dress of a run's own page.

Input: a `Comparison`. Output: one HTML file. Invariant: every figure on it is one of the comparison's tables; it holds
a bounded number of rows and pictures, so that it stays below 5 MB; what cannot be shown is named. It needs no Ray:
pictures are made by threads of this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from pipeline import __version__
from pipeline.data import lookup
from pipeline.data.files import ReadFault
from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import Picture, make_picture
from pipeline.errors import EvaluationError, without_secrets
from pipeline.results import charts, pages
from pipeline.results.comparison import Paired, holm
from pipeline.results.comparison_text import CHANGES, about_lines, changed_rows, pair_name
from pipeline.results.texts import short
from pipeline.results.two_runs import PAGE, Comparison, Pair
from pipeline.results.writing import Output, write_file

# Rows of all pairs' tables of classes; and changed images of each kind, of one pair and of all.
_MAX_CLASS_ROWS, _MAX_SHOWN, _MAX_ALL_SHOWN = 2000, 12, 240
# Of the pairs that differ, so many are named; and the p-value from which on chance may be all.
_MAX_NAMED, _SIGNIFICANT = 5, 0.05
# Files that are in memory at a time, and threads that decode them.
_ROUND_FILES, _MAX_THREADS = 16, 4
_CONTENTS = (
    ("headline", "Headline"), ("pairs", "Accuracies"), ("classes", "By class"), ("changes", "Changed images"),
    ("options", "What differs"),
)  # fmt: skip


def write_page(output: Output, comparison: Comparison) -> None:
    """Write `compare.html`.

    Raises:
        OutputError: If it cannot be written.
    """
    num_shown = max(2, min(_MAX_SHOWN, _MAX_ALL_SHOWN // (2 * len(comparison.pairs))))
    pairs = [_show_pair(pair, comparison, num_shown) for pair in comparison.pairs]
    keys = [row["key"] for pair in pairs for change in pair["changes"] for row in change["rows"]]
    runs = [comparison.a.run] if comparison.a is comparison.b else [comparison.a.run, comparison.b.run]
    pictures = _make_pictures(runs, dict.fromkeys(keys), pages.picture_bytes(len(keys)))
    main = next((index for index, pair in enumerate(pairs) if pair["is_best"]), 0)
    ends = [abs(end) for pair in pairs for end in (pair["all"].difference_low, pair["all"].difference_high)]
    verdict, others = _in_words(comparison.pairs, main)
    page = {
        "contents": _CONTENTS,
        "tabs": [(letter, len(pairs)) for letter in ("c", "m")],
        "version": __version__,
        "dataset_name": pages.dataset_name(comparison.a.run),
        "is_one_run": comparison.a is comparison.b,
        "where": [without_secrets(run.given) for run in (comparison.a, comparison.b)],
        "notes": about_lines(comparison),
        "num_images": comparison.num_images,
        "pairs": pairs,
        "main": main,
        "limit": charts.round_limit(max(ends)),
        "verdict": verdict,
        "others": others,
        "differences": [(name, short(own), short(other)) for name, own, other in comparison.differences],
    }
    content = pages.render("compare.html.j2", page, pictures)
    write_file(output, PAGE, lambda stream: stream.write(content))


def _in_words(pairs: Sequence[Pair], main: int) -> tuple[str, str | None]:
    """Say by the main pair which run is better, and of the other pairs in how many one is."""
    pair, own = pairs[main], pairs[main].rows[0]
    judges = f"{pair.classifier_a} (A) and {pair.classifier_b} (B)"
    if pair.classifier_a == pair.classifier_b:
        judges = pair.classifier_a
    verdict = f"a difference as small as this is what chance alone makes on {own.num_images:,} images"
    if not own.num_only_a and not own.num_only_b:
        verdict = "both get the same images right"
    elif _differs(own.p_value):
        verdict = f"{_better(own)} gets more of these images right than chance alone explains"
    rest = [each for index, each in enumerate(pairs) if index != main]
    corrected = holm([each.rows[0].p_value or 0.0 for each in rest])
    parts, left = [], len(rest)
    for side in "BA":
        named = [
            pair_name(each)
            for each, p_value in zip(rest, corrected, strict=True)
            if _differs(p_value) and _better(each.rows[0]) == side
        ]
        if named:
            more = [f"{len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
            parts.append(f"{side} is better by {', '.join([*named[:_MAX_NAMED], *more])}")
            left -= len(named)
    if left:
        parts.append(
            f"of {left} a difference cannot be told from chance" if parts else "no difference can be told from chance"
        )
    other = "pair" if len(rest) == 1 else f"{len(rest)} pairs"
    others = f"By the other {other}: {'; '.join(parts)} (p below {_SIGNIFICANT}, by Holm's method)."
    return f"By {judges}, {verdict}.", others if rest else None


def _better(row: Paired) -> str:
    return "B" if row.num_only_b > row.num_only_a else "A"


def _differs(p_value: float | None) -> bool:
    return p_value is not None and p_value < _SIGNIFICANT


def _show_pair(pair: Pair, comparison: Comparison, num_shown: int) -> dict[str, Any]:
    """Return what the page shows of a pair: figures, the classes that differ most, the most certain changes."""
    rows = [row for row in pair.rows[1:] if row.p_value is not None]
    num_rows = max(1, _MAX_CLASS_ROWS // len(comparison.pairs))
    shown = rows if len(rows) <= num_rows else sorted(rows, key=lambda row: row.p_value or 0.0)[:num_rows]
    numbers = (pair.rows[0].num_only_a, pair.rows[0].num_only_b)
    return {
        "name": pair_name(pair),
        "is_best": pair.is_best,
        "classifiers": (pair.classifier_a, pair.classifier_b),
        "all": pair.rows[0],
        "classes": shown,
        "num_classes": len(rows),
        "changes": [
            {"words": words, "number": number, "rows": changed_rows(pair, change, num_shown)}
            for (change, words), number in zip(CHANGES.items(), numbers, strict=True)
        ],
    }


def _make_pictures(
    runs: list[Mapping[str, Any]], keys: Mapping[str, None], max_bytes: int
) -> dict[str, Picture | Fault]:
    """Make the pictures of some images, which are where the first run found them, or else where the second one did."""
    missing = Fault("unreadable", "no file of this name")
    pictures: dict[str, Picture | Fault] = dict.fromkeys(keys, missing)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for run in runs:
            wanted = [key for key, found in pictures.items() if isinstance(found, Fault)]
            images = _read(run, wanted)
            while some := list(islice(images, _ROUND_FILES)):
                names, contents = zip(*some, strict=True)
                pictures.update(zip(names, pool.map(lambda data: make_picture(data, max_bytes), contents), strict=True))
    return pictures


def _read(run: Mapping[str, Any], keys: list[str]) -> Iterator[tuple[str, bytes | ReadFault]]:
    if not keys:
        return
    try:
        yield from lookup.read_images(lookup.locate_again(run), keys)
    except EvaluationError:  # options of another version, or storage that cannot be reached: they stay named
        return
