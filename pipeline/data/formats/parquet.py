"""Parquet files with the bytes of images, as Hugging Face datasets writes them, and plainer ones.

Input: a Parquet file with a column of images, a struct of `bytes` and `path` or plain bytes, and one of classes.
Output: a `Scan` with an index of row numbers; and for rows of the index, the bytes. Invariant: a scan reads no image,
and a read decodes only the row groups it needs, a few images at a time.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.data.files import ReadFault
from pipeline.data.formats.index import (
    NO_SPLIT,
    TRAIN,
    VALID,
    Archive,
    Index,
    Scan,
    ScannedImages,
    make_index,
    read_spans,
    reading,
)
from pipeline.data.splits import natural_sort_key
from pipeline.data.storage import MAX_FILE_BYTES, Store, StoredFile
from pipeline.errors import DataError

IMAGE_COLUMNS = ("image", "img", "png", "jpg")
LABEL_COLUMNS = ("label", "class", "cls", "labels")
_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_SCAN_ROWS = 2**16
# Decoded at a time: some images, so that a row group of any size passes through a bounded memory.
_BATCH_BYTES, _MAX_BATCH_ROWS = 2**23, 4096
# Of a local column chunk read at a time; and of a remote one, with what lies between two chunks that are wanted.
_BUFFER_BYTES = 2**20
_SPAN_BYTES, _MAX_BETWEEN = 2**22, 2**18
# A file's end, in which its metadata are, nearly always whole.
_FOOTER_BYTES = 2**16
_SCAN_CONCURRENCY = 16


def scan(store: Store, archive: Archive, config: Config) -> tuple[Scan, Index]:
    """List the images of a Parquet file with their classes, without reading them.

    The columns are those that the schema's metadata declare as `Image` and `ClassLabel`, under the key `huggingface`
    (https://huggingface.co/docs/datasets/about_dataset_features); else those of the usual names. A key is the file's
    name, the row, and the image's `path` where it has one: a path alone is often the last part of the file's name
    only, which others share.

    Returns:
        The counts, and by split the index: `key`, `label`, the row as `offset`, and a `size` of 0.

    Raises:
        DataError: If the file is no such Parquet file, a row has no class or one that has no name, or it cannot be
            read.
    """
    with reading(archive.path), _open(store, archive) as source:
        file = pq.ParquetFile(source)
        image, has_path = _find_image(archive, file.schema_arrow)
        label, names = _find_label(archive, file.schema_arrow, config.label_column)
        columns = [label, f"{image}.path"] if has_path else [label]
        if isinstance(source, _RemoteFile):  # the system reads a disk ahead by itself
            source.will_read(file.metadata, range(file.metadata.num_row_groups), columns, _SCAN_CONCURRENCY)
        batches = file.iter_batches(_SCAN_ROWS, columns=columns, use_threads=False)
        keys, values, num_rows = [], [], 0
        for batch in batches:
            keys.append(_make_keys(archive, num_rows, batch, image if has_path else None))
            values.append(batch.column(label))
            num_rows += len(batch)
        group_rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        label_type = file.schema_arrow.field(label).type
    labels, class_names = _read_labels(archive, pa.chunked_array(values, label_type), names)
    side = {None: NO_SPLIT, "train": TRAIN, "valid": VALID}[archive.split]
    rows = ScannedImages(
        keys=pa.chunked_array(keys, pa.binary()),
        labels=labels,
        offsets=np.arange(len(labels), dtype=np.int64),
        sizes=np.zeros(len(labels), np.int64),
        sides=np.full(len(labels), side, np.int8),
        class_names=class_names,
        group_starts=np.cumsum([0, *group_rows[:-1]], dtype=np.int64),
    )
    return make_index(archive, rows, config, (), Counter())


def read_rows(store: Store, archive: Archive, rows: pa.Table, concurrency: int) -> Iterator[bytes | ReadFault]:
    """Read the images of some rows, decoding of each row group no more than up to the last of them.

    Args:
        store: Where the file is.
        archive: The file.
        rows: Some rows of its index, in order.
        concurrency: Requests at a time.

    Yields:
        The bytes of each image, or why there are none.

    Raises:
        DataError: If the file cannot be read, or is damaged.
    """
    wanted = rows["offset"].to_numpy()
    with reading(archive.path), _open(store, archive) as source:
        # Through a buffer, no more of a row group is in memory than a page and a batch; else it would be all of it.
        file = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        image, _ = _find_image(archive, file.schema_arrow)
        is_struct = pa.types.is_struct(file.schema_arrow.field(image).type)
        columns = [f"{image}.bytes" if is_struct else image]
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *(about.num_rows for about in groups)])
        bounds = np.searchsorted(wanted, starts)
        needed = [group for group in range(len(groups)) if bounds[group] < bounds[group + 1]]
        if isinstance(source, _RemoteFile):
            source.will_read(file.metadata, needed, columns, concurrency)
        for group in needed:
            image_bytes = max(1, groups[group].total_byte_size // groups[group].num_rows)
            batches = file.iter_batches(
                max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // image_bytes)),
                row_groups=[group],
                columns=columns,
                use_threads=False,
            )
            yield from _choose(batches, wanted[bounds[group] : bounds[group + 1]] - starts[group])


class _RemoteFile(StoredFile):
    """A file in a bucket, of which some column chunks will be read in their order, ahead of the reader.

    Whatever else is read, as the metadata, is asked for when it is.
    """

    def __init__(self, store: Store, archive: Archive) -> None:
        super().__init__(store, archive.path, archive.size_bytes)
        self._archive = archive
        self._spans: deque[tuple[int, int]] = deque()
        self._blocks: Iterator[bytes] = iter(())
        # What has been read and may be asked for again, by where it begins.
        footer_start = max(0, archive.size_bytes - _FOOTER_BYTES)
        self._held = [(footer_start, store.read_range(archive.path, footer_start, archive.size_bytes))]

    def will_read(
        self, metadata: pq.FileMetaData, groups: Iterable[int], columns: Sequence[str], concurrency: int
    ) -> None:
        """Begin to read columns of row groups."""
        chunks = []
        for group in groups:
            about = metadata.row_group(group)
            for number in range(about.num_columns):
                column = about.column(number)
                if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
                    first = column.dictionary_page_offset or column.data_page_offset
                    start = min(first, column.data_page_offset)
                    chunks.append((start, start + column.total_compressed_size))
        self._spans = deque(_join(sorted(chunks)))
        self._blocks = read_spans(self.store, self._archive, list(self._spans), concurrency)

    def read_some(self, start: int, stop: int) -> memoryview | bytes:
        """Read at least a byte from `start` on, none behind `stop`."""
        while self._spans and self._spans[0][0] <= start:
            begin, end = self._spans.popleft()
            block = next(self._blocks)
            if end > start:
                # With the one before: what is read next may begin in it.
                self._held = [*self._held[-1:], (begin, block)]
        for begin, block in reversed(self._held):
            if begin <= start < begin + len(block):
                return memoryview(block)[start - begin : stop - begin]
        end = min([stop, *(begin for begin, _ in list(self._spans)[:1])])
        return super().read_some(start, end)


def _open(store: Store, archive: Archive) -> pa.NativeFile | _RemoteFile:
    return pa.OSFile(archive.path) if store.is_local else _RemoteFile(store, archive)


def _join(chunks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join neighbours into spans, and part what is longer than one."""
    begin = end = 0
    for start, stop in chunks:
        if start - end > _MAX_BETWEEN or stop - begin > _SPAN_BYTES:
            if end > begin:
                yield begin, end
            begin = start
        while stop - begin > _SPAN_BYTES:
            yield begin, begin + _SPAN_BYTES
            begin += _SPAN_BYTES
        end = stop
    if end > begin:
        yield begin, end


def _choose(batches: Iterator[pa.RecordBatch], wanted: npt.NDArray[np.int64]) -> Iterator[bytes | ReadFault]:
    begin = done = 0
    for batch in batches:
        end = begin + len(batch)
        last = int(np.searchsorted(wanted, end))
        column = batch.column(0)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")  # unlike .field(), with the nulls of the struct itself
        for data in column.take(pa.array(wanted[done:last] - begin)).to_pylist():
            if data is None:
                yield ReadFault("unreadable", "no bytes in the file, at most a path")
            elif len(data) > MAX_FILE_BYTES:
                yield ReadFault("too_large", f"{len(data)} bytes, more than {MAX_FILE_BYTES}")
            else:
                yield data
        begin, done = end, last
        if done == len(wanted):
            return


def _make_keys(archive: Archive, first: int, batch: pa.RecordBatch, image: str | None) -> pa.Array:
    numbers = pc.cast(pa.array(np.arange(first, first + len(batch))), pa.string()).cast(pa.binary())
    parts = [pa.scalar(os.fsencode(archive.name), pa.binary()), numbers]
    if image is not None:
        paths = pc.struct_field(batch.column(image), "path").cast(pa.string())
        parts.append(pc.if_else(pc.equal(paths, ""), None, pc.utf8_ltrim(paths, "/")).cast(pa.binary()))
    return pc.binary_join_element_wise(*parts, pa.scalar(b"/", pa.binary()), null_handling="skip")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Read what the schema's metadata say of the columns; they need not be there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _find_column(archive: Archive, what: str, declared: list[str], usual: list[str], schema: pa.Schema) -> str:
    named = [name for name in usual if name in declared] or declared or usual[:1]
    if len(named) == 1 or (named and named[0] in usual):
        return named[0]
    raise DataError(
        f"{archive.path}: expected one column of {what}, got {', '.join(named or schema.names) or 'no column'}; "
        f"name it with --{what}-column, or write the file with one that is called {what}"
    )


def _find_image(archive: Archive, schema: pa.Schema) -> tuple[str, bool]:
    """Find the column of images, and whether they have paths."""

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and _is_bytes(kind.field(index).type)
        return _is_bytes(kind)

    if len(set(schema.names)) < len(schema.names):
        raise DataError(
            f"{archive.path}: expected each column once, got {', '.join(schema.names)}; write the file with other names"
        )
    fitting = [name for name in schema.names if holds_images(name)]
    if not fitting:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names) or "no column"
        raise DataError(
            f"{archive.path}: expected a column of image files, called {' or '.join(IMAGE_COLUMNS)}, of binary or of a "
            f"struct of bytes (binary) and path, got {columns}; write the file with their bytes"
        )
    declared = [name for name, feature in _features(schema).items() if _type_of(feature) == "Image" and name in fitting]
    if archive.image_column is not None:
        _check_named(archive, "--image-column", archive.image_column, fitting)
        declared, fitting = [archive.image_column], []
    name = _find_column(archive, "image", declared, [name for name in IMAGE_COLUMNS if name in fitting], schema)
    kind = schema.field(name).type
    return name, pa.types.is_struct(kind) and kind.get_field_index("path") >= 0


def _check_named(archive: Archive, option: str, name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        raise DataError(
            f"{option}: expected one of the columns {', '.join(columns)} of {archive.path}, got {name}; name another"
        )


def _find_label(archive: Archive, schema: pa.Schema, label_column: str | None) -> tuple[str, tuple[str, ...] | None]:
    """Find the column of classes, and the names that its numbers stand for, where these are listed."""
    features = _features(schema)
    declared = [name for name in schema.names if _type_of(features.get(name)) == "ClassLabel"]
    if label_column is not None:
        _check_named(archive, "--label-column", label_column, schema.names)
        name = label_column
    else:
        usual = [name for name in LABEL_COLUMNS if name in schema.names]
        name = _find_column(archive, "label", declared, usual, schema)
    names = features[name].get("names") if name in declared else None
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return name, None
    return name, tuple(names)


def _type_of(feature: object) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _read_labels(
    archive: Archive, column: pa.ChunkedArray, names: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Number the classes of all rows.

    Returns:
        Labels, int32 (N,), and the K names that they stand for.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = any(is_kind(column.type) for is_kind in _IS_TEXT)
    if not is_text and not pa.types.is_integer(column.type):
        raise DataError(
            f"{archive.path}: expected classes as integers or strings, got {column.type}; write the file with these"
        )
    if column.null_count:
        raise _bad_label(archive, column.is_null(), "null")
    if names is not None and not is_text:
        values = column.to_numpy()
        is_bad = (values < 0) | (values >= len(names))
        if is_bad.any():
            raise _bad_label(archive, pa.array(is_bad), f"{values[is_bad][0]} with {len(names)} names")
        return values.astype(np.int32), names
    encoded = column.cast(pa.string()).dictionary_encode().unify_dictionaries()
    if not len(encoded):
        return np.zeros(0, np.int32), ()
    found = encoded.chunk(0).dictionary.to_pylist()
    order = sorted(range(len(found)), key=lambda label: natural_sort_key(found[label].encode()))
    if blank := [name for name in found if not name.strip()]:
        raise _bad_label(archive, pc.equal(column, pa.scalar(blank[0], column.type)), f"{blank[0]!r}")
    ranks = np.argsort(np.asarray(order)).astype(np.int32)
    indices = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return ranks[indices], tuple(found[label] for label in order)


def _bad_label(archive: Archive, is_bad: pa.Array | pa.ChunkedArray, found: str) -> DataError:
    row = pc.index(is_bad, True).as_py()
    return DataError(
        f"{archive.path}: expected a class in every row, got {found} in row {row}; leave such rows out of the file"
    )
