"""Predictions that were made elsewhere: a Parquet or CSV file of keys with classes, or with a score for each class.

Input: a local path or URI. Output: the file's columns, its pieces and its digest. Invariant: no row is looked at; what
is wrong with the file is one line.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa

from pipeline.config import SCORES
from pipeline.data.ahead import read_many
from pipeline.data.files import enumerate_names
from pipeline.data.storage import Entry, Store, StoredFile, open_root, reason
from pipeline.data.uris import absolute_root
from pipeline.errors import DataError, quoted, without_secrets

KEY, PREDICTION = "key", "prediction"
_MAGIC = b"PAR1"
# What pandas calls a column of row numbers in a Parquet file; in a CSV file it has no name.
_INDEX = "__index_level_"
# Of a CSV file's text, and of what rows of a Parquet file are without compression; a task holds some times as much.
PIECE_BYTES = 64 * 2**20
# A value of a CSV file: in quotes, which may hold line ends and, twice, quotes; or as it is.
CSV_VALUE = rb'(?:"(?:[^"]|"")*"|[^",\r\n]*)'
_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?" + CSV_VALUE + b"(?:," + CSV_VALUE + rb")*\r?\n")
_HEADER_BYTES, _MAX_HEADER_BYTES = 2**16, 2**24
_HASHED_BYTES, _HASHED_AHEAD = 2**23, 4


@dataclass(frozen=True)
class ScoreFile:
    """A file of predictions, as it is before a row is read.

    Attributes:
        given: As the user gave it, without secrets.
        root: Its full path, or its URI.
        entry: What the store tells of it.
        is_csv: Whether it is a CSV file, else a Parquet file.
        columns: Names of all columns, in order.
        header_bytes: Of a CSV file, where the first row begins.
        row_groups: Of a Parquet file, the rows of each, and their bytes without compression.
    """

    given: str
    root: str
    entry: Entry
    is_csv: bool
    columns: tuple[str, ...] = ()
    header_bytes: int = 0
    row_groups: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple[type[ScoreFile], tuple[Any, ...]]:
        # Without what it has opened, which belongs to one process.
        return ScoreFile, tuple(getattr(self, each.name) for each in fields(self))

    @cached_property
    def store(self) -> Store:
        """Its store; connects at first use in each process."""
        return open_root("--scores", self.root, DataError)[0]

    @property
    def kind(self) -> Literal["predictions", "scores"]:
        """Whether it says a class for each image, or a score for each class."""
        return "predictions" if PREDICTION in self.columns else "scores"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that have a column."""
        return tuple(name for name in self.columns if name != KEY) if self.kind == "scores" else ()


def open_scores(given: str) -> ScoreFile:
    """Find a file of predictions and look at its columns.

    Args:
        given: A local path or URI.

    Raises:
        DataError: If it is not there, is empty, or has not the columns that are needed.
    """
    root = absolute_root("--scores", given, DataError)
    shown = f"--scores {without_secrets(given)}"
    store, path = open_root("--scores", root, DataError)
    with reading(shown):
        entry = store.find(path)
    if entry is None or entry.is_folder:
        found = "nothing" if entry is None else "a folder"
        raise DataError(
            f"{shown}: expected {', '.join(SCORES)} or a file, got {found}; name a Parquet or CSV file that every "
            "node sees"
        )
    if entry.size == 0:
        raise DataError(f"{shown}: expected rows, got an empty file; write it again")
    is_csv = entry.path.lower().endswith(".csv")
    if not is_csv and not entry.path.lower().endswith(".parquet"):
        with reading(shown):
            is_csv = store.read_range(path, 0, len(_MAGIC)) != _MAGIC
    file = ScoreFile(shown, root, entry, is_csv)
    opened = _open_csv(file) if file.is_csv else _open_parquet(file)
    _check_columns(opened)
    return opened


def check_classes(file: ScoreFile, classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Match a file's columns with the classes of a dataset.

    Returns:
        The classes of the dataset that have no column, and the columns of classes that the dataset lacks; nothing of a
        file of predictions.

    Raises:
        DataError: If no class has a column.
    """
    if file.kind == "predictions":
        return (), ()
    missing = tuple(name for name in classes if name not in file.classes)
    if len(missing) == len(classes):
        raise DataError(
            f"{file.given}: expected a column {PREDICTION}, or one for each class, as {enumerate_names(classes)}, got "
            f"{enumerate_names(file.columns)}; name the columns by the classes"
        )
    return missing, tuple(name for name in file.classes if name not in classes)


def cut(file: ScoreFile) -> list[tuple[int, int]]:
    """Cut a file into pieces: of a CSV file from a byte up to another, of a Parquet file from a row up to another."""
    if file.is_csv:
        starts = [*range(file.header_bytes, file.entry.size, PIECE_BYTES), file.entry.size]
        return list(itertools.pairwise(starts))
    pieces: list[tuple[int, int]] = []
    start = row = held_bytes = 0
    for num_rows, num_bytes in file.row_groups:
        # A row group is read from its first row on, so that neighbours that are small go together.
        if held_bytes and held_bytes + num_bytes > PIECE_BYTES:
            pieces.append((start, row))
            start, held_bytes = row, 0
        row, held_bytes = row + num_rows, held_bytes + num_bytes
        if held_bytes > PIECE_BYTES:
            step = -(-num_rows // -(-num_bytes // PIECE_BYTES))
            pieces += [(first, min(row, first + step)) for first in range(start, row, step)]
            start, held_bytes = row, 0
    return [*pieces, (start, row)] if row > start else pieces


def size_bytes(file: ScoreFile) -> int:
    """Return about how many bytes all rows take in memory."""
    return file.entry.size if file.is_csv else sum(num_bytes for _, num_bytes in file.row_groups)


def hash_file(file: ScoreFile) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        DataError: If it cannot be read, or is no longer as long as it was.
    """
    digest, done = hashlib.sha256(), 0
    spans = [(start, start + _HASHED_BYTES) for start in range(0, file.entry.size, _HASHED_BYTES)]

    def read(span: tuple[int, int], admit: Any) -> bytes:
        admit(_HASHED_BYTES)
        return file.store.read_range(file.entry.path, *span)

    with reading(file.given):
        for block in read_many(read, spans, _HASHED_AHEAD, is_local=file.store.is_local):
            if isinstance(block, OSError):
                raise block
            digest.update(block)
            done += len(block)
    if done != file.entry.size:
        raise DataError(
            f"{file.given}: expected {file.entry.size:,} bytes as at the beginning, got {done:,}; leave the file as it "
            "is while a job runs"
        )
    return digest.hexdigest()


def _open_csv(file: ScoreFile) -> ScoreFile:
    from pyarrow import csv

    with reading(file.given):
        length, begin = _HEADER_BYTES, b""
        while not _HEADER.match(begin) and len(begin) < min(file.entry.size, _MAX_HEADER_BYTES):
            begin = file.store.read_range(file.entry.path, 0, min(length, file.entry.size))
            length *= 4
        found = _HEADER.match(begin)
        header = found[0] if found else begin[: begin.find(b"\n") + 1] or begin
        columns = csv.read_csv(pa.py_buffer(header), csv.ReadOptions(use_threads=False)).column_names
    if len(header) == file.entry.size:
        raise DataError(f"{file.given}: expected rows below the names of columns, got none; write it again")
    return replace(file, columns=tuple(columns), header_bytes=len(header))


def _open_parquet(file: ScoreFile) -> ScoreFile:
    import pyarrow.parquet as pq

    with reading(file.given):
        with pq.ParquetFile(StoredFile(file.store, file.entry.path, file.entry.size)) as parquet:
            about, schema = parquet.metadata, parquet.schema_arrow
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
            row_groups = tuple((group.num_rows, group.total_byte_size) for group in groups)
        opened = replace(file, columns=tuple(schema.names), row_groups=row_groups)
    if about.num_rows == 0:
        raise DataError(f"{file.given}: expected rows, got none; write it again")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if field.name == KEY:
            expected, is_fitting = "text", is_text
        elif opened.kind == "predictions":
            expected, is_fitting = "text or whole numbers", is_text or pa.types.is_integer(kind)
            is_fitting = is_fitting or field.name != PREDICTION
        else:
            expected, is_fitting = "numbers", pa.types.is_floating(kind) or pa.types.is_integer(kind)
        if not is_fitting:
            raise DataError(
                f"{file.given}: expected {expected} in column {field.name}, got {field.type}; write the file with these"
            )
    return opened


def _check_columns(file: ScoreFile) -> None:
    columns = file.columns
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{file.given}: expected each column once, got {quoted(twice)} twice; name the columns apart")
    if file.kind == "scores" and (numbers := [name for name in columns if not name or name.startswith(_INDEX)]):
        raise DataError(
            f"{file.given}: expected a class as the name of each column, got {numbers[0] or 'one without a name'}; "
            "write the file without the rows' numbers, of pandas with index=False"
        )
    if KEY not in columns:
        raise DataError(
            f"{file.given}: expected a column {KEY}, got {enumerate_names(columns)}; name the images' column so"
        )
    if len(columns) == 1:
        raise DataError(
            f"{file.given}: expected a column {PREDICTION}, or one for each class, got {KEY} alone; write one of them"
        )


@contextmanager
def reading(given: str) -> Iterator[None]:
    """Turn what a file system or Arrow raises into one line that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeError) as exc:
        words = reason(exc) if isinstance(exc, OSError) else str(exc)
        raise DataError(
            f"{given}: expected a Parquet or CSV file that can be read, got {words}; check the file, which every node "
            "has to see"
        ) from exc
