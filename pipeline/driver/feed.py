"""From files to the actors: shards are decoded by tasks and handed to the actor that owns their lane or part.

Input: a `Job` and its actors. Output: `ImageCounts`; the images are with the actors then. Invariant: no more than
`max_shards_in_flight` shards are between their files and their actor, and what finishes first is handled first.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from pipeline.data.files import display
from pipeline.data.listing import ArchiveImages, ArchiveListing
from pipeline.decoding.shards import Loader, ShardFile, shard_owners
from pipeline.driver import cluster, tasks
from pipeline.driver.actors import Actor
from pipeline.driver.allocation import max_shards_in_flight
from pipeline.driver.duplicates import Grouping
from pipeline.driver.state import ImageCounts, Job
from pipeline.driver.waiting import Ref, get_result, wait_some
from pipeline.errors import ActorLostError, DataError
from pipeline.plan import MAX_PART_BYTES, MAX_SHARD_BYTES, Shard

# A cluster that grows, or loses nodes, is given more or less to do after this time.
_LOOK_SECONDS = 5.0
# Shards that one task decodes, at most.
_MAX_TOGETHER = 4


def feed(job: Job, actors: list[Actor], begun: list[Ref]) -> ImageCounts:
    """Decode all shards, hand them to the actors, and have the class means computed.

    Where images are not needed again, parts are scored as well, each as soon as it is complete, so that the validation
    images are never all held.

    Args:
        job: The job.
        actors: As `start_actors` returns them, perhaps still starting.
        begun: As `begin_actors` returns them.

    Raises:
        ActorLostError: If an actor dies.
        DataError: If a class has no training image left, or there is no validation image left.
    """
    job.clock.enter("decode")
    feeding = _Feeding(job, actors)
    counts = feeding.counts
    for index, ref in enumerate(begun):
        feeding.waiting[ref] = ("starting the actors", feeding.take_description if index < len(actors) else _ignore)
    shards = deque(job.shards)
    while True:
        while shards and feeding.num_in_flight < feeding.max_in_flight and feeding.has_room_for(shards[0]):
            feeding.decode(feeding.take_together(shards))
        if not feeding.waiting:
            break
        refs = list(feeding.waiting)
        first = f"{feeding.waiting[refs[0]][0]} and {len(refs) - 1} more"
        for done in wait_some(refs, first, feeding.show):
            what, take = feeding.waiting.pop(done)
            take(get_result(done, what))
    counts.groups = feeding.grouping.groups
    counts.devices.sort()
    counts.stores.sort()
    _check_counts(job, counts)
    return counts


def write_part(job: Job, actors: list[Actor], counts: ImageCounts, part: int, median: float | None = None) -> Ref:
    """Have a part scored and written by its actor; `median` is that of the nearest distances, if there are any."""
    method = actors[part % len(actors)].write_part.options(num_returns=2)
    given = job.given.of_part(part) if job.given else ()
    ref, counts.noted[part] = method.remote(
        part, job.listing.classes, job.output, median, *given, has_report=job.config.report
    )
    return ref


def score(job: Job, actors: list[Actor], counts: ImageCounts) -> None:
    """Have every part scored by all classifiers and written."""
    job.clock.enter("score")
    median = counts.neighbors.median if counts.neighbors else None
    waiting = {write_part(job, actors, counts, part, median): part for part in range(len(job.plan.part_sizes))}
    while waiting:
        finished = wait_some(
            list(waiting),
            f"{len(waiting)} prediction files",
            lambda: job.show("score", len(counts.digests), len(job.plan.part_sizes)),
        )
        for done in finished:
            counts.take_part(waiting.pop(done), get_result(done))


@dataclass
class _Feeding:
    """The loop's state: every reference that is waited for, with what it is of and what to do with it."""

    job: Job
    actors: list[Actor]
    counts: ImageCounts = field(default_factory=ImageCounts)
    waiting: dict[Ref, tuple[str, Callable[[Any], None]]] = field(default_factory=dict)
    num_in_flight: int = 0
    looked_at_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        job = self.job
        self.max_in_flight = max_shards_in_flight(job.plan, job.shards, cluster.cluster_resources())
        in_archives = isinstance(job.listing.train, ArchiveListing)
        self._num_cpus = tasks.cpus_of(job.listing.location, in_archives=in_archives)
        self._num_cpus_in_all = max(1, int(cluster.cluster_resources().get("CPU", 1)))
        self._placed: tuple[object, Ref] | None = None
        self._loader = ray.put(
            Loader(
                location=job.listing.location,
                target=job.target,
                classes=job.listing.classes,
                assignment=job.plan.assignment,
                num_actors=len(self.actors),
                cache=job.cache,
                split_names=(job.config.train_split, job.listing.valid_split),
                keeps_train_keys=job.plan.num_neighbors > 0,
                train_target=job.plan.target_of("train"),
            )
        )
        self.grouping = Grouping(len(job.shards), job.listing.num_images)
        self._num_to_decode = len(job.shards)
        self._num_train_left = sum(shard.split == "train" for shard in self.job.shards)
        self._num_part_left = Counter(shard.part for shard in self.job.shards if shard.split == "valid")

    def has_room_for(self, shard: Shard) -> bool:
        """Say whether a shard may come to its actor, where without training parts wait for the means, and to be scored.

        A few at a time may, so that the validation images are never all held; small ones are not worth waiting for.
        """
        plan = self.job.plan
        if plan.keeps_images or shard.split == "train" or sum(plan.part_sizes) * plan.image_bytes < MAX_PART_BYTES:
            return True
        num_begun = shard.part - len(self.counts.digests)
        return self._num_train_left == 0 and num_begun <= len(self.actors)

    def take_together(self, shards: deque[Shard]) -> list[Shard]:
        """Take the next shards for one task, which waits only once until its first image is there.

        They are neighbours of a far folder, together not larger than one may be, and fewer the fewer are left, so that
        all CPUs are done at much the same time.
        """
        taken = [shards.popleft()]
        plan, is_far = self.job.plan, self.job.listing.location.kind == "uri" and self.job.cache is None
        if not is_far or isinstance(self.job.listing.train, ArchiveListing):
            return taken
        most = min(_MAX_TOGETHER, len(shards) // (2 * self._num_cpus_in_all))
        while len(taken) < most and self.has_room_for(shards[0]):
            is_next = (shards[0].split, shards[0].start) == (taken[-1].split, taken[-1].stop)
            if not is_next or (shards[0].stop - taken[0].start) * plan.target.decoded_bytes > MAX_SHARD_BYTES:
                break
            taken.append(shards.popleft())
        return taken

    def decode(self, shards: list[Shard]) -> None:
        """Start decoding shards, neighbours in the listing, by one task."""
        shard, last = shards[0], shards[-1]
        listed = self.job.listing.split(shard.split)
        rows, file = None, None
        if isinstance(listed, ArchiveListing):
            found = listed.files[shard.file]
            rows, file = found.index, self._file(shard, found)
            what = f"decoding images {shard.first} to {shard.first + shard.num_images - 1} of {found.archive.path}"
        else:
            columns = [name for name in ("key", "label", "size") if name in listed.column_names]
            rows = listed.slice(shard.start, last.stop - shard.start).select(columns)
            what = f"decoding {display(rows['key'][0].as_py())} to {display(rows['key'][-1].as_py())}"
        owners = {each: self._owners(each) for each in shards}
        counts = {each: len(ranks) for each, ranks in owners.items()}
        started = tasks.submit_decoding(self._loader, self._num_cpus, counts, rows, file)
        for each, (tables, skipped, digests, outcome) in started.items():
            self.num_in_flight += 1
            tables_of = dict(zip(owners[each], tables, strict=True))
            self.waiting[outcome] = (what, partial(self._hand_over, each, tables_of, skipped, digests))

    def _owners(self, shard: Shard) -> list[int]:
        """Name the actors, by rank, that are to have some of a shard's images."""
        if shard.split == "train":
            return shard_owners(self.job.plan.assignment, len(self.actors), shard)
        return [shard.part % len(self.actors)]

    def _file(self, shard: Shard, found: ArchiveImages) -> Ref:
        """Place what tasks are to know of an archive in the object store; one archive's shards follow each other."""
        key = (shard.split, shard.file)
        if self._placed is None or self._placed[0] != key:
            self._placed = key, ray.put(ShardFile(found.archive, found.labels))
        return self._placed[1]

    def show(self) -> bool:
        """Show how far decoding is, and now and then look at the cluster's size; only a shard is a sign of life."""
        if time.monotonic() - self.looked_at_s > _LOOK_SECONDS:
            self.looked_at_s = time.monotonic()
            self.max_in_flight = max_shards_in_flight(self.job.plan, self.job.shards, cluster.cluster_resources())
            # Ray waits forever for an actor that no living node can take.
            if len(self.counts.devices) < len(self.actors) and (gone := self.job.node_ids - cluster.living_ids()):
                raise ActorLostError(f"an actor: expected it to start, got {len(gone)} lost nodes")
        if self._num_to_decode == 0:
            return self.job.show("means", len(self.counts.digests), len(self.job.plan.part_sizes))
        num_done = self.counts.num_decoded.total() + self.counts.num_skipped
        return self.job.show("decode", num_done, self.job.listing.num_images)

    def take_description(self, answer: tuple[str, str]) -> None:
        """Note what an actor computes on and where it keeps its images."""
        device, store = answer
        self.counts.devices.append(device)
        self.counts.stores.append(store)

    def _hand_over(
        self,
        shard: Shard,
        tables: dict[int, Ref],
        skipped: Ref,
        digests: Ref,
        outcome: tuple[int, dict[str, int], int, bool],
    ) -> None:
        num_decoded, num_skipped_by_reason, num_resized, is_from_cache = outcome
        counts = self.counts
        counts.num_decoded[shard.split] += num_decoded
        counts.num_skipped_by_reason.update(num_skipped_by_reason)
        counts.num_resized += num_resized
        counts.num_from_cache += is_from_cache
        self._num_to_decode -= 1
        if self._num_to_decode == 0:
            self.job.clock.enter("means")
        if num_skipped_by_reason:
            counts.skipped[shard.index] = skipped
        self.grouping.add(shard, digests)
        is_train = shard.split == "train"
        method, where = ("add_train", [shard.start]) if is_train else ("add_valid", [shard.part, shard.offset])
        taken = set()
        for rank, table in tables.items():
            ref = self.actors[rank].call.remote(method, *where, table)
            taken.add(ref)
            self.waiting[ref] = (f"handing shard {shard.index} to its actor", partial(self._finish, shard, taken, ref))

    def _finish(self, shard: Shard, taken: set[Ref], ref: Ref, _: None) -> None:
        taken.remove(ref)
        if taken:  # not all of its actors have it yet
            return
        self.num_in_flight -= 1
        if shard.split == "train":
            self._num_train_left -= 1
            if self._num_train_left == 0:
                for actor in self.actors:
                    self.waiting[actor.call.remote("finish_means")] = ("the class means", self._take_means)
        else:
            self._num_part_left[shard.part] -= 1
        # An actor does its calls in order, so the means are there when a part is scored.
        if self._num_train_left == 0 and not self.job.plan.keeps_images:
            for part in [part for part, num_left in self._num_part_left.items() if num_left == 0]:
                del self._num_part_left[part]
                ref = write_part(self.job, self.actors, self.counts, part)
                self.waiting[ref] = (f"prediction file {part}", partial(self.counts.take_part, part))

    def _take_means(self, answer: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]) -> None:
        self.counts.train_counts_K, self.counts.means_KD = answer


def _ignore(_: object) -> None:
    """Do nothing with an answer that only says that a call is done."""


def _check_counts(job: Job, counts: ImageCounts) -> None:
    missing = [
        f"training images of class {job.listing.classes[label]}" for label in np.flatnonzero(counts.train_counts_K == 0)
    ]
    if counts.num_decoded["valid"] == 0:
        missing.append("validation images")
    if missing:
        fault = get_result(counts.skipped[min(counts.skipped)]).to_pylist()[0]
        raise DataError(
            f"{job.listing.location.root}: expected {missing[0]}, got none that could be decoded; look at the files, "
            f"{fault['key']} for one: {fault['error']}"
        )
