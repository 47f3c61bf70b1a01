"""Which images are worth a look: the worst mistakes of each classifier, also by pair of classes, and those asked for.

Input: predictions, as they are about to be written or as they are read again. Output: a few rows of them. Invariant:
which rows are chosen depends on the predictions alone, not on how they are parted or when they are looked at; only
chosen rows become Python objects.

Of a mistake, the lead is by how much the predicted class's score beats that of the given class: of probabilities and
votes by being larger, of distances by being smaller. Equal leads are sorted by the distance to the nearest training
image, then by the listing. N rows, K classes; R mistakes, at most `NUM_OF_PAIR` of each pair of classes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.results.finished import labels_of

NUM_WORST = 12
NUM_OF_PAIR = 3
NUM_NEIGHBORS = 2
_NEIGHBORS = ("neighbor_keys", "neighbor_classes", "neighbor_distances")


@dataclass(frozen=True)
class Mistake:
    """One image that a classifier gets wrong, or gets at all, with what is known of it.

    Attributes:
        key: Its name.
        given: Its class.
        predicted: What the classifier answers.
        scores: Of the predicted and of the given class; None without scores, or where nobody asks.
        neighbors: Key, class and distance of its nearest training images, nearest first.
        order: By which mistakes are sorted, the worst first, and equal ones in the order of the listing.
    """

    key: str
    given: str
    predicted: str
    scores: tuple[float, float] | None
    neighbors: tuple[tuple[str, str, float], ...]
    order: tuple[float, float]


@dataclass(frozen=True)
class Noted:
    """The worst mistakes of one classifier in some rows.

    Attributes:
        worst: The worst of all, worst first.
        pairs_R: The classes of the worst of each pair, given · K + predicted, int64.
        order_R2: Their `order`, float32.
        keys_R: Their names.
    """

    worst: list[Mistake]
    pairs_R: npt.NDArray[np.int64]
    order_R2: npt.NDArray[np.float32]
    keys_R: pa.StringArray


@dataclass(frozen=True)
class Wanted:
    """What a page shows of the predictions.

    Attributes:
        classes: Names of the K classes, of further ones that a model may predict, and of all others.
        classifiers: Of which the worst mistakes are wanted.
        best: The classifier of which mistakes by pair of classes are wanted.
        pairs: These pairs, given and predicted.
        keys: Images that are wanted whatever is predicted.
    """

    classes: tuple[str, ...]
    classifiers: tuple[str, ...]
    best: str
    pairs: tuple[tuple[str, str], ...]
    keys: frozenset[str]


@dataclass
class Found:
    """What some parts hold of what is wanted.

    Attributes:
        noted: By classifier its worst mistakes; by pair of classes only those of the best, and of the wanted pairs.
        by_key: The images that were asked for, as the best classifier sees them.
        first: The first image of all, likewise.
    """

    noted: dict[str, Noted] = field(default_factory=dict)
    by_key: dict[str, Mistake] = field(default_factory=dict)
    first: Mistake | None = None

    def worst(self, classifier: str) -> list[Mistake]:
        """Return a classifier's worst mistakes, worst first."""
        return self.noted[classifier].worst if classifier in self.noted else []

    def by_pair(self, wanted: Wanted) -> dict[tuple[str, str], list[str]]:
        """Return by pair of classes, in the order in which pairs are wanted, the names of the worst mistakes."""
        noted, labels = self.noted.get(wanted.best), _labels(wanted.classes)
        if noted is None:
            return {}
        numbers = {pair: labels[pair[0]] * len(labels) + labels[pair[1]] for pair in wanted.pairs}
        keys = {
            pair: noted.keys_R.filter(pa.array(noted.pairs_R == number)).to_pylist() for pair, number in numbers.items()
        }
        return {pair: own for pair, own in keys.items() if own}


def note(batches: Iterable[pa.RecordBatch], classes: Sequence[str]) -> dict[str, Noted]:
    """Note the worst mistakes of every classifier in a part of the predictions; classes as in `Wanted`."""
    labels, noted = _labels(classes), dict[str, list[Noted]]()
    for batch in batches:
        given_N = labels_of(batch["class"], labels)
        for column in batch.schema.names:
            name = column.removesuffix("_prediction")
            if name != column:
                noted.setdefault(name, []).append(_note_batch(_Answers(batch, name, given_N, labels)))
    return {name: merge_noted(parts) for name, parts in noted.items()}


def merge_noted(parts: Sequence[Noted]) -> Noted:
    """Put together what was noted of several parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    pairs_R, order_R2 = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pairs_R", "order_R2"))
    kept = np.lexsort((order_R2[:, 1], order_R2[:, 0]))
    kept = kept[_first_of_each(pairs_R[kept], NUM_OF_PAIR)]
    return Noted(
        worst=_worst([mistake for part in parts for mistake in part.worst]),
        pairs_R=pairs_R[kept],
        order_R2=order_R2[kept],
        keys_R=pa.concat_arrays([part.keys_R for part in parts]).take(pa.array(kept)),
    )


def narrow(noted: dict[str, Noted], wanted: Wanted) -> dict[str, Noted]:
    """Keep what a page shows of what was noted."""
    labels = _labels(wanted.classes)
    numbers = [labels[given] * len(labels) + labels[predicted] for given, predicted in wanted.pairs]
    kept = {}
    for name in {*wanted.classifiers, wanted.best} & noted.keys():  # of no rows nothing is noted
        own = noted[name]
        is_kept_R = np.isin(own.pairs_R, numbers if name == wanted.best else [])
        keys_R = own.keys_R.filter(pa.array(is_kept_R))
        kept[name] = Noted(own.worst, own.pairs_R[is_kept_R], own.order_R2[is_kept_R], keys_R)
    return kept


def light_columns(wanted: Wanted) -> list[str]:
    """Name the columns of the predictions that `look_up` reads, none of them scores."""
    return ["key", "class", f"{wanted.best}_prediction", *_NEIGHBORS]


def look_up(batches: Iterable[pa.RecordBatch], wanted: Wanted) -> tuple[dict[str, Mistake], Mistake | None]:
    """Find the images that are asked for in a part of the predictions, and the first of all."""
    import pyarrow.compute as pc

    labels, value_set = _labels(wanted.classes), pa.array(sorted(wanted.keys), pa.string())
    by_key, first = {}, None
    for batch in batches:
        rows = np.flatnonzero(pc.is_in(batch["key"], value_set=value_set))
        if len(rows) or (first is None and len(batch)):
            answers = _Answers(batch, wanted.best, labels_of(batch["class"], labels), labels)
            first = first or answers.mistake(0)
            by_key.update({own.key: own for own in map(answers.mistake, rows.tolist())})
    return by_key, first


def merge(parts: Sequence[Found]) -> Found:
    """Put together what several parts hold, in their order."""
    names = dict.fromkeys(name for part in parts for name in part.noted)
    return Found(
        noted={name: merge_noted([part.noted[name] for part in parts if name in part.noted]) for name in names},
        by_key={key: own for part in parts for key, own in part.by_key.items()},
        first=next((part.first for part in parts if part.first), None),
    )


def _labels(classes: Sequence[str]) -> dict[str, int]:
    return {name: label for label, name in enumerate(classes)}


def _worst(mistakes: Iterable[Mistake]) -> list[Mistake]:
    return heapq.nsmallest(NUM_WORST, mistakes, key=lambda mistake: mistake.order)


def _note_batch(answers: _Answers) -> Noted:
    given_N, predicted_N, order_N2 = answers.given_N, answers.predicted_N, answers.order_N2
    wrong = np.flatnonzero(predicted_N != given_N)
    wrong = wrong[np.lexsort((order_N2[wrong, 1], order_N2[wrong, 0]))]
    pairs = given_N[wrong] * len(answers.names) + predicted_N[wrong]
    kept = _first_of_each(pairs, NUM_OF_PAIR)
    return Noted(
        worst=[answers.mistake(row) for row in wrong[:NUM_WORST].tolist()],
        pairs_R=pairs[kept],
        order_R2=order_N2[wrong[kept]],
        keys_R=answers.batch["key"].take(pa.array(wrong[kept])),
    )


def _first_of_each(groups_N: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.intp]:
    """Return the places of the first members of each group, group by group."""
    order_N = np.argsort(groups_N, kind="stable")
    sorted_N = groups_N[order_N]
    is_kept_N = np.ones(len(sorted_N), bool)
    is_kept_N[number:] = sorted_N[number:] != sorted_N[:-number]  # or one of the first
    chosen: npt.NDArray[np.intp] = order_N[is_kept_N]
    return chosen


class _Answers:
    """What one classifier says of a batch: predictions, and where they were read the scores of two classes."""

    def __init__(
        self, batch: pa.RecordBatch, name: str, given_N: npt.NDArray[np.int64], labels: dict[str, int]
    ) -> None:
        self.batch, self.names, self.given_N = batch, list(labels), given_N
        self.predicted_N = labels_of(batch[f"{name}_prediction"], labels)
        self._scores_2N: npt.NDArray[np.float32] | None = None
        self.order_N2 = np.zeros((len(batch), 2), np.float32)
        if f"{name}_scores" in batch.schema.names:
            scores_NK, rows_N = _lists(batch, f"{name}_scores"), np.arange(len(batch))
            # Of a class that nobody knows, no score is kept.
            is_kept_N = self.predicted_N < scores_NK.shape[1]
            own_N = np.where(is_kept_N, scores_NK[rows_N, np.where(is_kept_N, self.predicted_N, 0)], np.nan)
            self._scores_2N = np.stack((own_N, scores_NK[rows_N, given_N]))
        elif f"{name}_top_scores" in batch.schema.names:  # of which the predicted class's is the first
            best_N = np.where(self.predicted_N == len(labels) - 1, np.nan, _lists(batch, f"{name}_top_scores")[:, 0])
            self._scores_2N = np.stack((best_N, batch[f"{name}_class_score"]))
        if self._scores_2N is not None:
            # Whose class could not be predicted, for want of a score, is no mistake to look at first.
            compared_2N = np.where(np.isfinite(self._scores_2N).all(0), self._scores_2N, 0)
            self.order_N2[:, 0] = -np.abs(compared_2N[0] - compared_2N[1])
        self._has_neighbors = _NEIGHBORS[0] in batch.schema.names
        if self._has_neighbors:
            self.order_N2[:, 1] = _lists(batch, _NEIGHBORS[-1])[:, 0]

    def mistake(self, row: int) -> Mistake:
        """Return a row as an object."""
        neighbors: tuple[tuple[str, str, float], ...] = ()
        if self._has_neighbors:
            neighbors = tuple(zip(*(self.batch[name][row].as_py() for name in _NEIGHBORS), strict=True))
        scores = self._scores_2N
        if scores is not None and not np.isfinite(scores[:, row]).all():
            scores = None
        return Mistake(
            key=self.batch["key"][row].as_py(),
            given=self.names[self.given_N[row]],
            predicted=self.names[self.predicted_N[row]],
            scores=None if scores is None else (float(scores[0, row]), float(scores[1, row])),
            neighbors=neighbors,
            order=(float(self.order_N2[row, 0]), float(self.order_N2[row, 1])),
        )


def _lists(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.float32]:
    """Return lists of one length as an array, float32 [N, length]."""
    values = batch[column].flatten().to_numpy()
    rows: npt.NDArray[np.float32] = values.reshape(len(batch), -1) if len(batch) else np.zeros((0, 1), np.float32)
    return rows
