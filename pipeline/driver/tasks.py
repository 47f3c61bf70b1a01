"""The Ray tasks: decoding a shard, indexing an archive, naming cache entries, sampling headers, finding duplicates.

Input: records and rows that are sent to a worker. Output: references to the answers. Invariant: a task does not import
torch, and what it sends is no more than its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline.config import Config
from pipeline.cuts import Shard
from pipeline.data.files import Location
from pipeline.data.formats import reader_of
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.listing import ArchiveImages
from pipeline.data.splits import Split
from pipeline.decoding import cache_key
from pipeline.decoding.digests import Digests, digest_shard, group_digests, split_digests
from pipeline.decoding.images import Header
from pipeline.decoding.shards import Loader, ShardFile, load_shards, sample_headers
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.waiting import Ref, get_result
from pipeline.results.duplicates import exact_tables
from pipeline.results.tables import skipped_table
from pipeline.target import Target


class Source(NamedTuple):
    """Neighbours in the listing: how many, their table or a reference to it, and the class for each label in it."""

    num_rows: int
    table: Ref | pa.Table
    labels: Sequence[int]


def cpus_of(location: Location, *, in_archives: bool) -> float:
    """Say of how many CPUs a task takes the time that reads images: of far archives, two take turns on one.

    A part of an archive holds so many images that a task has nothing to do until its first one is there.
    """
    return 0.5 if location.kind == "uri" and in_archives else 1.0


def begin_workers(num_workers: int) -> None:
    """Have workers import what they decode with, while the job waits for something else."""
    begin = ray.remote(num_cpus=1)(_begin_worker)
    for _ in range(num_workers):
        begin.remote()


def _begin_worker() -> None:  # of this module, with all that it imports
    leave_pandas_out()


def submit_decoding(
    loader: Ref, num_cpus: float, shards: dict[Shard, int], rows: Ref | pa.Table, file: Ref | None
) -> dict[Shard, tuple[list[Ref], Ref, Ref, Ref]]:
    """Start decoding some shards, one after another.

    Args:
        loader: A reference to a `Loader`.
        num_cpus: Of how many CPUs it takes the time.
        shards: The shards, of class folders neighbours; and how many tables come out of each: one for each owner of
            training images, one of validation images.
        rows: As `load_shard` takes them, of all these shards; of an archive, a reference to them.
        file: Of an archive, a reference to its `ShardFile`.

    Returns:
        For each, references to the tables of images, to the table of skipped ones or None, to the digests, and to the
        counts of images decoded, skipped (by reason) and resized, with whether all of it came from the cache.
    """
    # Lists and bytes, because Ray would pickle anything else, which takes longer than all else that it does.
    sent = to_bytes(rows) if isinstance(rows, pa.Table) else rows
    fields = [list(vars(shard).values()) for shard in shards]
    task = _decode_task(num_cpus, sum(shards.values()) + 3 * len(shards))
    refs: Iterator[Any] = iter(task.remote(loader, fields, sent, file))
    return {
        shard: (list(islice(refs, num_tables)), next(refs), next(refs), next(refs))
        for shard, num_tables in shards.items()
    }


@cache
def _decode_task(num_cpus: float, num_returns: int) -> Any:
    # Ray starts the tasks of one function in their order; of several, in any order.
    return _decode_shards.options(num_cpus=num_cpus, num_returns=num_returns)


@ray.remote
def _decode_shards(
    loader: Loader, fields: list[list[Any]], sent: pa.Table | bytes, file: ShardFile | None
) -> tuple[Any, ...]:
    leave_pandas_out()
    rows = pa.ipc.open_stream(sent).read_all() if isinstance(sent, bytes) else sent
    answers: list[Any] = []
    for shard, outcome in load_shards(loader, [Shard(*each) for each in fields], rows, file):
        tables, skipped, decoded = outcome
        num_skipped = dict(Counter(fault.reason for _, _, fault in skipped))
        counts = (len(decoded.table), num_skipped, decoded.num_resized, decoded.is_from_cache)
        split_name = loader.split_names[shard.split == "valid"]
        table = skipped_table(skipped, split_name, loader.classes) if skipped else None
        answers += [*tables, table, digest_shard(shard, decoded, loader.assignment.num_images), counts]
    return tuple(answers)


def to_bytes(rows: pa.Table) -> bytes:
    """Write rows as an Arrow stream, of a slice no more than what is in it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def submit_entry_name(location: Location, target: Target, rows: pa.Table) -> Ref:
    """Start naming the entry in the cache of a shard of class folders, by its rows of the listing."""
    ref: Ref = _name_entry.remote(location, target, to_bytes(rows))
    return ref


@ray.remote
def _name_entry(location: Location, target: Target, sent: bytes) -> str:
    leave_pandas_out()
    return cache_key.name_entry(location, target, pa.ipc.open_stream(sent).read_all())


def submit_scan(location: Location, archive: Archive, config: Config) -> tuple[Ref, dict[Split, Ref]]:
    """Start indexing an archive.

    Returns:
        A reference to its `Scan`; and, by split, to its index, which stays in the object store.
    """
    refs: Any = _scan_archive.options(num_cpus=cpus_of(location, in_archives=True)).remote(location, archive, config)
    scan, train, valid = refs
    return scan, {"train": train, "valid": valid}


@ray.remote(num_returns=3)
def _scan_archive(location: Location, archive: Archive, config: Config) -> tuple[Scan, pa.Table, pa.Table]:
    leave_pandas_out()
    found, index = reader_of(archive).scan(location.store[0], archive, config)
    return found, index["train"], index["valid"]


def submit_header_sample(location: Location, rows: ArchiveImages, sampled: Sequence[int]) -> Ref:
    """Start reading the headers of some images of an archive."""
    file = ShardFile(rows.archive, rows.labels)
    ref: Ref = _sample_headers.remote(location, rows.index, file, sampled)
    return ref


@ray.remote
def _sample_headers(location: Location, rows: pa.Table, file: ShardFile, sampled: Sequence[int]) -> list[Header]:
    leave_pandas_out()
    return sample_headers(location, rows, file, sampled)


def submit_split(digests: Sequence[Ref], num_buckets: int) -> list[Ref]:
    """Start parting the digests of some shards by bucket; returns a reference for each bucket."""
    # Ray keeps what can be repeated with all that it was made from, small digests by value, in the driver: 20 bytes an
    # image were measured. Without repetition it keeps nothing; what is lost with a node shows when it is asked for, and
    # then all shards are fed again.
    refs: Any = _split_digests.options(num_returns=num_buckets, max_retries=0).remote(num_buckets, *digests)
    return [refs] if num_buckets == 1 else refs


@ray.remote
def _split_digests(num_buckets: int, *pieces: Digests) -> Any:
    leave_pandas_out()
    parts = split_digests(pieces, num_buckets)
    return parts[0] if num_buckets == 1 else parts


def submit_grouping(pieces: Sequence[Ref]) -> tuple[Ref, Ref]:
    """Start grouping the digests of a bucket; returns references to the groups and to their number of images."""
    refs: Any = _group_digests.remote(*pieces)
    groups, num_images = refs
    return groups, num_images


@ray.remote(num_returns=2)
def _group_digests(*pieces: Digests) -> tuple[npt.NDArray[np.int64], int]:
    leave_pandas_out()
    groups_2M = group_digests(pieces)
    return groups_2M, groups_2M.shape[1]


def submit_naming(
    groups: Ref, images: pa.Table | None, sources: Ref | None, num_train: int, names: Sequence[tuple[str, ...]]
) -> tuple[Ref, Ref, Ref]:
    """Start laying out the groups of a bucket with their names.

    Args:
        groups: A reference to them.
        images: The keys and labels of their images; None to have the task take them from `sources`.
        sources: A reference to what `take_images` takes them from, where that is an archive.
        num_train: Listed training images.
        names: Of the classes, and of the splits.

    Returns:
        References to what `exact_tables` returns.
    """
    refs: Any = _name_groups.remote(groups, None if images is None else to_bytes(images), sources, num_train, names)
    duplicates, suspects, counts = refs
    return duplicates, suspects, counts


@ray.remote(num_returns=3)
def _name_groups(
    groups_2M: npt.NDArray[np.int64], sent: bytes | None, sources: Any, num_train: int, names: Any
) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    leave_pandas_out()
    images = pa.ipc.open_stream(sent).read_all() if sent else take_images(groups_2M[1], sources)
    return exact_tables(groups_2M, images, num_train, *names)


def take_images(rows_M: npt.NDArray[np.int64], sources: Sequence[Source]) -> pa.Table:
    """Take the `key` and `label` of some images, wherever they are listed, one source after another."""
    order_M = np.argsort(rows_M)
    begins = np.cumsum([0, *(source.num_rows for source in sources)])
    bounds = np.searchsorted(rows_M[order_M], begins)
    keys: list[bytes] = [b""] * len(rows_M)
    labels = np.zeros(len(rows_M), np.int32)
    for number in np.flatnonzero(np.diff(bounds)).tolist():
        source = sources[number]
        table = get_result(source.table, "the listing")
        own_keys, own_labels = table["key"], table["label"]
        # One by one, as to take them all at once loads pyarrow.compute, and of many chunks makes one.
        for index in order_M[bounds[number] : bounds[number + 1]].tolist():
            row = int(rows_M[index] - begins[number])
            keys[index] = own_keys[row].as_py()
            labels[index] = source.labels[own_labels[row].as_py()]
    return pa.table([pa.array(keys, pa.binary()), pa.array(labels)], names=["key", "label"])
