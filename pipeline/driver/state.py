"""What all phases of a job share: its settled inputs, what its images came to, and its clock.

Input: set up by `job`. Output: read by every phase. Invariant: nothing here grows with the number of images, except the
listing's names.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.cuts import Shard
from pipeline.data.listing import Listing
from pipeline.data.splits import Split
from pipeline.decoding.cache import Cache
from pipeline.driver.actors import PartRecord
from pipeline.driver.allocation import Allocation, Storage
from pipeline.driver.waiting import Ref
from pipeline.plan import Plan
from pipeline.results.progress import Progress
from pipeline.results.writing import Output
from pipeline.target import Target


class Clock:
    """Seconds by phase; a phase that is entered again goes on."""

    def __init__(self) -> None:
        self.began = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.perf_counter()
        self._entered = self._started
        self._phase = "start"
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the phase that is under way and begin another."""
        self._seconds = self.read()
        del self._seconds["total"]
        self._phase, self._entered = phase, time.perf_counter()

    def since_entered(self) -> float:
        """Seconds since the phase under way began."""
        return time.perf_counter() - self._entered

    def read(self) -> dict[str, float]:
        """Seconds of every phase so far, and of all in `total`."""
        now = time.perf_counter()
        spent = self._seconds.get(self._phase, 0.0) + now - self._entered
        return {**self._seconds, self._phase: spent, "total": now - self._started}


@dataclass(frozen=True)
class Given:
    """What was predicted elsewhere of the validation images.

    Attributes:
        about: For `run.json`.
        first_parts: The first part of each group of parts, and behind the last one their number.
        rows: By group, references to its `GivenRows` of each bucket.
    """

    about: dict[str, Any]
    first_parts: tuple[int, ...]
    rows: list[list[Ref]]

    def of_part(self, part: int) -> list[Ref]:
        """Return references to rows among which are all of a part."""
        return self.rows[int(np.searchsorted(self.first_parts, part, side="right")) - 1]


@dataclass(frozen=True)
class Job:
    """What all phases know.

    `storage` is where actors keep images that are not on a GPU, `model` a reference to the bytes of the user's own
    model, `given` what was predicted elsewhere.
    """

    config: Config
    listing: Listing
    target: Target
    plan: Plan
    shards: list[Shard]
    allocation: Allocation
    storage: Storage
    node_ids: frozenset[str]
    output: Output
    cache: Cache | None
    clock: Clock
    on_progress: Callable[[Progress], None]
    model: Ref | None = None
    given: Given | None = None

    def show(self, phase: str, done: int, total: int, epoch: int | None = None, loss: float | None = None) -> bool:
        """Tell the caller how far the phase under way is; returns False, as this is no sign of life."""
        seconds, num_epochs = self.clock.since_entered(), self.config.epochs
        self.on_progress(Progress(phase, done, total, seconds, epoch, num_epochs, loss))
        return False


@dataclass(frozen=True)
class NeighborCounts:
    """What the search for neighbors came to.

    Attributes:
        median: Distance of the median validation image to its nearest training image, rms, 0 to 1.
        num_twins: Validation images that are a training image once more, as it is or changed a little.
        num_same: Of these, with the same pixels.
        near: References to rows of `duplicates.parquet`, one of each actor.
        suspects: Likewise of `suspects.parquet`.
    """

    median: float
    num_twins: int
    num_same: int
    near: list[Ref]
    suspects: list[Ref]


@dataclass
class ImageCounts:
    """What one feeding of the actors came to.

    Attributes:
        num_decoded: Images, by split.
        num_skipped_by_reason: Images that could not be decoded.
        num_resized: Images that had another size than the target.
        num_from_cache: Shards found in the cache, among them those that this run put there before an actor died.
        skipped: References to the tables of skipped images, by shard, where there are any.
        groups: References to the groups of images with the same pixels, and to their number of images, by bucket.
        train_counts_K: Training images of each class, int64.
        means_KD: float32, 0 to 1.
        digests: Of the written prediction files, by part.
        noted: References to what the page may show of them, by part.
        confusions: Counts of all of them together, by classifier, as in `ScoredPart`.
        num_twins_correct: Of the validation images with a twin in training, those predicted right, by classifier.
        num_in_top: Validation images whose class is among those of the best scores, by classifier, where it is counted.
        neighbors: What the search for neighbors came to, where there was one.
        runs: Of each actor what `describe_runs` returns, where there is a model.
        devices: What the actors compute on.
        stores: Where they keep their images: `gpu`, `memory` or `disk`.
    """

    num_decoded: Counter[Split] = field(default_factory=Counter)
    num_skipped_by_reason: Counter[str] = field(default_factory=Counter)
    num_resized: int = 0
    num_from_cache: int = 0
    skipped: dict[int, Ref] = field(default_factory=dict)
    groups: list[tuple[Ref, Ref]] = field(default_factory=list)
    train_counts_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    means_KD: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    digests: dict[int, str] = field(default_factory=dict)
    noted: dict[int, Ref] = field(default_factory=dict)
    confusions: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    num_twins_correct: Counter[str] = field(default_factory=Counter)
    num_in_top: Counter[str] = field(default_factory=Counter)
    neighbors: NeighborCounts | None = None
    runs: list[tuple[int, float]] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)

    def take_part(self, part: int, record: PartRecord) -> None:
        """Note a written prediction file; counts are added up, so that many classes and files take no memory here."""
        self.digests[part] = record.digest
        for name, confusion_KK in record.confusions.items():
            self.confusions[name] = self.confusions.get(name, np.int64(0)) + confusion_KK
        self.num_twins_correct.update(record.num_twins_correct)
        self.num_in_top.update(record.num_in_top)

    @property
    def num_skipped(self) -> int:
        """Images that could not be decoded, for whatever reason."""
        return self.num_skipped_by_reason.total()
