"""The listing, as the driver makes it: class folders by itself, archives' indexes and files' times by tasks.

Input: a location and the options. Output: a listing with the target of its images; and, where there is a cache,
shards with the names of their entries. Invariant: what a job takes from the cache is what its files were at this time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config
from pipeline.cuts import Shard
from pipeline.data import archives
from pipeline.data import listing as listings
from pipeline.data.classes import spread_over_splits
from pipeline.data.files import Location
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.data.lookup import check_example
from pipeline.data.splits import Split
from pipeline.decoding.images import Header, choose_target, sample_rows
from pipeline.decoding.shards import sample_headers
from pipeline.driver import cluster, tasks
from pipeline.driver.allocation import max_shards_in_flight
from pipeline.driver.cluster import Node
from pipeline.driver.state import Clock
from pipeline.driver.waiting import Ref, get_result, wait_all, wait_some
from pipeline.errors import DataError, counted, without_secrets
from pipeline.plan import Plan
from pipeline.results.progress import Progress
from pipeline.results.writing import Output
from pipeline.target import Target

# Archives that are indexed, or wait for it, at one time.
_MAX_SCANS = 256
_TICK_SECONDS = 0.2
# Requests to a store have limits of their own; this is for a disk that does not answer, and more files than anyone has.
LISTING_SECONDS = 3600.0


@dataclass(frozen=True)
class FoundArchives:
    """The archives of a dataset, not yet opened, and the files beside them, by ending."""

    archives: list[Archive]
    num_ignored: Counter[str]


# What the driver itself can tell of a dataset, without Ray: all of class folders, of archives only which there are.
FirstListing = tuple[Listing, Target] | FoundArchives


def begin_listing(location: Location, config: Config) -> Future[FirstListing]:
    """List in a thread that nothing waits for: an interrupt need not wait for a slow listing's end."""
    pending: Future[FirstListing] = Future()

    def run() -> None:
        # While Ray starts, SIGTERM is blocked in the main thread; if it were not here, Ray's handler would run.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pending.set_result(_list_first(location, config))
        except BaseException as exc:  # noqa: BLE001 - all of it: what is kept here is raised by result()
            pending.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return pending


def finish_listing(
    pending: Future[FirstListing],
    location: Location,
    config: Config,
    nodes: list[Node],
    output: Output,
    clock: Clock,
    on_progress: Callable[[Progress], None],
) -> tuple[Listing, Target]:
    """Wait for the listing, check that all nodes have the same files, and have archives indexed."""
    deadline = time.monotonic() + LISTING_SECONDS
    while not pending.done():
        on_progress(Progress("start", 0, 1, 0.0))
        wait([pending], timeout=_TICK_SECONDS)
        if time.monotonic() > deadline:
            raise DataError(
                f"{without_secrets(location.root)}: expected its listing within {LISTING_SECONDS:.0f} s, got none; "
                "look whether the storage answers, or use archives, which are listed much faster"
            )
    first = pending.result()
    if len(nodes) > 1:
        names = _some_files(location, first)
        cluster.check_paths(nodes, location, names, output, lambda: on_progress(Progress("start", 0, 1, 0.0)))
    if isinstance(first, FoundArchives):
        clock.enter("scan")
        return list_archives(location, config, first, on_progress)
    return first


def _list_first(location: Location, config: Config) -> FirstListing:
    """List class folders and settle the images' size and mode from a sample; archives are found, but not yet opened."""
    ignored: Counter[str] = Counter()
    found = []
    if location.kind != "package":
        found = archives.find_archives(*location.store, location.pattern, config, ignored)
    for option, name in (("--label-column", config.label_column), ("--image-column", config.image_column)):
        if name is not None and not any(archive.kind == "parquet" for archive in found):
            raise DataError(
                f"{option}: expected Parquet files in {location.root}, which alone have columns, got none; leave it out"
            )
    if found:
        return FoundArchives(found, ignored)
    listing = listings.list_dataset(location, config)
    if config.example is not None:
        check_example(listing, config.example)
    rows = sample_rows(len(listing.train))
    return listing, choose_target(config, sample_headers(location, listing.train, None, rows))


def _some_files(location: Location, first: FirstListing) -> list[bytes]:
    """Choose some images, or archives, of a local folder by their names below the root."""
    if location.kind != "folder":
        return []
    if isinstance(first, FoundArchives):
        return [os.fsencode(os.path.relpath(first.archives[index].path, location.root)) for index in (0, -1)]
    rows: Any = first[0].train  # a table, as archives are only found yet
    keys = rows["key"]
    return [keys[index].as_py() for index in (0, len(keys) // 2, len(keys) - 1)]


def list_archives(
    location: Location, config: Config, found: FoundArchives, on_progress: Callable[[Progress], None]
) -> tuple[Listing, Target]:
    """Have every archive indexed by a task, and settle the images' size and mode from a sample.

    Raises:
        DataError: If an archive, or what is in them together, is no dataset.
    """
    begun = time.monotonic()
    all_archives = list(found.archives)
    scans: dict[int, Scan] = {}
    indexes: dict[int, dict[Split, Ref]] = {}

    def show() -> bool:
        on_progress(Progress("scan", len(scans), len(all_archives), time.monotonic() - begun))
        return False

    def scan(numbers: Iterable[int], config: Config) -> None:
        upcoming, waiting = iter(numbers), dict[Ref, int]()
        while True:
            while len(waiting) < _MAX_SCANS and (number := next(upcoming, None)) is not None:
                ref, indexes[number] = tasks.submit_scan(location, all_archives[number], config)
                waiting[ref] = number
            if not waiting:
                return
            for done in wait_some(list(waiting), f"indexing {counted(len(waiting), 'archive')}", show):
                number = waiting.pop(done)
                scans[number] = get_result(done, f"indexing {all_archives[number].path}")

    def put_together(config: Config) -> Listing:
        parts = [(archive, scans[number], indexes[number]) for number, archive in enumerate(all_archives)]
        return listings.list_archives(location, parts, found.num_ignored, config)

    scan(range(len(all_archives)), config)
    again = spread_over_splits(all_archives, [scans[number] for number in range(len(all_archives))])
    for number, archive in again.items():
        all_archives[number] = archive
    scan(again, config)
    listing = put_together(config)
    if listing.dropped:  # which the indexes have still
        kept = replace(config, classes=listing.classes)
        scan(range(len(all_archives)), kept)
        listing = replace(put_together(kept), dropped=listing.dropped)
    return listing, choose_target(config, _sample_headers(listing, show))


def _sample_headers(listing: Listing, on_tick: Callable[[], bool]) -> list[Header]:
    assert isinstance(listing.train, ArchiveListing)
    sampled = sample_rows(len(listing.train))
    asked, start = [], 0
    for rows in listing.train.files:
        stop = start + rows.row_groups[-1]
        if inside := [index - start for index in sampled if start <= index < stop]:
            asked.append(tasks.submit_header_sample(listing.location, rows, inside))
        start = stop
    answers = wait_all(asked, "looking at some images", on_tick)
    return [header for headers in answers for header in headers]


def name_entries(
    listing: Listing, plan: Plan, shards: list[Shard], on_progress: Callable[[Progress], None]
) -> list[Shard]:
    """Give every shard of class folders the name of its entry in the cache, by the sizes and times of its files.

    Of archives these are known with the index, and nothing is to be asked for. No more shards are on their way than
    there will be when they are decoded.
    """
    listed: dict[Split, Any] = {"train": listing.train, "valid": listing.valid}
    if any(isinstance(rows, ArchiveListing) for rows in listed.values()):
        return shards
    begun = time.monotonic()
    named: dict[int, Shard] = {}
    waiting: dict[Ref, Shard] = {}
    upcoming = iter(shards)
    max_in_flight = max_shards_in_flight(plan, shards, cluster.cluster_resources())
    num_done = 0

    def show() -> bool:
        on_progress(Progress("times", num_done, listing.num_images, time.monotonic() - begun))
        return False

    while len(named) < len(shards):
        while len(waiting) < max_in_flight and (shard := next(upcoming, None)) is not None:
            rows = listed[shard.split].slice(shard.start, shard.num_images)
            waiting[tasks.submit_entry_name(listing.location, plan.target_of(shard.split), rows)] = shard
        for done in wait_some(list(waiting), f"looking up the files of {counted(len(waiting), 'shard')}", show):
            shard = waiting.pop(done)
            named[shard.index] = replace(shard, entry=get_result(done, f"looking up files of shard {shard.index}"))
            num_done += shard.num_images
    return [named[shard.index] for shard in shards]
