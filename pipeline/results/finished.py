"""A finished run, read back from its folder or URI.

Input: an `Output`. Output: what `run.json` holds, and batches of rows of its tables. Invariant: a table is read
batch by batch, so that its size takes no memory here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.storage import reason
from pipeline.errors import OutputError, without_secrets
from pipeline.results.writing import PREDICTIONS, RUN_FILE, Output

# How the page calls a class that the dataset lacks.
OTHER = "(another class)"
_BATCH_ROWS = 8192


def read_run(output: Output) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        OutputError: If the folder holds no finished run.
    """
    content = _read_file(output, RUN_FILE)
    if content is None:
        raise OutputError(
            f"{output.root}: expected a finished run, got a folder without {RUN_FILE}; check the name, or finish the "
            "run with --resume"
        )
    try:
        run = json.loads(content)
        if not isinstance(run, dict) or "metrics" not in run:
            raise ValueError("something else")
    except ValueError as exc:
        raise OutputError(f"{output.root}/{RUN_FILE}: expected what a run wrote, got {exc}; run again") from exc
    return run


def read_batches(
    output: Output, name: str, columns: Sequence[str] | None = None, batch_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Read a table, `metrics` or `predictions/part-00000` for one, in batches; none if the run has no such table.

    Raises:
        OutputError: If it cannot be read.
    """
    content = _read_file(output, f"{name}.parquet")
    if content is None:
        return
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        kept = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
        yield from file.iter_batches(batch_rows, columns=kept)
    except pa.ArrowException as exc:
        raise OutputError(f"{output.root}/{name}.parquet: expected a table, got {exc}; run again") from exc


def read_rows(output: Output, name: str, first: int = 0, num_rows: int | None = None) -> list[dict[str, Any]]:
    """Read some rows of a table, by default all."""
    rows: list[dict[str, Any]] = []
    begin = 0
    for batch in read_batches(output, name):
        if num_rows is not None and len(rows) >= num_rows:
            break
        skipped = max(0, first - begin)
        begin += len(batch)
        if skipped < len(batch):
            left = len(batch) if num_rows is None else num_rows - len(rows)
            rows += batch.slice(skipped, left).to_pylist()
    return rows


def prediction_parts(output: Output) -> list[str]:
    """Name the parts of the predictions, as `read_batches` takes them, in the order of the listing."""
    store, root = output.store
    try:
        names = [entry.name for entry in store.entries(f"{root}/{PREDICTIONS}", recursive=True)]
    except OSError as exc:
        raise OutputError(f"{output.root}: expected to list it, got {reason(exc)}; check the access") from exc
    return sorted(f"{PREDICTIONS}/{name.removesuffix('.parquet')}" for name in names if name.startswith("part-"))


def labels_of(names: pa.StringArray, labels: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Return the classes of N rows as numbers, int64 [N]; null, which is a class that the dataset lacks, is K."""
    encoded = names.dictionary_encode()
    numbers = np.array([*(labels[name] for name in encoded.dictionary.to_pylist()), len(labels)], np.int64)
    indices = encoded.indices.fill_null(len(numbers) - 1) if names.null_count else encoded.indices
    labels_N: npt.NDArray[np.int64] = numbers[indices.to_numpy()]
    return labels_N


def _read_file(output: Output, name: str) -> bytes | None:
    store, root = output.store
    try:
        entry = store.find(f"{root}/{name}")
        return None if entry is None or entry.is_folder else store.read_range(entry.path, 0, entry.size)
    except OSError as exc:
        raise OutputError(
            f"{without_secrets(output.root)}/{name}: expected to read it, got {reason(exc)}; check the access"
        ) from exc
