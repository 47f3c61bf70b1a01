"""What the page of a finished run shows, read from its tables.

Input: the result tables and `run.json`. Output: a `Draft`. Invariant: of no table more is kept than is shown, however
large the table is.

K classes, R pairs of classes that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import OutputError
from pipeline.results.figures import best_classifier
from pipeline.results.finished import FinishedRun, labels_of, read_batches, read_rows, with_other
from pipeline.results.mistakes import Found, Wanted
from pipeline.results.writing import Output

GUESSING = "majority_class"
_NUM_PAIRS = 40
_NUM_SUSPECTS = 16
_NUM_GROUPS, _NUM_OF_GROUP = 8, 2
_NUM_SKIPPED_EXAMPLES = 3


@dataclass(frozen=True)
class Confusion:
    """One classifier's counts: names of the K classes; and int64 [3, R], the true class, the predicted one, images."""

    classes: tuple[str, ...]
    counts_3R: npt.NDArray[np.int64]

    def worst_pairs(self) -> list[tuple[str, str, int]]:
        """Return the most confused pairs of classes with their images, most first."""
        true_R, predicted_R, num_R = self.counts_3R
        wrong = np.flatnonzero(true_R != predicted_R)
        order = wrong[np.lexsort((predicted_R[wrong], true_R[wrong], -num_R[wrong]))][:_NUM_PAIRS]
        return [(self.classes[true_R[pair]], self.classes[predicted_R[pair]], int(num_R[pair])) for pair in order]


@dataclass
class Draft:
    """What the page shows, before pictures.

    Attributes:
        output: The results.
        run: What `run.json` holds.
        confusions: By classifier.
        history: Rows of `history.parquet`; none without SGD.
        suspects: The first rows of `suspects.parquet`.
        exact: The first groups with the same pixels, each the rows of its first images, with the number of all.
        near: The first pairs of near-duplicates.
        skipped: The first rows of `skipped.parquet` of each reason.
        wanted: What is to be found in the predictions.
        example: The image that is shown as numbers; None for the worst mistake.
        found: What was found in the predictions.
    """

    output: Output
    run: Mapping[str, Any]
    confusions: dict[str, Confusion]
    history: list[dict[str, Any]]
    suspects: list[dict[str, Any]]
    exact: list[tuple[int, list[dict[str, Any]]]]
    near: list[list[dict[str, Any]]]
    skipped: dict[str, list[dict[str, Any]]]
    wanted: Wanted
    example: str | None
    found: Found = field(default_factory=Found)

    @property
    def best(self) -> str:
        """The classifier with the highest accuracy."""
        return self.wanted.best

    @cached_property
    def by_pair(self) -> dict[tuple[str, str], list[str]]:
        """By pair of classes, the names of the best classifier's worst mistakes, once they are found."""
        return self.found.by_pair(self.wanted)

    @property
    def example_key(self) -> str | None:
        """The image that is shown as numbers."""
        worst = self.found.worst(self.best) or ([self.found.first] if self.found.first else [])
        return self.example or (worst[0].key if worst else None)


def open_draft(finished: FinishedRun, example: str | None = None) -> Draft:
    """Read all tables but the predictions, no more of each than is shown.

    Raises:
        OutputError: If a table cannot be read.
    """
    output, run, names = finished.output, finished.run, finished.classifiers
    classes = with_other(finished.all_classes)
    confusions = _read_confusions(output, classes, len(finished.classes))
    if missing := [name for name in names if name not in confusions]:
        raise OutputError(f"{output.root}/confusion.parquet: expected counts of {missing[0]}, got none; run again")
    best = best_classifier(run["metrics"])
    suspects = read_rows(output, "suspects", 0, _NUM_SUSPECTS)
    keys = {row["key"] for row in suspects} | ({example} if example else set())
    wanted = Wanted(
        classes=classes,
        # The most frequent class for every image is wrong where one expects it, and has no scores.
        classifiers=tuple(name for name in names if name != GUESSING),
        best=best,
        pairs=tuple((given, predicted) for given, predicted, _ in confusions[best].worst_pairs()),
        keys=frozenset(keys),
    )
    num_exact = run["duplicates"]["num_exact_images"]
    return Draft(
        output=output,
        run=run,
        confusions=confusions,
        history=read_rows(output, "history"),
        suspects=suspects,
        exact=_read_groups(output),
        near=_pairs_of(read_rows(output, "duplicates", num_exact, 2 * _NUM_GROUPS)),
        skipped=_read_skipped(output, run),
        wanted=wanted,
        example=example,
    )


def _read_confusions(output: Output, classes: Sequence[str], num_own: int) -> dict[str, Confusion]:
    """Read each classifier's counts; of classes behind the dataset's own, those are kept that are predicted."""
    labels = {name: label for label, name in enumerate(classes)}
    found: dict[str, list[npt.NDArray[np.int64]]] = {}
    for batch in read_batches(output, "confusion"):
        counts_3R = np.stack(
            [labels_of(batch[name], labels) for name in ("true_class", "predicted_class")]
            + [batch["num_images"].to_numpy()]
        )
        names = batch["classifier"].dictionary_encode()
        for number, name in enumerate(names.dictionary.to_pylist()):
            found.setdefault(name, []).append(counts_3R[:, names.indices.to_numpy() == number])
    return {name: _confusion(classes, np.concatenate(parts, 1), num_own) for name, parts in found.items()}


def _confusion(classes: Sequence[str], counts_3R: npt.NDArray[np.int64], num_own: int) -> Confusion:
    kept = [*range(num_own), *np.unique(counts_3R[1][counts_3R[1] >= num_own]).tolist()]
    counts_3R[1] = np.searchsorted(kept, counts_3R[1])
    return Confusion(tuple(classes[label] for label in kept), counts_3R)


def _read_groups(output: Output) -> list[tuple[int, list[dict[str, Any]]]]:
    """Read the first groups of images with the same pixels: how many images, and the first of them."""
    groups: list[tuple[int, list[dict[str, Any]]]] = []
    for batch in read_batches(output, "duplicates"):
        for row in batch.to_pylist():
            if row["kind"] != "exact" or (len(groups) == _NUM_GROUPS and row["group"] != groups[-1][1][0]["group"]):
                return groups
            if not groups or row["group"] != groups[-1][1][0]["group"]:
                groups.append((0, []))
            size, rows = groups.pop()
            groups.append((size + 1, [*rows, row] if len(rows) < _NUM_OF_GROUP else rows))
    return groups


def _pairs_of(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [rows[start : start + 2] for start in range(0, len(rows) - 1, 2)]


def _read_skipped(output: Output, run: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Read the first skipped images of each reason."""
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in run["num_skipped_by_reason"]}
    for batch in read_batches(output, "skipped"):
        if all(
            len(rows) >= min(_NUM_SKIPPED_EXAMPLES, run["num_skipped_by_reason"][each]) for each, rows in found.items()
        ):
            break
        for row in batch.to_pylist():
            if len(found.setdefault(row["reason"], [])) < _NUM_SKIPPED_EXAMPLES:
                found[row["reason"]].append(row)
    return found
