"""From files to the actors: shards are decoded by tasks and handed to the actor that owns their lane or part.

What enters: a `Job` and its actors. What leaves: a `Tally`; the images are with the actors then. Always: no more than
`most_in_flight` shards are between their files and their actor, and whatever finishes first is handled first.
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

from pipeline.config import Config
from pipeline.data.files import display
from pipeline.data.listing import ArchivedRows, ArchiveRows, Listing
from pipeline.data.splits import Split
from pipeline.decoding.cache import Cache
from pipeline.decoding.images import Target
from pipeline.decoding.shards import Loader, ShardFile, shard_owners
from pipeline.driver import tasks
from pipeline.driver.tasks import Actor, PartRecord, Ref
from pipeline.errors import ActorLostError, DataError
from pipeline.plan import MAX_PART_BYTES, Fit, Plan, Shard, Storage, most_in_flight
from pipeline.results.terminal import Clock, Progress
from pipeline.results.writing import Output

# A cluster that grows, or loses nodes, is given more or less to do after this time.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What all phases know; `storage` is where actors keep images that are not on a GPU."""

    config: Config
    listing: Listing
    target: Target
    plan: Plan
    shards: list[Shard]
    fit: Fit
    storage: Storage
    node_ids: frozenset[str]
    output: Output
    cache: Cache | None
    clock: Clock
    on_progress: Callable[[Progress], None]

    def show(self, phase: str, done: int, total: int, epoch: int | None = None, loss: float | None = None) -> bool:
        """Tell the caller how far the phase under way is; returns False, as this is no sign of life."""
        seconds, num_epochs = self.clock.since_entered(), self.config.epochs
        self.on_progress(Progress(phase, done, total, seconds, epoch, num_epochs, loss))
        return False


@dataclass
class Tally:
    """What one feeding of the actors came to.

    Attributes:
        num_decoded: Images, by split.
        num_skipped_by_reason: Images that could not be decoded.
        num_resized: Images that had another size than the target.
        num_from_cache: Shards found in the cache, among them those that this run put there before an actor died.
        skipped: References to the tables of skipped images, by shard, where there are any.
        counts_K: Training images of each class, int64.
        means_KD: float32, 0 to 1.
        digests: Of the written prediction files, by part.
        confusions: Counts of all of them together, by classifier, int64 [K, K].
        devices: What the actors compute on.
        stores: Where they keep their images: `gpu`, `memory` or `disk`.
    """

    num_decoded: Counter[Split] = field(default_factory=Counter)
    num_skipped_by_reason: Counter[str] = field(default_factory=Counter)
    num_resized: int = 0
    num_from_cache: int = 0
    skipped: dict[int, Ref] = field(default_factory=dict)
    counts_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    means_KD: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    digests: dict[int, str] = field(default_factory=dict)
    confusions: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)

    def take_part(self, part: int, record: PartRecord) -> None:
        """Note a written prediction file; counts are added up, so that many classes and files take no memory here."""
        self.digests[part] = record.digest
        for name, confusion_KK in record.confusions.items():
            self.confusions[name] = self.confusions.get(name, 0) + confusion_KK

    @property
    def num_skipped(self) -> int:
        """Images that could not be decoded, for whatever reason."""
        return self.num_skipped_by_reason.total()


def feed(job: Job, actors: list[Actor], begun: list[Ref]) -> Tally:
    """Decode all shards, hand them to the actors, and have the class means computed.

    Without training, parts are scored as well, each as soon as it is complete, so that the validation images are
    never all held.

    Args:
        job: The job.
        actors: As `tasks.start_actors` returns them, perhaps still starting.
        begun: As `tasks.begin` returns them.

    Raises:
        ActorLostError: If an actor dies.
        DataError: If a class has no training image left, or there is no validation image left.
    """
    job.clock.enter("decode")
    feeding = _Feeding(job, actors)
    tally = feeding.tally
    for place, ref in enumerate(begun):
        feeding.waiting[ref] = ("starting the actors", feeding.take_description if place < len(actors) else _ignore)
    shards = deque(job.shards)
    while True:
        while shards and feeding.num_in_flight < feeding.max_in_flight and feeding.has_room_for(shards[0]):
            feeding.decode(shards.popleft())
        if not feeding.waiting:
            break
        refs = list(feeding.waiting)
        first = f"{feeding.waiting[refs[0]][0]} and {len(refs) - 1} more"
        for done in tasks.wait_some(refs, first, feeding.show):
            what, take = feeding.waiting.pop(done)
            take(tasks.get(done, what))
    tally.devices.sort()
    tally.stores.sort()
    _check_tally(job, tally)
    return tally


def write_part(job: Job, actors: list[Actor], part: int) -> Ref:
    """Have a part scored and written by its actor."""
    return actors[part % len(actors)].write_part.remote(part, job.listing.classes, job.output)


@dataclass
class _Feeding:
    """The loop's state: every reference that is waited for, with what it is of and what to do with it."""

    job: Job
    actors: list[Actor]
    tally: Tally = field(default_factory=Tally)
    waiting: dict[Ref, tuple[str, Callable[[Any], None]]] = field(default_factory=dict)
    num_in_flight: int = 0
    looked_at_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        job = self.job
        self.max_in_flight = most_in_flight(job.plan, job.shards, tasks.cluster_resources())
        self._placed: tuple[object, Ref] | None = None
        self._loader = tasks.put(
            Loader(job.listing.location, job.target, job.listing.classes, job.plan.deal, len(self.actors), job.cache)
        )
        self._num_to_decode = len(job.shards)
        self._num_train_left = sum(shard.split == "train" for shard in self.job.shards)
        self._num_part_left = Counter(shard.part for shard in self.job.shards if shard.split == "valid")

    def has_room_for(self, shard: Shard) -> bool:
        """Say whether a shard may come to its actor, where without training parts wait for the means, and to be scored.

        A few at a time may, so that the validation images are never all held; small ones are not worth waiting for.
        """
        plan = self.job.plan
        if (
            plan.has_training
            or shard.split == "train"
            or sum(plan.part_sizes) * plan.target.num_values < MAX_PART_BYTES
        ):
            return True
        num_begun = shard.part - len(self.tally.digests)
        return self._num_train_left == 0 and num_begun <= len(self.actors)

    def decode(self, shard: Shard) -> None:
        """Start decoding a shard."""
        listed = self.job.listing.split(shard.split)
        rows, file = None, None
        if isinstance(listed, ArchivedRows):
            found = listed.files[shard.file]
            rows, file = found.index, self._file(shard, found)
            what = f"decoding images {shard.first} to {shard.first + shard.num_images - 1} of {found.archive.path}"
        else:
            rows = listed.slice(shard.start, shard.num_images).select(["key", "label"])
            first, last = rows["key"][0].as_py(), rows["key"][-1].as_py()
            what = f"decoding {display(first)} to {display(last)}"
        owners = [shard.part % len(self.actors)]
        if shard.split == "train":
            owners = shard_owners(self.job.plan.deal, len(self.actors), shard)
        tables, skipped, counts = tasks.submit_decoding(self._loader, len(owners), shard, rows, file)
        self.num_in_flight += 1
        self.waiting[counts] = (what, partial(self._hand_over, shard, dict(zip(owners, tables, strict=True)), skipped))

    def _file(self, shard: Shard, found: ArchiveRows) -> Ref:
        """Place what tasks are to know of an archive in the object store; one archive's shards follow each other."""
        key = (shard.split, shard.file)
        if self._placed is None or self._placed[0] != key:
            self._placed = key, tasks.put(ShardFile(found.archive, found.labels))
        return self._placed[1]

    def show(self) -> bool:
        """Show how far decoding is, and now and then look at the cluster's size; only a shard is a sign of life."""
        if time.monotonic() - self.looked_at_s > _LOOK_SECONDS:
            self.looked_at_s = time.monotonic()
            self.max_in_flight = most_in_flight(self.job.plan, self.job.shards, tasks.cluster_resources())
            # Ray waits for good with an actor that no node has room for since one died.
            if len(self.tally.devices) < len(self.actors) and (gone := self.job.node_ids - tasks.living_ids()):
                raise ActorLostError(f"an actor: expected it to start, got the death of {len(gone)} nodes")
        if self._num_to_decode == 0:
            return self.job.show("means", len(self.tally.digests), len(self.job.plan.part_sizes))
        num_done = self.tally.num_decoded.total() + self.tally.num_skipped
        return self.job.show("decode", num_done, self.job.listing.num_images)

    def take_description(self, answer: tuple[str, str]) -> None:
        """Note what an actor computes on and where it keeps its images."""
        device, store = answer
        self.tally.devices.append(device)
        self.tally.stores.append(store)

    def _hand_over(
        self, shard: Shard, tables: dict[int, Ref], skipped: Ref, counts: tuple[int, dict[str, int], int, bool]
    ) -> None:
        num_decoded, num_skipped_by_reason, num_resized, is_from_cache = counts
        tally = self.tally
        tally.num_decoded[shard.split] += num_decoded
        tally.num_skipped_by_reason.update(num_skipped_by_reason)
        tally.num_resized += num_resized
        tally.num_from_cache += is_from_cache
        self._num_to_decode -= 1
        if self._num_to_decode == 0:
            self.job.clock.enter("means")
        if num_skipped_by_reason:
            tally.skipped[shard.index] = skipped
        where = (shard.start,) if shard.split == "train" else (shard.part, shard.offset)
        taken = set()
        for rank, table in tables.items():
            ref = self.actors[rank].call.remote(f"add_{shard.split}", *where, table)
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
        if self._num_train_left == 0 and not self.job.plan.has_training:
            for part in [part for part, num_left in self._num_part_left.items() if num_left == 0]:
                del self._num_part_left[part]
                ref = write_part(self.job, self.actors, part)
                self.waiting[ref] = (f"prediction file {part}", partial(self.tally.take_part, part))

    def _take_means(self, answer: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]) -> None:
        self.tally.counts_K, self.tally.means_KD = answer


def _ignore(_: object) -> None:
    """Do nothing with an answer that only says that a call is done."""


def _check_tally(job: Job, tally: Tally) -> None:
    missing = [
        f"training images of class {job.listing.classes[label]}" for label in np.flatnonzero(tally.counts_K == 0)
    ]
    if tally.num_decoded["valid"] == 0:
        missing.append("validation images")
    if missing:
        fault = tasks.get(tally.skipped[min(tally.skipped)]).to_pylist()[0]
        raise DataError(
            f"{job.listing.location.root}: expected {missing[0]}, got none that could be decoded; look at the files, "
            f"{fault['key']} for one: {fault['error']}"
        )
