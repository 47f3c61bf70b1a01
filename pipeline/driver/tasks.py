"""The Ray tasks: decoding a shard, indexing an archive, naming cache entries, sampling headers.

Input: records and rows that are sent to a worker. Output: references to the answers. Invariant: a task does not import
torch, and what it sends is no more than its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import ray

from pipeline.config import Config
from pipeline.data.files import Location
from pipeline.data.formats import reader_of
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.listing import ArchiveImages
from pipeline.data.splits import Split
from pipeline.decoding import cache_key
from pipeline.decoding.images import Header
from pipeline.decoding.shards import Loader, ShardFile, load_shard, sample_headers
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.waiting import Ref
from pipeline.plan import Shard, Target
from pipeline.results.tables import skipped_table


def cpus_of(location: Location, *, in_archives: bool) -> float:
    """Say of how many CPUs a task takes the time that reads images: of far archives, two take turns on one.

    A part of an archive holds so many images that a task has nothing to do until its first one is there.
    """
    return 0.5 if location.kind == "uri" and in_archives else 1.0


def submit_decoding(
    loader: Ref, num_cpus: float, num_tables: int, shard: Shard, rows: Ref | pa.Table, file: Ref | None
) -> tuple[list[Ref], Ref, Ref]:
    """Start decoding a shard.

    Args:
        loader: A reference to a `Loader`.
        num_cpus: Of how many CPUs it takes the time.
        num_tables: How many tables come out: one for each owner of training images, one of validation images.
        shard: The shard.
        rows: As `load_shard` takes them; of an archive, a reference to them.
        file: Of an archive, a reference to its `ShardFile`.

    Returns:
        References to the tables of images, to the table of skipped ones or None, and to the counts of images
        decoded, skipped (by reason) and resized, with whether all of it came from the cache.
    """
    # A list and bytes, because Ray would pickle anything else, which takes longer than all else that it does.
    sent = _to_bytes(rows) if isinstance(rows, pa.Table) else rows
    refs: Any = _decode_task(num_cpus, num_tables + 2).remote(loader, list(vars(shard).values()), sent, file)
    *tables, skipped, counts = refs
    return tables, skipped, counts


@cache
def _decode_task(num_cpus: float, num_returns: int) -> Any:
    return ray.remote(num_cpus=num_cpus, num_returns=num_returns)(_decode_shard)


def _decode_shard(
    loader: Loader, shard_fields: list[Any], sent: pa.Table | bytes, file: ShardFile | None
) -> tuple[Any, ...]:
    leave_pandas_out()
    shard = Shard(*shard_fields)
    rows = pa.ipc.open_stream(sent).read_all() if isinstance(sent, bytes) else sent
    tables, skipped, decoded = load_shard(loader, shard, rows, file)
    num_skipped = dict(Counter(fault.reason for _, fault in decoded.faults))
    counts = (len(decoded.table), num_skipped, decoded.num_resized, decoded.is_from_cache)
    split_name = loader.split_names[shard.split == "valid"]
    table = skipped_table(skipped, split_name, loader.classes) if skipped else None
    return (*tables, table, counts)


def _to_bytes(rows: pa.Table) -> bytes:
    """Write rows as an Arrow stream, of a slice no more than what is in it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def submit_entry_name(location: Location, target: Target, rows: pa.Table) -> Ref:
    """Start naming the entry in the cache of a shard of class folders, by its rows of the listing."""
    ref: Ref = _name_entry.remote(location, target, _to_bytes(rows))
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
