"""Groups of duplicates as rows with names, and the doubtful labels that follow from them.

Input: groups of rows of the listing, with the keys and labels of their images. Output: tables of `duplicates.parquet`
and `suspects.parquet`. Invariant: their content depends on the data alone, not on how the groups are parted.

M images in groups. A row counts through both splits: the validation listing follows the other.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
_ROW = pa.field("row", pa.int64())


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
        schema=SUSPECTS_SCHEMA.insert(0, _ROW),
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


def merge_tables(tables: Sequence[pa.Table], by: str) -> Iterator[pa.Table]:
    """Merge tables of one schema, each sorted by a column, into a few rows at a time."""
    rows = heapq.merge(*map(_rows_of, tables), key=itemgetter(by))
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield pa.Table.from_pylist(batch, schema=tables[0].schema)


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
