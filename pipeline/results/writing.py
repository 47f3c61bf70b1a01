"""The result tables, written whole or not at all.

Input: figures, counts and scored parts. Output: Parquet files and `run.json` in a folder or below a URI. Invariant: a
file under its final name is complete, and `run.json` is written last, so a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.storage import Store, open_root, reason
from pipeline.data.uris import absolute_root, is_uri
from pipeline.errors import OutputError, counted, without_secrets

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.parquet"
REPORT_FILE = "report.html"
PREDICTIONS = "predictions"
_TABLES = ("metrics", "confusion", "means", "weights", "history", "skipped", "duplicates", "suspects")
# Digests tell contents apart; these columns tell one run from another of the same content.
_TIMES = frozenset(("seconds",))


@dataclass(frozen=True)
class Output:
    """Where results go, or are: a local folder, as an absolute path, or a URI; and what errors call it."""

    root: str
    option: str = "--out"

    def __reduce__(self) -> tuple[type[Output], tuple[str, str]]:
        # Without what it has opened, which belongs to one process.
        return Output, (self.root, self.option)

    @classmethod
    def at(cls, out: str) -> Output:
        """Take `--out` as the user gave it."""
        return cls(absolute_root("--out", out, OutputError))

    @cached_property
    def store(self) -> tuple[Store, str]:
        """The store and the root's path on it; connects at first use in each process."""
        return open_root(self.option, self.root, OutputError)


def prepare(output: Output, *, overwrite: bool, resume: bool) -> None:
    """Make the folder and see that nothing of value is in the way.

    Raises:
        OutputError: If the folder holds anything and neither option was given, if it holds other things than
            results, if a finished run is to be resumed, or if it cannot be written.
    """
    store, root = output.store
    try:
        files = [entry.path[len(root.rstrip("/")) + 1 :] for entry in store.entries(root, recursive=True)]
        foreign = [name for name in files if not _is_result(name)]
        if foreign and (overwrite or resume):
            raise OutputError(
                f"--out {output.root}: expected only results of this job, got {foreign[0]}; choose another folder"
            )
        if files and not (overwrite or resume):
            found, advice = _what_is_there(files, foreign)
            raise OutputError(f"--out {output.root}: expected a new or empty folder, got {found}; {advice}")
        if resume and RUN_FILE in files:
            raise OutputError(
                f"--out {output.root}: expected an unfinished run to resume, got a finished one; "
                "give --overwrite to run it anew"
            )
        if resume and CHECKPOINT_FILE not in files:
            logger.info("--resume: no epoch is saved in %s; beginning anew", without_secrets(output.root))
        # run.json first: from here on the folder is unfinished. What is resumed from stays.
        for name in sorted(files, key=lambda name: name != RUN_FILE):
            if not (resume and name == CHECKPOINT_FILE):
                store.delete(f"{root}/{name}")
        store.make_folder(f"{root}/{PREDICTIONS}")
        # What could not be written would be known hours later.
        trial = f"{root}/.{RUN_FILE}.0.tmp"
        store.write(trial, lambda stream: stream.write(b""))
        store.delete(trial)
    except OSError as exc:
        raise OutputError(f"--out {output.root}: expected to write there, got {reason(exc)}; choose another") from exc


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
    texts += [f"{field.name}.list.element" for field in schema if field.type == pa.list_(pa.string())]

    def write(stream: pa.NativeFile) -> None:
        with pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=texts) as writer:
            for table in tables:
                writer.write_table(table)
                note(table)

    write_file(output, f"{name}.parquet", write)


def write_run(output: Output, run: Mapping[str, Any]) -> None:
    """Write `run.json`, the mark of a finished run, after removing what writers that were killed have left."""
    if not is_uri(output.root):
        for temporary in Path(output.root).glob("**/.*.tmp"):
            temporary.unlink(missing_ok=True)
    # A path whose bytes are not UTF-8 comes out as JSON escapes, and back from them unchanged.
    content = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(output, RUN_FILE, lambda stream: stream.write(content.encode(errors="backslashreplace")))


def combine_digests(digests: Mapping[str, str]) -> str:
    """Digest the digests of all tables, by name: one value to compare two runs by."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _update_digest(digest: hashlib._Hash, table: pa.Table) -> None:
    """Digest a table's content: Arrow's stream format, which says names, types, values and nothing of the file."""
    content = table.select([name for name in table.column_names if name not in _TIMES]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)
    digest.update(sink.getvalue())


def write_file(output: Output, name: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: If it cannot be written.
    """
    store, root = output.store
    try:
        store.write(f"{root}/{name}", write)
    except OSError as exc:
        raise OutputError(
            f"{output.root}/{name}: expected to write it, got {reason(exc)}; free disk space or choose another --out"
        ) from exc


def _what_is_there(files: Collection[str], foreign: Collection[str]) -> tuple[str, str]:
    """Say what a folder holds that is neither to be replaced nor gone on with, and what to do."""
    if foreign:
        return f"one with {counted(len(files), 'file')}", "choose another"
    if RUN_FILE in files:
        return "a finished run", "choose another, or replace it with --overwrite"
    return "an unfinished run", "go on with it by --resume, or start over by --overwrite"


def _is_result(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if file.startswith(".") and file.endswith(".tmp"):
        file = file[1:].rsplit(".", 2)[0]
    if folder == PREDICTIONS:
        return file.startswith("part-") and file.endswith(".parquet")
    return not folder and file in (RUN_FILE, CHECKPOINT_FILE, REPORT_FILE, *(f"{table}.parquet" for table in _TABLES))
