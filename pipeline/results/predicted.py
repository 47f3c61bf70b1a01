"""What the classifiers of a finished run predict, read again from its folder or URI.

Input: what `--out` of a run was. Output: what `run.json` holds, and columns of the predictions. Invariant: only the
columns that are asked for are read, one prediction file after another; whatever is not a whole run is one line.

Axes: N validation images in the order of the prediction files, n of them, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.storage import Entry, Store, open_root, reason
from pipeline.data.stored import StoredFile
from pipeline.data.uris import absolute_root
from pipeline.errors import OutputError
from pipeline.results.writing import PREDICTIONS, RUN_FILE

_NEEDED = frozenset(("dataset", "metrics", "num_valid", "options"))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        given: Its folder or URI as the user gave it.
        run: What `run.json` holds.
        store: Where it is.
        parts: Its prediction files, in their order.
    """

    given: str
    run: dict[str, Any]
    store: Store
    parts: list[Entry]

    @property
    def classes(self) -> list[str]:
        """Its classes, in the order of its scores."""
        return list(self.run["dataset"]["classes"])

    @property
    def classifiers(self) -> list[str]:
        """Its classifiers, in the order in which they are shown."""
        return list(dict.fromkeys(row["classifier"] for row in self.run["metrics"]))


@dataclass(frozen=True)
class Predictions:
    """What the classifiers of a run predict.

    Attributes:
        keys: Of N images, string.
        labels_N: Their classes, int32, as numbers of the classes that were asked by.
        predictions: By classifier, int32 [N], likewise; -1 for a class that the dataset lacks.
    """

    keys: pa.ChunkedArray
    labels_N: npt.NDArray[np.int32]
    predictions: dict[str, npt.NDArray[np.int32]]


def open_run(given: str) -> FinishedRun:
    """Open a finished run.

    Args:
        given: A folder or URI.

    Raises:
        OutputError: If it is not there, is unfinished, or cannot be read.
    """
    root = absolute_root(given, given, OutputError)
    store, path = open_root(given, root, OutputError)
    run_path = f"{path}/{RUN_FILE}"
    try:
        found = store.find(path)
        if found is None or not found.is_folder:
            what = "nothing there" if found is None else "a file"
            raise OutputError(f"{given}: expected the folder of a finished run, got {what}; give what its --out was")
        about = store.find(run_path)
        if about is None:
            raise OutputError(
                f"{given}: expected a finished run, got a folder without {RUN_FILE}; finish it by --resume, or give "
                "another"
            )
        run = json.loads(store.read_range(run_path, 0, about.size))
        parts = sorted(store.entries(f"{path}/{PREDICTIONS}", recursive=False))
    except OSError as exc:
        raise OutputError(f"{given}: expected a folder that can be read, got {reason(exc)}; give another") from exc
    except ValueError as exc:
        raise OutputError(f"{given}/{RUN_FILE}: expected JSON, got {exc}; run it anew") from exc
    if missing := _NEEDED - (run.keys() if isinstance(run, dict) else set()):
        raise OutputError(
            f"{given}/{RUN_FILE}: expected what a run writes, got none of {sorted(missing)[0]}; run it anew"
        )
    return FinishedRun(given, run, store, [part for part in parts if part.name.endswith(".parquet")])


def read_predictions(finished: FinishedRun, classes: Sequence[str], classifiers: Sequence[str]) -> Predictions:
    """Read what classifiers predict for all validation images; per image, its key and 4 bytes a classifier are held.

    Args:
        finished: The run.
        classes: Names by whose place classes are numbered; all of the run's.
        classifiers: Some of the run's.

    Raises:
        OutputError: If files are missing, damaged, or of another run.
    """
    names = ["class", *(f"{classifier}_prediction" for classifier in classifiers)]
    keys: list[pa.Array] = []
    codes: dict[str, list[npt.NDArray[np.int32]]] = {name: [np.zeros(0, np.int32)] for name in names}
    value_set = pa.array(classes, pa.string())
    for part in finished.parts:
        table = _read(finished, part, ["key", *names])
        keys += table["key"].chunks
        for name, blocks in codes.items():
            numbers = pc.index_in(table[name], value_set=value_set)
            # A prediction of null is a class that the dataset lacks.
            if numbers.null_count > (table[name].null_count if name != "class" else 0):
                is_unknown = pc.and_(numbers.is_null(), table[name].is_valid())
                [unknown] = [*table[name].filter(is_unknown)[:1].to_pylist(), None][:1]
                raise OutputError(
                    f"{finished.given}/{PREDICTIONS}/{part.name}: expected classes of {RUN_FILE}, got {unknown}; give "
                    "the folder as the run left it"
                )
            blocks.append(numbers.fill_null(-1).to_numpy())
    all_keys = pa.chunked_array(keys, pa.string())
    num_keys = pc.count_distinct(all_keys).as_py()
    if len(all_keys) != num_keys or num_keys != finished.run["num_valid"]:
        raise OutputError(
            f"{finished.given}/{PREDICTIONS}: expected {finished.run['num_valid']:,} images, each once, got "
            f"{len(all_keys):,} with {num_keys:,} keys; give the folder as the run left it"
        )
    labels, *predictions = (np.concatenate(codes[name]) for name in names)
    return Predictions(all_keys, labels, dict(zip(classifiers, predictions, strict=True)))


def read_scores(
    finished: FinishedRun, classes: Sequence[str], classifier: str, rows_n: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32] | None]]:
    """Read a classifier's scores of some images, file by file; files without any of these are not opened.

    Args:
        finished: The run.
        classes: Names of the K classes, in the order in which scores are wanted.
        classifier: One of the run's.
        rows_n: Rows of these images.

    Yields:
        For a file: places in `rows_n`, and the scores of these images, float32 [., K], or None where it has none.

    Raises:
        OutputError: If a file is damaged.
    """
    column, start = f"{classifier}_scores", 0
    columns_K = [finished.classes.index(name) for name in classes]
    for part in finished.parts:
        with _open(finished, part) as file:
            stop = start + file.metadata.num_rows
            places = np.flatnonzero((rows_n >= start) & (rows_n < stop))
            if len(places):
                scores_nK = None
                if column in file.schema_arrow.names:
                    lists = file.read(columns=[column])[column].take(pa.array(rows_n[places] - start)).combine_chunks()
                    scores_nK = lists.flatten().to_numpy().reshape(len(places), -1)[:, columns_K]
                yield places, scores_nK
            start = stop


def _read(finished: FinishedRun, part: Entry, columns: list[str]) -> pa.Table:
    with _open(finished, part) as file:
        if missing := set(columns) - set(file.schema_arrow.names):
            raise OutputError(
                f"{finished.given}/{PREDICTIONS}/{part.name}: expected a column {sorted(missing)[0]}, got none; give "
                "the folder as the run left it"
            )
        return file.read(columns=columns)


@contextmanager
def _open(finished: FinishedRun, part: Entry) -> Iterator[pq.ParquetFile]:
    """Open a prediction file; what goes wrong while it is read is an `OutputError`."""
    try:
        # Not the whole file: scores are most of it. Column chunks are read by few requests.
        with pq.ParquetFile(StoredFile(finished.store, part), pre_buffer=True) as file:
            yield file
    except (OSError, pa.ArrowException) as exc:
        words = reason(exc) if isinstance(exc, OSError) else str(exc)
        raise OutputError(
            f"{finished.given}/{PREDICTIONS}/{part.name}: expected to read it, got {words}; give the folder as the run "
            "left it"
        ) from exc
