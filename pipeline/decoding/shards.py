"""One shard, from its files or the cache to its outcome, cut into what each actor is to have.

Input: a `Shard` and its rows of the listing. Output: tables for actors, and the skipped images. Invariant: the same
images come from a class folder, an archive or the cache as the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from pipeline.data import files
from pipeline.data.columns import one_chunk
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats import reader_of
from pipeline.data.formats.index import Archive
from pipeline.decoding import cache, cache_key
from pipeline.decoding.cache import Cache
from pipeline.decoding.images import Decoded, Fault, Header, decode_images, read_header
from pipeline.errors import DataError
from pipeline.plan import LaneAssignment, Shard, Target


@dataclass(frozen=True)
class Loader:
    """What is the same for every shard.

    Attributes:
        location: The dataset.
        target: What every image becomes.
        classes: Names of the K classes.
        assignment: How training images come to lanes.
        num_actors: How many actors the lanes are assigned to.
        cache: Where outcomes are kept; None for nowhere.
        split_names: What the dataset calls the splits, train and valid.
        keeps_train_keys: Whether the training images' keys are wanted too.
        train_target: What training images become, where that is something else.
    """

    location: Location
    target: Target
    classes: tuple[str, ...]
    assignment: LaneAssignment
    num_actors: int
    cache: Cache | None
    split_names: tuple[str, str] = ("train", "valid")
    keeps_train_keys: bool = False
    train_target: Target | None = None


@dataclass(frozen=True)
class ShardFile:
    """The archive that a shard lies in, and the listing's class for each of its own, int."""

    archive: Archive
    labels: tuple[int, ...]


def shard_owners(assignment: LaneAssignment, num_actors: int, shard: Shard) -> list[int]:
    """Name the actors, by rank, that some of a training shard's images belong to."""
    # Every image of a run goes to one lane, and after as many runs as there are lanes they come again.
    first_run, last_run = shard.start // assignment.run_length, (shard.stop - 1) // assignment.run_length
    last_run = min(last_run, first_run + assignment.num_lanes - 1)
    owners_L = assignment.owners(num_actors)
    return sorted({int(owners_L[run % assignment.num_lanes]) for run in range(first_run, last_run + 1)})


def load_shards(
    loader: Loader, shards: Sequence[Shard], rows: pa.Table, file: ShardFile | None
) -> Iterator[tuple[Shard, tuple[list[pa.Table], list[tuple[bytes, int, Fault]], Decoded]]]:
    """Load shards as `load_shard` does, one after another; several of class folders are read as one, without a cache.

    The next one's first images are on their way then while the last ones of this one are decoded.
    """
    images = None
    if len(shards) > 1:
        assert loader.cache is None
        assert file is None
        images = _read(loader.location, rows, one_chunk(rows["key"]), None)
    for shard in shards:
        own = rows.slice(shard.start - shards[0].start, shard.num_images) if images else rows
        yield shard, load_shard(loader, shard, own, file, images)


def load_shard(
    loader: Loader,
    shard: Shard,
    rows: pa.Table,
    file: ShardFile | None,
    images: Iterator[bytes | ReadFault] | None = None,
) -> tuple[list[pa.Table], list[tuple[bytes, int, Fault]], Decoded]:
    """Read and decode a shard, or take it from the cache.

    Args:
        loader: What is the same for every shard.
        shard: The shard.
        rows: Its rows of the listing, `key` and `label`; of an archive, the index of all its rows of this split.
        file: The archive; None for class folders.
        images: What was read of its images, followed by others; None to read them here.

    Returns:
        Tables of `row` int32, counted from the shard's first, `class` int32, `image`, and, for validation or where they
        are wanted, `key`: one for each of the training images' `shard_owners`, or one of all validation images; of each
        skipped image the key, the class and the reason; and the outcome as a whole.

    Raises:
        DataError: If the storage itself fails.
    """
    if file is not None:
        rows = rows.slice(shard.first, shard.num_images)
        labels = pa.array(np.array(file.labels, np.int32)[rows["label"].to_numpy()])
    else:
        labels = one_chunk(rows["label"])
    keys = one_chunk(rows["key"])
    if images is None:
        decoded = _load(loader, shard, rows, keys, labels, file.archive if file else None)
    else:
        decoded = decode_images(keys, labels, islice(images, shard.num_images), _target_of(loader, shard))
    skipped = [(keys[row].as_py(), labels[row].as_py(), fault) for row, fault in decoded.faults]
    kept_N = np.delete(np.arange(shard.num_images, dtype=np.int32), [row for row, _ in decoded.faults])
    table = decoded.table.append_column("row", pa.array(kept_N))
    if shard.split == "valid":
        return [table], skipped, decoded
    if not loader.keeps_train_keys:
        table = table.drop_columns("key")
    wanted = shard_owners(loader.assignment, loader.num_actors, shard)
    if len(wanted) == 1:
        return [table], skipped, decoded
    owners_L = loader.assignment.owners(loader.num_actors)
    ranks_N = owners_L[loader.assignment.lanes(shard.start + kept_N.astype(np.int64))]
    return [table.filter(pa.array(ranks_N == rank)) for rank in wanted], skipped, decoded


def sample_headers(location: Location, rows: pa.Table, file: ShardFile | None, sampled: Sequence[int]) -> list[Header]:
    """Look at the headers of some images of a listing or of an archive's index, leaving out what has none.

    Raises:
        DataError: If none of the files can be read, as then the fault is hardly that of one file after another.
    """
    # Row by row, as to take them all at once loads pyarrow.compute, which is longer than a sample takes.
    chosen = pa.concat_tables([rows.slice(row, 1) for row in sampled])
    archive = file.archive if file else None
    if archive is None:
        begins = list(files.read_heads(location, one_chunk(chosen["key"])))
    else:
        sizes = np.minimum(chosen["size"].to_numpy(), files.HEAD_BYTES)
        heads = chosen.set_column(chosen.column_names.index("size"), "size", pa.array(sizes))
        begins = list(_read(location, heads, one_chunk(chosen["key"]), archive))
    faults = [begin for begin in begins if isinstance(begin, ReadFault)]
    if len(faults) == len(begins):
        raise DataError(
            f"{location.root}: expected to read images, got {faults[0].error} for each of {len(faults)} that were "
            "looked at; check the rights to read them"
        )
    headers = [read_header(begin) for begin in begins]
    # Some formats say their size farther behind, or in a file that is whole only.
    cut = [row for row, begin in enumerate(begins) if headers[row] is None and _is_cut(begin)]
    if cut:
        rest = pa.concat_tables([chosen.slice(row, 1) for row in cut])
        for row, data in zip(cut, _read(location, rest, one_chunk(rest["key"]), archive), strict=True):
            headers[row] = read_header(data)
    return [header for header in headers if header is not None]


def _is_cut(begin: bytes | ReadFault) -> bool:
    return isinstance(begin, bytes) and len(begin) == files.HEAD_BYTES


def _load(
    loader: Loader, shard: Shard, rows: pa.Table, keys: pa.BinaryArray, labels: pa.Int32Array, archive: Archive | None
) -> Decoded:
    images = _read(loader.location, rows, keys, archive)
    target = _target_of(loader, shard)
    if loader.cache is None:
        return decode_images(keys, labels, images, target)
    if archive is None:
        assert shard.entry
        name = shard.entry
    else:
        changed = [archive.size_bytes, -1 if archive.mtime_ns is None else archive.mtime_ns]
        stamps = (np.full(len(keys), changed[0], np.int64), np.full(len(keys), changed[1], np.int64))
        name = cache_key.entry_key(loader.location, target, keys, labels, stamps)
    decoded = cache.load(loader.cache, name)
    if decoded is None:
        decoded = decode_images(keys, labels, images, target)
        # A local file may have changed since it was named, or be another on this node: it is looked at again.
        is_local = archive is None and loader.location.kind != "uri"
        if not is_local or cache_key.name_entry(loader.location, target, rows) == name:
            cache.store(loader.cache, name, decoded)
    return decoded


def _target_of(loader: Loader, shard: Shard) -> Target:
    return loader.train_target or loader.target if shard.split == "train" else loader.target


def _read(
    location: Location, rows: pa.Table, keys: pa.BinaryArray, archive: Archive | None
) -> Iterator[bytes | ReadFault]:
    if archive is None:
        sizes = rows["size"].to_numpy() if "size" in rows.column_names else None
        return files.read_images(location, keys, sizes)
    return reader_of(archive).read_rows(location.store[0], archive, rows, location.concurrency)
