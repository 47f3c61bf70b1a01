"""A finished run, read back from its folder or URI.

Input: what `--out` of a run was. Output: what `run.json` holds, rows and columns of its tables. Invariant: of a table
only the columns that are asked for are read, batch by batch or file by file; whatever is not a whole run is one line.

Axes: N validation images in the order of the prediction files, n of them, K classes, T best scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.storage import StoredFile, reason
from pipeline.data.uris import absolute_root
from pipeline.errors import OutputError, counted, quoted
from pipeline.results.figures import classifier_names
from pipeline.results.writing import PREDICTIONS, RUN_FILE, Output

# How pages call a class that neither the dataset nor a model knows: null in the tables.
_OTHER = "(another class)"
_BATCH_ROWS = 8192
_NEEDED = frozenset(("dataset", "metrics", "num_valid", "options"))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        given: Its folder or URI as the user gave it.
        output: Where it is.
        run: What `run.json` holds.
    """

    given: str
    output: Output
    run: Mapping[str, Any]

    @property
    def classes(self) -> list[str]:
        """Its classes, in the order of its scores."""
        return list(self.run["dataset"]["classes"])

    @property
    def all_classes(self) -> list[str]:
        """Its classes, and behind them those that the user's own model knows besides."""
        return [*self.classes, *(self.run.get("model") or {}).get("extra_classes", ())]

    @property
    def classifiers(self) -> list[str]:
        """Its classifiers, in the order in which they are shown."""
        return classifier_names(self.run["metrics"])

    @property
    def features(self) -> str | None:
        """The SHA-256 of the model whose features its classifiers compare; None where they compare pixels."""
        model = self.run.get("model")
        return model["sha256"] if model is not None and model["output"] == "embedding" else None

    @cached_property
    def parts(self) -> list[str]:
        """Its prediction files, as `read_batches` takes them, in the order of the listing."""
        store, root = self.output.store
        try:
            names = [entry.name for entry in store.entries(f"{root}/{PREDICTIONS}", recursive=False)]
        except OSError as exc:
            raise OutputError(f"{self.given}: expected to list it, got {reason(exc)}; check the access") from exc
        return sorted(f"{PREDICTIONS}/{name.removesuffix('.parquet')}" for name in names if name.startswith("part-"))


@dataclass(frozen=True)
class Predictions:
    """What the classifiers of a run predict.

    Attributes:
        keys: Of N images, string.
        labels_N: Their classes, int32, as numbers of the classes that were asked by.
        predictions: By classifier, int32 [N], likewise; -1 for a class that none of them is.
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
    output = Output(absolute_root(given, given, OutputError), given)
    store, root = output.store
    try:
        found = store.find(root)
        if found is None or not found.is_folder:
            what = "nothing there" if found is None else "a file"
            raise OutputError(f"{given}: expected the folder of a finished run, got {what}; give what its --out was")
        about = store.find(f"{root}/{RUN_FILE}")
        if about is None:
            raise OutputError(
                f"{given}: expected a finished run, got a folder without {RUN_FILE}; finish it by --resume, or give "
                "another"
            )
        run = json.loads(store.read_range(about.path, 0, about.size))
    except OSError as exc:
        raise OutputError(f"{given}: expected a folder that can be read, got {reason(exc)}; give another") from exc
    except ValueError as exc:
        raise OutputError(f"{given}/{RUN_FILE}: expected JSON, got {exc}; run it anew") from exc
    if missing := _NEEDED - (run.keys() if isinstance(run, dict) else set()):
        raise OutputError(
            f"{given}/{RUN_FILE}: expected what a run writes, got none of {sorted(missing)[0]}; run it anew"
        )
    return FinishedRun(given, output, run)


def read_batches(
    output: Output, name: str, columns: Sequence[str] | None = None, batch_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Read a table, `metrics` or `predictions/part-00000` for one, in batches; none if the run has no such table.

    Args:
        output: The run.
        name: The table's.
        columns: Those that are wanted, as far as there are any of these names; None for all.
        batch_rows: Of a batch.

    Raises:
        OutputError: If it cannot be read.
    """
    with _open_table(output, name) as file:
        if file is not None:
            kept = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
            yield from file.iter_batches(batch_rows, columns=kept)


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


def with_other(classes: Sequence[str]) -> tuple[str, ...]:
    """Return classes, and behind them how pages call any other one: by a name that none of them has."""
    other = _OTHER
    while other in classes:
        other = f"({other})"
    return (*classes, other)


def labels_of(names: pa.StringArray, labels: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Return the classes of N rows as numbers, int64 [N]; null, which is none that is known, is the last of `labels`.

    Args:
        names: The classes.
        labels: Numbers of those that `with_other` returns.
    """
    encoded = names.dictionary_encode()
    numbers = np.array([*(labels[name] for name in encoded.dictionary.to_pylist()), len(labels) - 1], np.int64)
    indices = encoded.indices.fill_null(len(numbers) - 1) if names.null_count else encoded.indices
    labels_N: npt.NDArray[np.int64] = numbers[indices.to_numpy()]
    return labels_N


def read_predictions(finished: FinishedRun, classes: Sequence[str], classifiers: Sequence[str]) -> Predictions:
    """Read what classifiers predict for all validation images; per image, its key and 4 bytes a classifier are held.

    Args:
        finished: The run.
        classes: Names by whose place classes are numbered; all of the run's, and those that its model knows besides.
        classifiers: Some of the run's.

    Raises:
        OutputError: If files are missing, damaged, or of another run.
    """
    import pyarrow.compute as pc  # which takes longer to load than a page's tasks have

    names = ["class", *(f"{classifier}_prediction" for classifier in classifiers)]
    keys: list[pa.Array] = []
    codes: dict[str, list[npt.NDArray[np.int32]]] = {name: [np.zeros(0, np.int32)] for name in names}
    value_set = pa.array(classes, pa.string())
    for part in finished.parts:
        table = _read_columns(finished, part, ["key", *names])
        keys += table["key"].chunks
        for name, blocks in codes.items():
            numbers = pc.index_in(table[name], value_set=value_set)
            # A prediction of null is a class that nobody here knows.
            if numbers.null_count > (table[name].null_count if name != "class" else 0):
                is_unknown = pc.and_(numbers.is_null(), table[name].is_valid())
                [unknown] = [*table[name].filter(is_unknown)[:1].to_pylist(), None][:1]
                raise OutputError(
                    f"{finished.given}/{part}.parquet: expected classes of {RUN_FILE}, got {quoted(str(unknown))}; "
                    "give the folder as the run left it"
                )
            blocks.append(numbers.fill_null(-1).to_numpy())
    all_keys = pa.chunked_array(keys, pa.string())
    num_keys = pc.count_distinct(all_keys).as_py()
    if len(all_keys) != num_keys or num_keys != finished.run["num_valid"]:
        raise OutputError(
            f"{finished.given}/{PREDICTIONS}: expected {counted(finished.run['num_valid'], 'image')}, each once, "
            f"got {len(all_keys):,} with {counted(num_keys, 'key')}; give the folder as the run left it"
        )
    labels, *predictions = (np.concatenate(codes[name]) for name in names)
    return Predictions(all_keys, labels, dict(zip(classifiers, predictions, strict=True)))


def read_scores(
    finished: FinishedRun, classes: Sequence[str], classifier: str, rows_n: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32], bool]]:
    """Read a classifier's scores of some images, file by file; files without any of these are not opened.

    Args:
        finished: The run.
        classes: Names of the K classes, in the order in which scores are wanted; behind the run's own may be further
            ones, which a model may have scores of.
        classifier: One of the run's.
        rows_n: Rows of these images.

    Yields:
        For a file that has them: places in `rows_n`; and the scores of these images, float32, with whether they are
        those of all classes, [., K] or of the run's own, or those that the run kept, [., T], that of the predicted
        class first.

    Raises:
        OutputError: If a file is damaged.
    """
    start, num_own = 0, len(finished.classes)
    places_of = {name: place for place, name in enumerate(classes)}
    columns_P = [places_of[name] for name in finished.all_classes]
    for part in finished.parts:
        with _open_table(finished.output, part) as file:
            assert file is not None
            stop = start + file.metadata.num_rows
            places = np.flatnonzero((rows_n >= start) & (rows_n < stop))
            wanted = (f"{classifier}_scores", f"{classifier}_top_scores")
            column = next((name for name in wanted if name in file.schema_arrow.names), None)
            if len(places) and column is not None:
                lists = file.read(columns=[column])[column].take(pa.array(rows_n[places] - start)).combine_chunks()
                scores = lists.flatten().to_numpy().reshape(len(places), -1)
                is_whole = column == wanted[0]
                if is_whole:
                    width = scores.shape[1]
                    scores_nK = np.zeros((len(places), num_own if width == num_own else len(classes)), np.float32)
                    scores_nK[:, columns_P[:width]] = scores
                    scores = scores_nK
                yield places, scores, is_whole
            start = stop


def _read_columns(finished: FinishedRun, part: str, columns: list[str]) -> pa.Table:
    with _open_table(finished.output, part) as file:
        assert file is not None
        if missing := set(columns) - set(file.schema_arrow.names):
            raise OutputError(
                f"{finished.given}/{part}.parquet: expected a column {sorted(missing)[0]}, got none; give the folder "
                "as the run left it"
            )
        return file.read(columns=columns)


@contextmanager
def _open_table(output: Output, name: str) -> Iterator[pq.ParquetFile | None]:
    """Open a table, if the run has it; what goes wrong while it is read is an `OutputError`."""
    store, root = output.store
    path = f"{root}/{name}.parquet"
    try:
        entry = store.find(path)
        if entry is None:
            yield None
            return
        source = pa.OSFile(path) if store.is_local else StoredFile(store, path, entry.size)
        # Not the whole file: scores are most of it. Column chunks are read by few requests.
        with source, pq.ParquetFile(source, pre_buffer=True) as file:
            yield file
    except (OSError, pa.ArrowException) as exc:
        words = reason(exc) if isinstance(exc, OSError) else str(exc)
        raise OutputError(
            f"{output.root}/{name}.parquet: expected to read it, got {words}; give the folder as the run left it"
        ) from exc
