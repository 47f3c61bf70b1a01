"""Predictions that were made elsewhere, joined with the listing before anything is decoded.

Input: a `ScoreFile`, the listing and the shards. Output: a `Given`: references to its rows by part of the predictions,
and what `run.json` says of the file. Invariant: rows and keys of archives never come to the driver; both sides are
parted by a hash of the key, and a task joins one bucket.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from pipeline.cuts import Shard
from pipeline.data import score_files
from pipeline.data.columns import one_chunk
from pipeline.data.files import display, enumerate_names
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.data.score_files import ScoreFile
from pipeline.data.score_join import (
    GivenRows,
    ListedRows,
    Mismatch,
    cut_rows,
    displayed,
    join,
    split_listed,
    split_scored,
)
from pipeline.data.score_rows import read_piece
from pipeline.driver import tasks
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.state import Clock, Given
from pipeline.driver.waiting import Ref, get_result, wait_all
from pipeline.errors import DataError, counted
from pipeline.plan import Plan
from pipeline.results.progress import Progress

logger = logging.getLogger(__name__)

# Of a bucket's rows; the task that joins it takes some times as much. There are as many groups of parts as buckets, so
# that what a group gets of a bucket is an object of its own, and so large that it stays in the object store.
_BUCKET_BYTES = 256 * 2**20
# Of an image's key and place.
_LISTED_BYTES = 64
# Images whose keys a task parts.
_BLOCK_IMAGES = 2**20
_MAX_OTHERS = 100


class _Span(NamedTuple):
    """Neighbours in the listing that lie in one part: where their keys are, rows there, and their place in the part."""

    table: Ref | bytes
    start: int
    stop: int
    part: int
    offset: int


def join_scores(
    file: ScoreFile,
    listing: Listing,
    plan: Plan,
    shards: Sequence[Shard],
    clock: Clock,
    on_progress: Callable[[Progress], None],
) -> Given:
    """Read a file of predictions, and find the row of each validation image.

    Raises:
        DataError: If a row cannot be used, or not every validation image has one row, or rows are of other images.
    """
    clock.enter("scores")
    missing, others = score_files.check_classes(file, listing.classes)
    pieces = score_files.cut(file)
    num_valid, num_parts = len(listing.valid), len(plan.part_sizes)
    num_bytes = max(score_files.size_bytes(file), num_valid * _LISTED_BYTES)
    num_buckets = max(1, min(num_parts, -(-num_bytes // _BUCKET_BYTES)))
    first_parts = tuple(group * num_parts // num_buckets for group in range(num_buckets + 1))

    def show() -> bool:
        on_progress(Progress("scores", 0, len(pieces), clock.since_entered()))
        return False

    digest = _hash_file.remote(file)
    returns = {"num_returns": num_buckets + 1}
    extra = plan.model.extra_classes if plan.model else ()
    placed = ray.put((file, listing.classes, extra))
    read: Any = [_read_piece.options(**returns).remote(placed, piece, num_buckets) for piece in pieces]
    listed: Any = [
        _list_keys.options(num_returns=num_buckets).remote(block, num_buckets) for block in _blocks(listing, shards)
    ]
    listed = [[refs] if num_buckets == 1 else refs for refs in listed]
    notes = wait_all([note for note, *_ in read], f"reading {file.given}", show)
    joined: Any = [
        _join.options(**returns).remote(
            first_parts, len(listed), *(refs[bucket] for refs in listed), *(rows[bucket + 1] for rows in read)
        )
        for bucket in range(num_buckets)
    ]
    total = Mismatch()
    for mismatch in wait_all([mismatch for mismatch, *_ in joined], f"joining {file.given}", show):
        total.add(mismatch)
    if total != Mismatch():
        raise DataError(
            f"{file.given}: expected a row for each of {counted(num_valid, 'validation image')}, got {total}; keys are "
            f"those of the predictions of a run with the same data, as {_first_key(listing)}"
        )
    [sha256] = wait_all([digest], f"hashing {file.given}", show)
    num_rows, num_other = sum(note.num_rows for note in notes), sum(note.num_other for note in notes)
    named = sorted({name for note in notes for name in note.others})
    _say_what_cannot_be_right(file, missing, (num_other, num_rows), named)
    about = {
        "kind": file.kind,
        "size_bytes": file.entry.size,
        "sha256": sha256,
        "num_rows": num_rows,
        "classes_without_scores": list(missing),
        "other_classes": list(others) if file.kind == "scores" else named[:_MAX_OTHERS],
        "num_other_predicted": num_other,
    }
    rows = [[found[group + 1] for found in joined] for group in range(num_buckets)]
    return Given(about, first_parts, rows)


def _say_what_cannot_be_right(
    file: ScoreFile, missing: Sequence[str], num_other: tuple[int, int], named: Sequence[str]
) -> None:
    if missing:
        logger.warning(
            "%s: expected a column for every class, got none for %d, which are never predicted: %s", file.given,
            len(missing), enumerate_names(missing),
        )  # fmt: skip
    if num_other[0]:
        logger.warning(
            "%s: expected classes of the dataset, got others in %d of %d rows, which count as wrong: %s", file.given,
            *num_other, enumerate_names(named),
        )  # fmt: skip


def _first_key(listing: Listing) -> str:
    rows = listing.valid
    table = get_result(rows.files[0].index) if isinstance(rows, ArchiveListing) else rows
    return display(table["key"][0].as_py())


def _blocks(listing: Listing, shards: Sequence[Shard]) -> Iterator[list[_Span]]:
    """Gather the validation images of neighbouring shards, a span for each part and file, into blocks, one by one."""
    listed = listing.valid
    runs: list[tuple[Shard, int]] = []
    for shard in shards:
        if shard.split != "valid":
            continue
        last, num_images = runs[-1] if runs else (shard, -1)
        if num_images > 0 and (last.part, last.file) == (shard.part, shard.file):
            runs[-1] = last, num_images + shard.num_images
        else:
            runs.append((shard, shard.num_images))
    block: list[_Span] = []
    num_left = _BLOCK_IMAGES
    for shard, num_images in runs:
        if isinstance(listed, ArchiveListing):
            table, start = listed.files[shard.file].index, shard.first
        else:
            table, start = tasks.to_bytes(listed.slice(shard.start, num_images).select(["key"])), 0
        block.append(_Span(table, start, start + num_images, shard.part, shard.offset))
        num_left -= num_images
        if num_left <= 0:
            yield block
            block, num_left = [], _BLOCK_IMAGES
    if block:
        yield block


@ray.remote
def _hash_file(file: ScoreFile) -> str:
    leave_pandas_out()
    return score_files.hash_file(file)


class _Note(NamedTuple):
    """What is said of a piece: its rows, those whose predicted class the dataset lacks, and some of these classes."""

    num_rows: int
    num_other: int
    others: tuple[str, ...]


@ray.remote
def _read_piece(
    placed: tuple[ScoreFile, tuple[str, ...], tuple[str, ...]], piece: tuple[int, int], num_buckets: int
) -> Any:
    leave_pandas_out()
    file, classes, extra = placed
    rows = read_piece(file, piece, classes, extra)
    is_extra_N = rows.codes_N >= len(classes)
    others = {*rows.others, *(extra[code - len(classes)] for code in np.unique(rows.codes_N[is_extra_N]).tolist())}
    num_other = int((is_extra_N | (rows.codes_N == -1)).sum())
    return _Note(len(rows.keys), num_other, tuple(sorted(others)[:_MAX_OTHERS])), *split_scored(rows, num_buckets)


@ray.remote
def _list_keys(spans: Sequence[_Span], num_buckets: int) -> Any:
    leave_pandas_out()
    found = []
    for span in spans:
        table = get_result(span.table, "the listing")
        if isinstance(table, bytes):
            table = pa.ipc.open_stream(table).read_all()
        num_images = span.stop - span.start
        keys = displayed(one_chunk(table["key"].slice(span.start, num_images)))
        places_N = np.arange(span.offset, span.offset + num_images, dtype=np.int32)
        found.append(ListedRows(keys, np.full(num_images, span.part, np.int32), places_N))
    rows = ListedRows(
        pa.concat_arrays([each.keys for each in found]),
        np.concatenate([each.parts_N for each in found]),
        np.concatenate([each.positions_N for each in found]),
    )
    parts = split_listed(rows, num_buckets)
    return parts[0] if num_buckets == 1 else parts


@ray.remote
def _join(first_parts: Sequence[int], num_listed: int, *rows: Any) -> Any:
    leave_pandas_out()
    given, mismatch = join(rows[:num_listed], rows[num_listed:])
    groups: list[GivenRows | None] = [None] * (len(first_parts) - 1)
    return mismatch, *(groups if given is None else cut_rows(given, first_parts))
