"""The rows of a file of predictions, piece by piece.

Input: a `ScoreFile` and one of its pieces. Output: keys with predictions and, where there are any, scores. Invariant:
a piece is read by itself, in a memory that the size of the file does not change.

Axes: N rows, K classes. Scores are float32; the highest is the best, of equal ones the first class's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.score_files import CSV_VALUE, KEY, PIECE_BYTES, PREDICTION, ScoreFile, reading, size_bytes
from pipeline.data.storage import StoredFile
from pipeline.errors import DataError, quoted

_MAX_BATCH_ROWS = 2**14
# Of a CSV file, how far a row is looked for: some rows, of any number of columns.
_MIN_WINDOW_BYTES, _WINDOW_VALUE_BYTES = 2**16, 128


@dataclass(frozen=True)
class ScoredRows:
    """Some rows of a file.

    Attributes:
        keys: Of N images, string.
        codes_N: The predicted classes, int32; -1 for one that nobody knows.
        scores_NK: float32, -infinity for a class without a column; [N, 0] of a file of predictions.
        others: Some of the classes that are predicted and that nobody knows.
    """

    keys: pa.StringArray
    codes_N: npt.NDArray[np.int32]
    scores_NK: npt.NDArray[np.float32]
    others: tuple[str, ...]


def read_piece(
    file: ScoreFile, piece: tuple[int, int], classes: Sequence[str], extra: Sequence[str] = ()
) -> ScoredRows:
    """Read one piece of a file.

    Args:
        file: The file.
        piece: One of `cut`.
        classes: Names of the dataset's classes.
        extra: Those that the user's own model knows besides; K classes in all.

    Raises:
        DataError: If it cannot be read, or a row has no key, no class, or a score that is no finite number.
    """
    classes = (*classes, *extra)
    with reading(file.given):
        table = _read_csv(file, *piece) if file.is_csv else _read_parquet(file, *piece)
        keys = pa.concat_arrays([pa.array([], pa.string()), *table[KEY].cast(pa.string()).chunks])
        if keys.null_count:
            row = int(np.flatnonzero(keys.is_null().to_numpy(zero_copy_only=False))[0])
            where = f"row {row + 1} behind byte {piece[0]}" if file.is_csv else f"row {piece[0] + row + 1}"
            raise DataError(f"{file.given}: expected a key in every row, got none in {where}; leave such rows out")
        if file.kind == "predictions":
            return _take_predictions(file, keys, table[PREDICTION], classes)
        return _take_scores(file, keys, table, classes)


def _take_predictions(
    file: ScoreFile, keys: pa.StringArray, column: pa.ChunkedArray, classes: Sequence[str]
) -> ScoredRows:
    encoded = pa.chunked_array(column.cast(pa.string()).chunks, pa.string()).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    is_missing_N = np.zeros(len(keys), np.bool_)
    if encoded.null_count or "" in names:
        texts = encoded.cast(pa.string()).to_pylist()
        is_missing_N = np.array([not text for text in texts], np.bool_)
    if is_missing_N.any():
        raise _bad_row(file, keys, is_missing_N, "a class", "none", "write one in every row")
    labels = {name: label for label, name in enumerate(classes)}
    numbers = np.array([labels.get(name, -1) for name in names], np.int32)
    codes_N = numbers[encoded.indices.to_numpy()] if len(names) else np.zeros(0, np.int32)
    others = tuple(name for name in names if name not in labels)
    return ScoredRows(keys, codes_N, np.zeros((len(keys), 0), np.float32), others)


def _take_scores(file: ScoreFile, keys: pa.StringArray, table: pa.Table, classes: Sequence[str]) -> ScoredRows:
    scores_NK = np.full((len(keys), len(classes)), -np.inf, np.float32)
    labels = {name: label for label, name in enumerate(classes)}
    best_N, best_other_N = np.full(len(keys), -np.inf, np.float32), np.zeros(len(keys), np.int64)
    others = [name for name in file.classes if name not in labels]
    for name in file.classes:
        column = table[name]
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite there, and refused
            values_N = column.to_numpy().astype(np.float32)
        if not (is_finite_N := np.isfinite(values_N)).all():
            row = int(np.flatnonzero(~is_finite_N)[0])
            found = "none" if (value := column[row].as_py()) is None else f"{value}"
            expected, advice = f"a finite score of class {quoted(name)}", "write a finite number for every class"
            raise _bad_row(file, keys, ~is_finite_N, expected, found, advice)
        if name in labels:
            scores_NK[:, labels[name]] = values_N
        else:
            is_better_N = values_N > best_N
            best_N[is_better_N], best_other_N[is_better_N] = values_N[is_better_N], others.index(name)
    codes_N = np.zeros(len(keys), np.int32)
    if len(keys):
        codes_N = scores_NK.argmax(1).astype(np.int32)  # the first of several maxima
        # On a tie a class of the dataset is meant.
        codes_N[best_N > scores_NK.max(1)] = -1
    found_others = np.unique(best_other_N[codes_N == -1]).tolist()
    return ScoredRows(keys, codes_N, scores_NK, tuple(others[other] for other in found_others))


def _read_csv(file: ScoreFile, start: int, stop: int) -> pa.Table:
    """Read the lines that begin between two bytes."""
    from pyarrow import csv

    begin = start if start == file.header_bytes else _next_row(file, start - 1)
    lines = file.store.read_range(file.entry.path, begin, _next_row(file, stop - 1))
    names = [KEY, PREDICTION] if file.kind == "predictions" else list(file.columns)
    kinds = {name: pa.string() if name in (KEY, PREDICTION) else pa.float32() for name in names}
    if not lines.strip():
        return pa.table({name: pa.array([], kind) for name, kind in kinds.items()})
    try:
        return csv.read_csv(
            pa.py_buffer(lines),
            csv.ReadOptions(use_threads=False, column_names=file.columns),
            csv.ParseOptions(newlines_in_values=b'"' in lines),
            # Nothing but an empty place stands for no number: "NA" may be a class.
            convert_options=csv.ConvertOptions(column_types=kinds, include_columns=names, null_values=[""]),
        )
    except pa.ArrowInvalid as exc:
        where = "" if start == file.header_bytes else f", rows counted from byte {begin} on"
        raise DataError(
            f"{file.given}: expected rows of {len(file.columns)} columns in UTF-8, got {exc}{where}; write the file "
            "again"
        ) from exc


def _next_row(file: ScoreFile, at: int) -> int:
    """Return where the first row begins behind the first line end that stands at a byte or later.

    A line end may be part of a value, in quotes: what follows has to be a row with a value for each column. Whether it
    is depends on the file alone, so that neighboring pieces agree; where nothing is, any line is taken for a row.
    """
    row = re.compile(CSV_VALUE + b"(?:," + CSV_VALUE + rb"){%d}\r?(?:\n|\Z)" % (len(file.columns) - 1))
    window_bytes = max(_MIN_WINDOW_BYTES, len(file.columns) * _WINDOW_VALUE_BYTES)
    while at < file.entry.size:
        block = file.store.read_range(file.entry.path, at, at + window_bytes)
        is_last = at + len(block) >= file.entry.size
        ends = [found.end() for found in re.finditer(b"\n", block)]
        for end in ends:
            matched = row.match(block, end)
            if at + end == file.entry.size or (matched and (is_last or matched.end() < len(block))):
                return at + end
        if ends:
            return at + ends[0]
        at += len(block)
    return file.entry.size


def _read_parquet(file: ScoreFile, start: int, stop: int) -> pa.Table:
    """Read the rows from one up to another; a row group is decoded from its first row on."""
    import pyarrow.parquet as pq

    names = [KEY, PREDICTION] if file.kind == "predictions" else list(file.columns)
    bounds = np.cumsum([0, *(num_rows for num_rows, _ in file.row_groups)])
    groups = np.flatnonzero((bounds[:-1] < stop) & (bounds[1:] > start)).tolist()
    row_bytes = max(1, size_bytes(file) // max(1, int(bounds[-1])))
    batch_rows = max(1, min(_MAX_BATCH_ROWS, PIECE_BYTES // 8 // row_bytes))
    row, kept = int(bounds[groups[0]]), []
    # From a bucket by few requests, where that fits. Else through a buffer: of a row group, pages and a batch are held.
    held_bytes = sum(file.row_groups[group][1] for group in groups)
    is_whole = not file.store.is_local and held_bytes <= 4 * PIECE_BYTES
    buffer_bytes = 0 if is_whole else 2**20
    with pq.ParquetFile(
        StoredFile(file.store, file.entry.path, file.entry.size), buffer_size=buffer_bytes, pre_buffer=is_whole
    ) as parquet:
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=names, use_threads=False):
            first, last = max(start, row) - row, min(stop, row + len(batch)) - row
            if first < last:
                kept.append(batch.slice(first, last - first))
            row += len(batch)
            if row >= stop:
                break
    return pa.Table.from_batches(kept).select(names)


def _bad_row(
    file: ScoreFile, keys: pa.StringArray, is_bad_N: npt.NDArray[np.bool_], expected: str, got: str, advice: str
) -> DataError:
    rows = np.flatnonzero(is_bad_N)
    more = f" and {len(rows) - 1:,} more nearby" if len(rows) > 1 else ""
    return DataError(f"{file.given}: expected {expected}, got {got} for key {keys[int(rows[0])]}{more}; {advice}")
