"""Images with the same pixels: from the digests of each shard, which stay where they are, to tables with names.

Input: references to digests, shard by shard. Output: references to tables of duplicates and of doubtful labels, and
counts. Invariant: digests, and keys of archives, never come to the driver; its references are one a bucket for some
hundred shards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import ray

from pipeline.cuts import Shard
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.driver import tasks
from pipeline.driver.state import ImageCounts, Job
from pipeline.driver.waiting import Ref, get_result, wait_all

# A task that groups so many takes 80 MB of digests and twice that besides, and a second.
_BUCKET_IMAGES = 4_000_000
# Digests of so many shards become one object: a small one alone would be kept by the driver, not by the object store.
_BLOCK_SHARDS = 256


@dataclass
class Grouping:
    """Digests that are on their way to groups.

    Attributes:
        num_shards: Of both splits.
        num_images: Listed images of both splits.
        groups: When all shards are there, references to the groups of each bucket and to their number of images.
    """

    num_shards: int
    num_images: int
    groups: list[tuple[Ref, Ref]] = field(default_factory=list)
    _digests: dict[int, list[Ref]] = field(default_factory=dict)
    _pieces: list[list[Ref]] = field(default_factory=list)

    def add(self, shard: Shard, digests: Ref) -> None:
        """Take a shard's digests; part those of a block when it is complete, and group all when all are there."""
        block = shard.index // _BLOCK_SHARDS
        found = self._digests.setdefault(block, [])
        found.append(digests)
        num_buckets = -(-self.num_images // _BUCKET_IMAGES)
        if len(found) == min(_BLOCK_SHARDS, self.num_shards - block * _BLOCK_SHARDS):
            self._pieces.append(tasks.submit_split(found, num_buckets))
            del self._digests[block]
        if len(self._pieces) == -(-self.num_shards // _BLOCK_SHARDS):
            self.groups = [tasks.submit_grouping(pieces) for pieces in zip(*self._pieces, strict=True)]
            self._pieces = []


@dataclass(frozen=True)
class Duplicates:
    """References to the tables of `results.duplicates.exact_tables`, of each bucket that has groups; their counts."""

    tables: list[Ref]
    suspects: list[Ref]
    counts: dict[str, int]


def find_duplicates(job: Job, counts: ImageCounts) -> Duplicates:
    """Wait for the groups, and have them laid out with the names of their images.

    Raises:
        ActorLostError: If digests are lost with a node; they are made anew with the tables of images.
    """
    job.clock.enter("duplicates")
    listing, groups = job.listing, counts.groups

    def show() -> bool:
        return job.show("duplicates", 0, len(groups))

    sizes = wait_all([size for _, size in groups], "images with the same pixels", show)
    sources = _sources(listing)
    in_archives = isinstance(listing.train, ArchiveListing)
    placed = ray.put(sources) if in_archives and any(sizes) else None
    names = (listing.classes, (job.config.train_split, listing.valid_split))
    found = []
    for (ref, _), size in zip(groups, sizes, strict=True):
        if size:
            # What is listed in archives stays where it is.
            images = None if in_archives else tasks.take_images(get_result(ref)[1], sources)
            found.append(tasks.submit_naming(ref, images, placed, len(listing.train), names))
    total = Counter(dict.fromkeys(("num_exact_groups", "num_exact_images", "num_exact_twins", "num_conflicts"), 0))
    for own in wait_all([own for *_, own in found], "names of images with the same pixels", show):
        total.update(own)
    return Duplicates([tables for tables, *_ in found], [suspects for _, suspects, _ in found], dict(total))


def _sources(listing: Listing) -> list[tasks.Source]:
    """Return what the rows of both splits are listed in, training first."""
    sources = []
    for rows in (listing.train, listing.valid):
        if isinstance(rows, ArchiveListing):
            sources += [tasks.Source(file.row_groups[-1], file.index, file.labels) for file in rows.files]
        else:
            sources.append(tasks.Source(len(rows), rows, range(len(listing.classes))))
    return sources
