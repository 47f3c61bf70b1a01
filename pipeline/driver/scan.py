"""A look into what was listed, by tasks, before anything is decoded: archives are indexed, files asked for their times.

What enters: archives that are only found yet, or shards of class folders. What leaves: a listing; or the shards, each
with the name of its entry in the cache. Always: what a job takes from the cache is what the files were at this moment.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import Config
from pipeline.data import listing as listings
from pipeline.data.archives import Archive, Scan
from pipeline.data.files import Location
from pipeline.data.listing import ArchivedRows, Listing
from pipeline.data.splits import Split
from pipeline.decoding.images import Header, Target, choose_target, sample_rows
from pipeline.driver import tasks
from pipeline.driver.tasks import Ref
from pipeline.plan import Plan, Shard, most_in_flight
from pipeline.results.terminal import Progress

# Archives that are indexed, or wait for it, at one time.
_MAX_SCANS = 256


@dataclass(frozen=True)
class Found:
    """The archives of a dataset, not yet opened, and the files beside them, by ending."""

    archives: list[Archive]
    num_ignored: Counter[str]


def list_archives(
    location: Location, config: Config, found: Found, on_progress: Callable[[Progress], None]
) -> tuple[Listing, Target]:
    """Have every archive indexed by a task, and settle the images' size and mode from a sample.

    Raises:
        DataError: If an archive, or what is in them together, is no dataset.
    """
    num_all = len(found.archives)
    begun = time.monotonic()
    scans: dict[int, Scan] = {}
    indexes: dict[int, dict[Split, Ref]] = {}
    waiting: dict[Ref, int] = {}
    upcoming = iter(range(num_all))

    def show() -> bool:
        on_progress(Progress("scan", len(scans), num_all, time.monotonic() - begun))
        return False

    while len(scans) < num_all:
        while len(waiting) < _MAX_SCANS and (place := next(upcoming, None)) is not None:
            ref, indexes[place] = tasks.submit_scan(location, found.archives[place], config)
            waiting[ref] = place
        for done in tasks.wait_some(list(waiting), f"indexing {len(waiting)} archives", show):
            place = waiting.pop(done)
            scans[place] = tasks.get(done, f"indexing {found.archives[place].path}")
    parts = [(archive, scans[place], indexes[place]) for place, archive in enumerate(found.archives)]
    listing = listings.list_archives(location, parts, found.num_ignored, config)
    return listing, choose_target(config, _sample_headers(listing, show))


def _sample_headers(listing: Listing, on_tick: Callable[[], bool]) -> list[Header]:
    assert isinstance(listing.train, ArchivedRows)
    places = sample_rows(len(listing.train))
    asked, start = [], 0
    for rows in listing.train.files:
        stop = start + rows.row_groups[-1]
        if inside := [place - start for place in places if start <= place < stop]:
            asked.append(tasks.submit_header_sample(listing.location, rows, inside))
        start = stop
    answers = tasks.wait_all(asked, "looking at some images", on_tick)
    return [header for headers in answers for header in headers]


def name_entries(
    listing: Listing, plan: Plan, shards: list[Shard], on_progress: Callable[[Progress], None]
) -> list[Shard]:
    """Give every shard of class folders the name of its entry in the cache, by the sizes and times of its files.

    Of archives these are known with the index, and nothing is to be asked for. No more shards are on their way than
    there will be when they are decoded.
    """
    listed: dict[Split, Any] = {"train": listing.train, "valid": listing.valid}
    if any(isinstance(rows, ArchivedRows) for rows in listed.values()):
        return shards
    begun = time.monotonic()
    named: dict[int, Shard] = {}
    waiting: dict[Ref, Shard] = {}
    upcoming = iter(shards)
    max_in_flight = most_in_flight(plan, shards, tasks.cluster_resources())
    num_done = 0

    def show() -> bool:
        on_progress(Progress("times", num_done, listing.num_images, time.monotonic() - begun))
        return False

    while len(named) < len(shards):
        while len(waiting) < max_in_flight and (shard := next(upcoming, None)) is not None:
            rows = listed[shard.split].slice(shard.start, shard.num_images)
            waiting[tasks.submit_entry_name(listing.location, plan.target, rows)] = shard
        for done in tasks.wait_some(list(waiting), f"looking up the files of {len(waiting)} shards", show):
            shard = waiting.pop(done)
            named[shard.index] = replace(shard, entry=tasks.get(done, f"looking up files of shard {shard.index}"))
            num_done += shard.num_images
    return [named[shard.index] for shard in shards]
