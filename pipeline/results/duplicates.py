"""Groups of duplicates as rows with names, and the doubtful labels that follow from them.

Input: groups of rows of the listing, with the keys and labels of their images. Output: tables of `duplicates.parquet`
and `suspects.parquet`. Invariant: their content depends on the data alone, not on how the groups are parted.

M images in groups. A row counts through both splits: the validation listing follows the other.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.columns import one_chunk
from pipeline.data.files import display
from pipeline.results.tables import DUPLICATES_SCHEMA, SUSPECTS_SCHEMA

# Rows that are held as Python objects at one time.
_BATCH_ROWS = 10_000
_SUSPECTS_AND_ROW = SUSPECTS_SCHEMA.insert(0, pa.field("row", pa.int64()))


@dataclass(frozen=True)
class Pair:
    """A validation image that is a training image once more, changed a little.

    Attributes:
        row: Of the validation image.
        keys: Of the training image and of the validation image.
        labels: Likewise.
        distance: Between them, rms, 0 to 1.
        ratio: That to the distance of another neighbor.
    """

    row: int
    keys: tuple[str, str]
    labels: tuple[int, int]
    distance: float
    ratio: float


@dataclass(frozen=True)
class Suspect:
    """An image whose label is not that of most of its neighbors.

    Attributes:
        row: Of the image.
        key: Its name.
        split: 0 for training images, 1 for validation images.
        label: The given class.
        suggested: The class of most neighbors.
        score: How doubtful, 0 to 1.
    """

    row: int
    key: str
    split: int
    label: int
    suggested: int
    score: float


def exact_tables(
    groups_2M: npt.NDArray[np.int64],
    images: pa.Table,
    num_train: int,
    classes: Sequence[str],
    split_names: tuple[str, str],
) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """Lay groups of images with the same pixels out as rows.

    Args:
        groups_2M: As `decoding.digests.group_digests` returns them.
        images: Of each of their images the `key`, binary, and the `label`, int32.
        num_train: Listed training images.
        classes: Names of the K classes.
        split_names: What the dataset calls the splits, train and valid.

    Returns:
        Rows of `DUPLICATES_SCHEMA`, a group numbered by the row of its first image; rows of `SUSPECTS_SCHEMA`, and
        their `row`, by which they are sorted, of all images in groups of more than one class; and the counts.
    """
    firsts_M, rows_M = groups_2M
    labels_M = one_chunk(images["label"]).to_numpy()
    is_first_M = firsts_M == rows_M
    is_valid_M = rows_M >= num_train
    keys = [display(key) for key in images["key"].to_pylist()]
    splits = [split_names[is_valid] for is_valid in is_valid_M.tolist()]
    own = [classes[label] for label in labels_M.tolist()]
    num_images = len(keys)
    duplicates = pa.table(
        [["exact"] * num_images, firsts_M, keys, splits, own, np.zeros(num_images, np.float32), [None] * num_images],
        schema=DUPLICATES_SCHEMA,
    )
    suggested = _suggest(np.flatnonzero(is_first_M), labels_M)
    doubtful = sorted(suggested, key=lambda index: int(rows_M[index]))
    suspects = pa.table(
        [
            rows_M[doubtful],
            [keys[index] for index in doubtful],
            [splits[index] for index in doubtful],
            [own[index] for index in doubtful],
            [classes[suggested[index]] for index in doubtful],
            np.ones(len(doubtful), np.float32),
        ],
        schema=_SUSPECTS_AND_ROW,
    )
    counts = {
        "num_exact_groups": int(is_first_M.sum()),
        "num_exact_images": num_images,
        "num_exact_twins": int((is_valid_M & (firsts_M < num_train)).sum()),
        "num_conflicts": len(doubtful),
    }
    return duplicates, suspects, counts


def _suggest(begins: npt.NDArray[np.intp], labels_M: npt.NDArray[np.int32]) -> dict[int, int]:
    """Return, for each image of a group of several classes, the most frequent of the others, on a tie the first."""
    is_mixed = np.minimum.reduceat(labels_M, begins) != np.maximum.reduceat(labels_M, begins)
    ends = np.append(begins[1:], len(labels_M))
    suggested = {}
    for begin, end in zip(begins[is_mixed].tolist(), ends[is_mixed].tolist(), strict=True):
        labels = labels_M[begin:end].tolist()
        counts = Counter(labels)
        first, second = sorted(counts, key=lambda label: (-counts[label], label))[:2]
        for index, label in enumerate(labels, begin):
            suggested[index] = second if label == first else first
    return suggested


def near_table(pairs: Sequence[Pair], classes: Sequence[str], split_names: Sequence[str]) -> pa.Table:
    """Lay near-duplicates out as rows of `DUPLICATES_SCHEMA`, two for each pair, nearest by their ratio first."""
    rows = [
        ("near", pair.row, key, split, classes[label], pair.distance, pair.ratio)
        for pair in sorted(pairs, key=lambda pair: (pair.ratio, pair.row))
        for key, label, split in zip(pair.keys, pair.labels, split_names, strict=True)
    ]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * len(DUPLICATES_SCHEMA)
    return pa.table(columns, schema=DUPLICATES_SCHEMA)


def suspects_table(suspects: Sequence[Suspect], classes: Sequence[str], split_names: Sequence[str]) -> pa.Table:
    """Lay images with doubtful labels out as rows of `SUSPECTS_SCHEMA`, and their `row`, most doubtful first."""
    rows = [
        (each.row, each.key, split_names[each.split], classes[each.label], classes[each.suggested], each.score)
        for each in sorted(suspects, key=lambda each: (-each.score, each.row))
    ]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * len(_SUSPECTS_AND_ROW)
    return pa.table(columns, schema=_SUSPECTS_AND_ROW)


def merge_duplicates(exact: Sequence[pa.Table], near: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """Merge the rows of `duplicates.parquet`: groups with the same pixels first, then pairs, numbered from 0."""
    ordered = itertools.chain(
        _merge(exact, itemgetter("group")), _merge(near, lambda row: (row["ratio"], row["group"]))
    )
    return number_groups(_batches(ordered, DUPLICATES_SCHEMA))


def merge_suspects(conflicts: Sequence[pa.Table], suspects: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """Merge the rows of `suspects.parquet`: images with the same pixels and several labels first, each image once."""
    known = {row for table in conflicts for row in table["row"].to_pylist()}
    doubtful = _merge(suspects, lambda row: (-row["score"], row["row"]))
    ordered = itertools.chain(
        _merge(conflicts, itemgetter("row")), (row for row in doubtful if row["row"] not in known)
    )
    return (table.drop_columns("row") for table in _batches(ordered, _SUSPECTS_AND_ROW))


def _merge(tables: Sequence[pa.Table], key: Callable[[dict[str, Any]], Any]) -> Iterator[dict[str, Any]]:
    """Merge the rows of tables that are sorted."""
    return heapq.merge(*map(_rows_of, tables), key=key)


def _batches(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield pa.Table.from_pylist(batch, schema=schema)


def _rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.to_pylist()


def number_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Number the groups of all tables together from 0, in their order.

    The rows of a group follow each other, perhaps from one table to the next; neighbours of one kind that have the same
    number are one group.
    """
    number, last = -1, None
    for table in tables:
        numbers = []
        for group in zip(table["kind"].to_pylist(), table["group"].to_pylist(), strict=True):
            number += group != last
            last = group
            numbers.append(number)
        yield table.set_column(1, DUPLICATES_SCHEMA.field("group"), pa.array(numbers, pa.int64()))
