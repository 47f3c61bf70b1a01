"""The result tables, written whole or not at all.

What enters: figures, counts and scored parts. What leaves: Parquet files and `run.json` in a folder or below a URI.
Always: a file under its final name is complete, and `run.json` is written last, so a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.decoding.images import Target
from pipeline.errors import OutputError, without_secrets
from pipeline.results.figures import EpochMetric, Metric

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.parquet"
PREDICTIONS = "predictions"
_TABLES = ("metrics", "confusion", "means", "weights", "history", "skipped")
# Digests tell contents apart; these columns tell one run from another of the same content.
_TIMES = frozenset(("seconds",))


@dataclass(frozen=True)
class Output:
    """Where results go: a local folder, as an absolute path, or a URI of `pyarrow.fs`."""

    root: str

    @classmethod
    def at(cls, out: str) -> Output:
        """Take `--out` as the user gave it."""
        return cls(storage.absolute_root("--out", out, OutputError))

    @cached_property
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The file system and the root's path on it; connects at first use in each process."""
        return storage.open_root("--out", self.root, OutputError)


@dataclass(frozen=True)
class Checkpoint:
    """Training as it stands after an epoch.

    Attributes:
        fingerprint: What must be equal for the training to go on: data, options, seed.
        history: A row an epoch.
        params_P: float32 [P].
    """

    fingerprint: dict[str, Any]
    history: list[EpochMetric]
    params_P: npt.NDArray[np.float32]


def prepare(output: Output, *, overwrite: bool, resume: bool) -> None:
    """Make the folder and see that nothing of value is in the way.

    Raises:
        OutputError: If the folder holds anything and neither option was given, if it holds other things than
            results, if a finished run is to be resumed, or if it cannot be written.
    """
    filesystem, root = output.filesystem
    try:
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        infos = storage.persist(lambda: filesystem.get_file_info(selector), root)
        files = [info.path[len(root.rstrip("/")) + 1 :] for info in infos if info.type == pafs.FileType.File]
        foreign = [name for name in files if not _is_result(name)]
        if files and not (overwrite or resume):
            raise OutputError(
                f"--out {output.root}: expected a new or empty folder, got one with {len(files)} files; "
                "choose another, or give --overwrite or --resume"
            )
        if foreign:
            raise OutputError(
                f"--out {output.root}: expected only results of this job, got {foreign[0]}; choose another folder"
            )
        if resume and RUN_FILE in files:
            raise OutputError(
                f"--out {output.root}: expected an unfinished run to resume, got a finished one; "
                "give --overwrite to run it anew"
            )
        # run.json first: from here on the folder is unfinished. What is resumed from stays.
        for name in sorted(files, key=lambda name: name != RUN_FILE):
            if not (resume and name == CHECKPOINT_FILE):
                storage.delete(filesystem, f"{root}/{name}")
        storage.persist(lambda: filesystem.create_dir(f"{root}/{PREDICTIONS}", recursive=True), root)
    except OSError as exc:
        raise OutputError(
            f"--out {output.root}: expected to write there, got {storage.reason(exc)}; choose another"
        ) from exc


def write_table(output: Output, name: str, table: pa.Table) -> str:
    """Write a table as `<name>.parquet`, whole or not at all, and return the digest of its content.

    Raises:
        OutputError: If it cannot be written.
    """
    digest = hashlib.sha256()
    _write_parquet(output, name, table.schema, [table], lambda table: _update_digest(digest, table))
    return digest.hexdigest()


def write_tables(output: Output, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> str:
    """Write tables of one schema one after another into `<name>.parquet`; otherwise as `write_table`.

    The digest is that of the rows, however they are parted into tables.
    """
    digest = hashlib.sha256(str(schema).encode())

    def note(table: pa.Table) -> None:
        for row in table.to_pylist():
            digest.update(json.dumps(row).encode())

    _write_parquet(output, name, schema, tables, note)
    return digest.hexdigest()


def _write_parquet(
    output: Output, name: str, schema: pa.Schema, tables: Iterable[pa.Table], note: Callable[[pa.Table], None]
) -> None:
    # Scores hardly repeat, so a dictionary of them only costs time.
    texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name != "key"]

    def write(stream: pa.NativeFile) -> None:
        with pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=texts) as writer:
            for table in tables:
                writer.write_table(table)
                note(table)

    _write_file(output, f"{name}.parquet", write)


def write_run(output: Output, run: Mapping[str, Any]) -> None:
    """Write `run.json`, the mark of a finished run, after removing what writers that were killed have left."""
    if not storage.is_uri(output.root):
        for temporary in Path(output.root).glob("**/.*.tmp"):
            temporary.unlink(missing_ok=True)
    # A path whose bytes are not UTF-8 comes out as JSON escapes, and back from them unchanged.
    content = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False)
    _write_file(output, RUN_FILE, lambda stream: stream.write(content.encode(errors="backslashreplace")))


def combine_digests(digests: Mapping[str, str]) -> str:
    """Digest the digests of all tables, by name: one value to compare two runs by."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def write_checkpoint(output: Output, checkpoint: Checkpoint) -> None:
    """Keep training as it stands; `--resume` goes on from here."""
    metadata = {
        "fingerprint": json.dumps(checkpoint.fingerprint),
        "history": json.dumps([asdict(row) for row in checkpoint.history]),
    }
    schema = pa.schema([("params", pa.float32())], metadata=metadata)
    write_table(output, CHECKPOINT_FILE.removesuffix(".parquet"), pa.table([checkpoint.params_P], schema=schema))


def read_checkpoint(output: Output, fingerprint: dict[str, Any]) -> Checkpoint | None:
    """Read where an unfinished training stood; None if it had not finished an epoch.

    Raises:
        OutputError: If it was begun on other data or with other options.
    """
    filesystem, root = output.filesystem
    path = f"{root}/{CHECKPOINT_FILE}"
    try:
        if storage.persist(lambda: filesystem.get_file_info(path), path).type == pafs.FileType.NotFound:
            return None
        table = storage.persist(lambda: pq.read_table(path, filesystem=filesystem), path)
        was: dict[str, Any] = json.loads(table.schema.metadata[b"fingerprint"])
    except (pa.ArrowInvalid, TypeError, KeyError, OSError) as exc:
        raise OutputError(
            f"{output.root}/{CHECKPOINT_FILE}: expected a checkpoint of this job, got {exc}; give --overwrite"
        ) from exc
    if different := [name for name in fingerprint if was.get(name) != fingerprint[name]]:
        name = different[0]
        expected, got = f"{name} {was.get(name)}", fingerprint[name]
        if name == "listing":  # two digests tell nobody anything
            expected, got = "the files", "others"
        raise OutputError(
            f"--resume: expected {expected}, with which {output.root} was begun, got {got}; "
            "run with the same data and options, or give --overwrite"
        )
    history = [EpochMetric(**row) for row in json.loads(table.schema.metadata[b"history"])]
    return Checkpoint(was, history, table["params"].to_numpy())


def delete_checkpoint(output: Output) -> None:
    """Remove what only an unfinished run needs."""
    filesystem, root = output.filesystem
    try:
        storage.delete(filesystem, f"{root}/{CHECKPOINT_FILE}")
    except OSError as exc:  # the results are whole all the same
        shown = without_secrets(output.root)
        logger.warning("%s/%s: expected to remove it, got %s", shown, CHECKPOINT_FILE, storage.reason(exc))


def metrics_table(metrics: Sequence[Metric]) -> pa.Table:
    """Lay out `metrics.parquet`."""
    rows = [asdict(metric) for metric in metrics]
    schema = pa.schema(
        [("classifier", pa.string()), ("scope", pa.string()), ("class", pa.string()), ("num_images", pa.int64()),
         ("num_correct", pa.int64()), ("accuracy", pa.float64()), ("accuracy_low", pa.float64()),
         ("accuracy_high", pa.float64())]
    )  # fmt: skip
    columns = [[row["class_name" if name == "class" else name] for row in rows] for name in schema.names]
    return pa.table(columns, schema=schema)


def confusion_table(classes: Sequence[str], confusions: Mapping[str, npt.NDArray[np.int64]]) -> pa.Table:
    """Lay out `confusion.parquet`: a row for each pair of classes that occurs."""
    rows = [
        (classifier, classes[true], classes[predicted], int(confusion_KK[true, predicted]))
        for classifier, confusion_KK in confusions.items()
        for true, predicted in np.argwhere(confusion_KK)
    ]
    schema = pa.schema(
        [("classifier", pa.string()), ("true_class", pa.string()), ("predicted_class", pa.string()),
         ("num_images", pa.int64())]
    )  # fmt: skip
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def means_table(
    classes: Sequence[str], target: Target, counts_K: npt.NDArray[np.int64], means_KD: npt.NDArray[np.float32]
) -> pa.Table:
    """Lay out `means.parquet`; D is row-major, 0 to 1."""
    columns = {"class": list(classes), "num_images": counts_K, **_shape_columns(len(classes), target)}
    return pa.table({**columns, "mean": _to_lists(means_KD)})


def weights_table(
    classes: Sequence[str], target: Target, params_P: npt.NDArray[np.float32], centre_D: npt.NDArray[np.float64]
) -> pa.Table:
    """Lay out `weights.parquet` from the parameters, K·D weights and K biases; D is row-major.

    The model was trained on pixels less `centre_D`; the bias that is written is that for pixels as they are, 0 to 1.
    """
    columns = {"class": list(classes), **_shape_columns(len(classes), target)}
    weights_KD, bias_K = params_P[: -len(classes)].reshape(len(classes), -1), params_P[-len(classes) :]
    plain_bias_K = (bias_K - weights_KD.astype(np.float64) @ centre_D).astype(np.float32)
    return pa.table({**columns, "weights": _to_lists(weights_KD), "bias": plain_bias_K})


def history_table(history: Sequence[EpochMetric]) -> pa.Table:
    """Lay out `history.parquet`."""
    return pa.Table.from_pylist([asdict(row) for row in history])


def predictions_table(
    classes: Sequence[str],
    keys: pa.StringArray,
    labels_N: npt.NDArray[np.int64],
    predictions_N: Mapping[str, npt.NDArray[np.int64]],
    scores_NK: Mapping[str, npt.NDArray[np.float32]],
) -> pa.Table:
    """Lay out one part of `predictions/`."""
    names = np.array(classes, object)  # Arrow's own choice would load pyarrow.compute
    columns = {"key": keys, "class": pa.array(names[labels_N], pa.string())}
    for classifier, predicted_N in predictions_N.items():
        scores = pa.array(scores_NK[classifier].reshape(-1))
        columns[f"{classifier}_prediction"] = pa.array(names[predicted_N], pa.string())
        columns[f"{classifier}_scores"] = pa.FixedSizeListArray.from_arrays(scores, len(classes))
    return pa.table(columns)


def _shape_columns(num_rows: int, target: Target) -> dict[str, pa.Array]:
    sides = {"height": target.height, "width": target.width, "channels": target.channels}
    return {name: pa.repeat(pa.scalar(side, pa.int32()), num_rows) for name, side in sides.items()}


def _to_lists(values_KD: npt.NDArray[np.float32]) -> pa.ListArray:
    num_rows, num_values = values_KD.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_values)
    return pa.ListArray.from_arrays(offsets, pa.array(values_KD.reshape(-1)))


def _update_digest(digest: hashlib._Hash, table: pa.Table) -> None:
    """Digest a table's content: Arrow's stream format, which says names, types, values and nothing of the file."""
    content = table.select([name for name in table.column_names if name not in _TIMES]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    digest.update(sink.getvalue())


def _write_file(output: Output, name: str, write: Callable[[pa.NativeFile], object]) -> None:
    filesystem, root = output.filesystem
    try:
        storage.write_whole(filesystem, f"{root}/{name}", write)
    except OSError as exc:
        raise OutputError(f"{output.root}/{name}: expected to write it, got {storage.reason(exc)}; make room or choose "
                          "another --out") from exc  # fmt: skip


def _is_result(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if file.startswith(".") and file.endswith(".tmp"):
        file = file[1:].rsplit(".", 2)[0]
    if folder == PREDICTIONS:
        return file.startswith("part-") and file.endswith(".parquet")
    return not folder and file in (RUN_FILE, CHECKPOINT_FILE, *(f"{table}.parquet" for table in _TABLES))
