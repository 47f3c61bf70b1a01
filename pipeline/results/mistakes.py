"""Which rows of the predictions are worth a look: the worst mistakes of each classifier, and those that are asked for.

Input: batches of a part of the predictions. Output: a few hundred rows. Invariant: which rows are chosen depends on the
tables alone, not on how they are parted; only chosen rows become Python objects.

Of a mistake, the lead is by how much the predicted class's score beats that of the given class: of probabilities and
votes by being larger, of distances by being smaller. N rows, K classes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.results.finished import OTHER, labels_of

NUM_WORST = 12
NUM_OF_PAIR = 3
NUM_NEIGHBORS = 2


@dataclass(frozen=True)
class Wanted:
    """What to look for.

    Attributes:
        classes: Names of the K classes.
        classifiers: Of which the worst mistakes are wanted.
        best: The classifier of which mistakes by pair of classes are wanted.
        pairs: These pairs, given and predicted.
        keys: Images that are wanted whatever is predicted.
    """

    classes: tuple[str, ...]
    classifiers: tuple[str, ...]
    best: str
    pairs: frozenset[tuple[str, str]]
    keys: frozenset[str]


@dataclass(frozen=True)
class Mistake:
    """One image that a classifier gets wrong, or gets at all, with what is known of it.

    Attributes:
        key: Its name.
        given: Its class.
        predicted: What the classifier answers.
        lead: How far ahead the predicted class is; None without scores.
        scores: Of the predicted and of the given class; None without scores.
        neighbors: Key, class and distance of its nearest training images, nearest first.
        order: By which mistakes are sorted, the worst first.
    """

    key: str
    given: str
    predicted: str
    lead: float | None
    scores: tuple[float, float] | None
    neighbors: tuple[tuple[str, str, float], ...]
    order: tuple[float, float, int, int]


@dataclass
class Found:
    """What some parts hold of what is wanted.

    Attributes:
        worst: By classifier, the worst mistakes, worst first.
        by_pair: By pair of classes, the worst mistakes of the best classifier.
        by_key: The images that were asked for, as the best classifier sees them.
        first: The first image of all, as the best classifier sees it.
    """

    worst: dict[str, list[Mistake]]
    by_pair: dict[tuple[str, str], list[Mistake]]
    by_key: dict[str, Mistake]
    first: Mistake | None


def columns_of(wanted: Wanted) -> list[str]:
    """Name the columns of the predictions that `find` reads."""
    names = ("prediction", "scores")
    own = [f"{classifier}_{name}" for classifier in {wanted.best, *wanted.classifiers} for name in names]
    return ["key", "class", *sorted(own), "neighbor_keys", "neighbor_classes", "neighbor_distances"]


def find(batches: Iterable[pa.RecordBatch], part: int, wanted: Wanted) -> Found:
    """Find what is wanted in one part of the predictions."""
    found = Found({name: [] for name in wanted.classifiers}, {}, {}, None)
    start = 0
    for batch in batches:
        _find_in_batch(batch, (part, start), wanted, found)
        start += len(batch)
    return found


def merge(parts: Sequence[Found]) -> Found:
    """Put together what several parts hold."""
    merged = Found({}, {}, {}, next((part.first for part in parts if part.first), None))
    for part in parts:
        for name, mistakes in part.worst.items():
            merged.worst[name] = _worst(NUM_WORST, [*merged.worst.get(name, []), *mistakes])
        for pair, mistakes in part.by_pair.items():
            merged.by_pair[pair] = _worst(NUM_OF_PAIR, [*merged.by_pair.get(pair, []), *mistakes])
        merged.by_key.update(part.by_key)
    return merged


def _worst(number: int, mistakes: Iterable[Mistake]) -> list[Mistake]:
    return heapq.nsmallest(number, mistakes, key=lambda mistake: mistake.order)


def _find_in_batch(batch: pa.RecordBatch, place: tuple[int, int], wanted: Wanted, found: Found) -> None:
    labels = {name: label for label, name in enumerate(wanted.classes)}
    given_N = labels_of(batch["class"], labels)
    for name in dict.fromkeys((*wanted.classifiers, wanted.best)):
        answers = _answers(batch, name, given_N, labels)
        wrong = np.flatnonzero(answers.predicted_N != given_N)
        wrong = wrong[np.lexsort((wrong, answers.distance_N[wrong], -answers.lead_N[wrong]))].tolist()
        if name in wanted.classifiers:
            own = [_mistake(batch, answers, row, place) for row in wrong[:NUM_WORST]]
            found.worst[name] = _worst(NUM_WORST, [*found.worst[name], *own])
        if name == wanted.best:
            _find_pairs(batch, answers, wrong, place, wanted, found)
            keys = batch["key"].to_pylist() if wanted.keys else []
            for row in (row for row, key in enumerate(keys) if key in wanted.keys):
                found.by_key[keys[row]] = _mistake(batch, answers, row, place)
            if found.first is None and len(batch):
                found.first = _mistake(batch, answers, 0, place)


def _find_pairs(
    batch: pa.RecordBatch, answers: _Answers, wrong: list[int], place: tuple[int, int], wanted: Wanted, found: Found
) -> None:
    own: dict[tuple[str, str], list[Mistake]] = {}
    for row in wrong:
        pair = answers.names[answers.given_N[row]], answers.names[answers.predicted_N[row]]
        if pair in wanted.pairs and len(own.setdefault(pair, [])) < NUM_OF_PAIR:
            own[pair].append(_mistake(batch, answers, row, place))
    for pair, mistakes in own.items():
        found.by_pair[pair] = _worst(NUM_OF_PAIR, [*found.by_pair.get(pair, []), *mistakes])


@dataclass(frozen=True)
class _Answers:
    """What one classifier says of a batch: predictions, scores of predicted and given class, and the lead of one."""

    names: list[str]
    given_N: npt.NDArray[np.int64]
    predicted_N: npt.NDArray[np.int64]
    scores_2N: npt.NDArray[np.float32] | None
    lead_N: npt.NDArray[np.float32]
    distance_N: npt.NDArray[np.float32]


def _answers(batch: pa.RecordBatch, name: str, given_N: npt.NDArray[np.int64], labels: dict[str, int]) -> _Answers:
    num_rows = len(batch)
    predicted_N = labels_of(batch[f"{name}_prediction"], labels)
    scores_2N, lead_N = None, np.zeros(num_rows, np.float32)
    if f"{name}_scores" in batch.schema.names:
        scores_NK = batch[f"{name}_scores"].flatten().to_numpy().reshape(num_rows, len(labels))
        rows_N = np.arange(num_rows)
        # Of a class that the dataset lacks, K, no score is kept.
        is_kept_N = predicted_N < len(labels)
        own_N = np.where(is_kept_N, scores_NK[rows_N, np.where(is_kept_N, predicted_N, 0)], np.nan)
        scores_2N = np.stack((own_N, scores_NK[rows_N, given_N]))
        # Whose class could not be predicted, for want of a score, is no mistake to look at first.
        lead_N = np.abs(np.subtract(*np.where(np.isfinite(scores_2N).all(0), scores_2N, 0)))
    distance_N = np.zeros(num_rows, np.float32)
    if "neighbor_distances" in batch.schema.names and num_rows:
        distance_N = batch["neighbor_distances"].flatten().to_numpy().reshape(num_rows, -1)[:, 0]
    return _Answers([*labels, OTHER], given_N, predicted_N, scores_2N, lead_N, distance_N)


def _mistake(batch: pa.RecordBatch, answers: _Answers, row: int, place: tuple[int, int]) -> Mistake:
    part, start = place
    lead, scores = float(answers.lead_N[row]), answers.scores_2N
    if scores is not None and not np.isfinite(scores[:, row]).all():
        scores = None
    neighbors: tuple[tuple[str, str, float], ...] = ()
    if "neighbor_keys" in batch.schema.names:
        columns = (batch[f"neighbor_{name}"][row].as_py() for name in ("keys", "classes", "distances"))
        neighbors = tuple(zip(*columns, strict=True))
    return Mistake(
        key=batch["key"][row].as_py(),
        given=answers.names[answers.given_N[row]],
        predicted=answers.names[answers.predicted_N[row]],
        lead=None if scores is None else lead,
        scores=None if scores is None else (float(scores[0, row]), float(scores[1, row])),
        neighbors=neighbors,
        order=(-lead, float(answers.distance_N[row]), part, start + row),
    )
