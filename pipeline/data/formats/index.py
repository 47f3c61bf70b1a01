"""The index of one archive: its images, a row each, by split.

Input: the images that a format found in an archive, and the options. Output: a `Scan` of counts, and an index of one
row an image. Invariant: an index keeps the order of its file, so that reading goes forward; a key is the archive's
name below the root, a slash, and what finds the image inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.data.ahead import Admit, read_many
from pipeline.data.splits import Split, are_held_out, hashes_of, valid_names
from pipeline.data.storage import Store
from pipeline.errors import DataError

# label: an index into the class names of the scan. offset: the first byte in a tar, the row in a Parquet file.
# size: bytes in a tar; 0 in a Parquet file, which does not say.
INDEX = pa.schema([("key", pa.binary()), ("label", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
# Sides of `ScannedImages`, before the options decide.
TRAIN, VALID, NO_SPLIT, LEFT_OUT = range(4)

Index: TypeAlias = dict[Split, pa.Table]


@dataclass(frozen=True)
class Archive:
    """A file of many images.

    Attributes:
        kind: The name of its format.
        path: Its path in the store.
        name: Its path below the dataset's root, with which the keys of its images begin.
        size_bytes: Its size as listed.
        mtime_ns: When it was changed, in nanoseconds of Unix time, where the store says it.
        split: The split that all of its images belong to, where the name says it.
        split_name: How the name calls that split.
        image_column: The column of a Parquet file's images, where the options name it.
        moved: Images that change sides after a share was held out, each by its class and its hash.
    """

    kind: str
    path: str
    name: str
    size_bytes: int
    mtime_ns: int | None
    split: Split | None
    split_name: str | None
    image_column: str | None = None
    moved: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Scan:
    """What one archive holds, without anything per image.

    Attributes:
        class_names: What a label of the index stands for. A Parquet file that lists its classes gives all of them.
        num_images: Images by split and class; classes without images are left out.
        row_groups: By split, the rows of the index where a row group begins, and at last their number. Cutting shards
            there lets no two of them decode the same row group. A tar is one group.
        split_names: The splits that the folders inside name, where the archive's own name does not.
        num_ignored: Members that are no images, by ending.
        extremes: Where a share is held out, the lowest and the highest hash of each class's images.
    """

    class_names: tuple[str, ...]
    num_images: dict[Split, dict[str, int]]
    row_groups: dict[Split, tuple[int, ...]]
    split_names: tuple[str, ...]
    num_ignored: dict[str, int]
    extremes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScannedImages:
    """All images of one archive in its order: what a scan has found before the options choose among them.

    Attributes:
        keys: Binary.
        labels: int32 (N,), indices into `class_names`.
        offsets: int64 (N,).
        sizes: int64 (N,).
        sides: int8 (N,), each `TRAIN`, `VALID`, `NO_SPLIT` or `LEFT_OUT`.
        class_names: K names.
        group_starts: int64 (G,), the first row of each row group.
    """

    keys: pa.ChunkedArray
    labels: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int8]
    class_names: tuple[str, ...]
    group_starts: npt.NDArray[np.int64]


def make_index(
    archive: Archive, rows: ScannedImages, config: Config, split_names: tuple[str, ...], ignored: Counter[str]
) -> tuple[Scan, Index]:
    """Choose the images of both splits and of the classes asked for, and hold out where there are no splits.

    Args:
        archive: The file.
        rows: Its images.
        config: The options.
        split_names: The splits that folders inside name.
        ignored: Its other members, by ending.

    Raises:
        DataError: If the images belong to no split and none is to be held out.
    """
    sides = rows.sides
    extremes: dict[str, tuple[int, int]] = {}
    if (sides == NO_SPLIT).any():
        if config.valid_fraction is None:
            raise DataError(
                f"{archive.path}: expected {config.train_split} and {' or '.join(valid_names(config))} as words of the "
                "files' paths, or as folders inside the archive, got no two splits; name them with --train-split and "
                "--valid-split, or hold images out with --valid-fraction 0.2"
            )
        hashes = hashes_of((key for chunk in rows.keys.chunks for key in chunk.to_pylist()), len(rows.keys))
        is_valid = are_held_out(hashes, config.valid_fraction)
        for name, moved in archive.moved:
            is_it = (hashes == np.uint64(moved)) & (rows.labels == rows.class_names.index(name))
            is_valid[is_it] = ~is_valid[is_it]
        extremes = _extremes(rows, hashes, sides == NO_SPLIT)
        sides = np.where(sides == NO_SPLIT, np.where(is_valid, VALID, TRAIN), sides)
    if config.classes or config.exclude_classes:
        wanted = [label for label, name in enumerate(rows.class_names) if config.wants_class(name)]
        sides = np.where(np.isin(rows.labels, wanted), sides, LEFT_OUT)
    table = pa.table([rows.keys, rows.labels, rows.offsets, rows.sizes], schema=INDEX)
    index: Index = {}
    num_images: dict[Split, dict[str, int]] = {}
    row_groups: dict[Split, tuple[int, ...]] = {}
    choices: tuple[tuple[Split, int], ...] = (("train", TRAIN), ("valid", VALID))
    for split, side in choices:
        chosen = sides == side
        index[split] = table if chosen.all() else table.filter(pa.array(chosen))
        counts = np.bincount(rows.labels[chosen], minlength=len(rows.class_names))
        num_images[split] = {rows.class_names[label]: int(counts[label]) for label in np.flatnonzero(counts)}
        starts = np.searchsorted(np.flatnonzero(chosen), rows.group_starts)
        row_groups[split] = tuple(sorted({0, *starts.tolist(), int(chosen.sum())}))
    return Scan(rows.class_names, num_images, row_groups, split_names, dict(sorted(ignored.items())), extremes), index


def _extremes(
    rows: ScannedImages, hashes: npt.NDArray[np.uint64], is_used: npt.NDArray[np.bool_]
) -> dict[str, tuple[int, int]]:
    lowest = np.full(len(rows.class_names), np.iinfo(np.uint64).max, np.uint64)
    highest = np.zeros(len(rows.class_names), np.uint64)
    np.minimum.at(lowest, rows.labels[is_used], hashes[is_used])
    np.maximum.at(highest, rows.labels[is_used], hashes[is_used])
    there = np.unique(rows.labels[is_used]).tolist()
    return {rows.class_names[label]: (int(lowest[label]), int(highest[label])) for label in there}


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a file system or Arrow raises into one line that names the file."""
    try:
        yield
    except FileNotFoundError as exc:
        raise DataError(f"{path}: expected to read it, got no such file; check the name and run again") from exc
    # UnicodeError: Arrow takes paths as text alone.
    except (OSError, pa.ArrowException, UnicodeError) as exc:
        raise DataError(f"{path}: expected to read it, got {exc}; check the file and the connection") from exc


def read_spans(store: Store, archive: Archive, spans: Sequence[tuple[int, int]], concurrency: int) -> Iterator[bytes]:
    """Read parts of an archive, each from a byte up to another, in their order, and others ahead where that helps.

    Raises:
        OSError: If it cannot be read.
        DataError: If it ends before.
    """
    read = partial(_read_span, store, archive.path)
    answers = read_many(read, spans, concurrency, is_local=store.is_local)
    for (start, stop), answer in zip(spans, answers, strict=True):
        if isinstance(answer, OSError):
            raise answer
        if len(answer) != stop - start:
            raise DataError(
                f"{archive.path}: expected the {archive.size_bytes} bytes that were listed, got fewer; "
                "leave the file as it is while a job runs, and run again"
            )
        yield answer


def _read_span(store: Store, path: str, span: tuple[int, int], admit: Admit) -> bytes:
    admit(span[1] - span[0])
    return store.read_range(path, *span)
