"""The plan of a job: what every actor knows of it, and where images go.

Input: the listing and the options. Output: a `Plan` and its shards; the rule by which an image has its offset in a
lane. Invariant: both depend on the listing and the options alone, never on the number of workers, and how the listing
is cut does not change where an image goes.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.cuts import Shard, cut_train, cut_valid, part_bounds
from pipeline.data.listing import Listing
from pipeline.data.splits import Split
from pipeline.model import Model
from pipeline.target import Target
from pipeline.tree import lane_ranges

logger = logging.getLogger(__name__)

# A shard is of so many images; of up to so many where they are small, as each costs some milliseconds besides decoding.
_SHARD_IMAGES = 2048
_MAX_SHARD_IMAGES = 16384
# Of images that may be large, a shard is of so many at least.
_MIN_SHARD_IMAGES = 64
# A larger one still leaves so many shards to share the work.
_MIN_SHARDS = 16
# A shard's pixels travel as one object; larger ones would make a few of them fill the object store.
MAX_SHARD_BYTES = 16 * 2**20
# What is shuffled, and read from disk, at once; two of each lane are in memory where lanes are on disk.
_CHUNK_BYTES = 8 * 2**20
# Of parameters and their mean over all steps, float32.
_PIECE_BYTES = 4 * 2**20
# More products of pixels than these are not computed unless they are asked for: with 5 neighbors of each validation
# image, and of each training image.
_DEFAULT_NEIGHBORS = 5
_MAX_PRODUCTS, _MAX_TRAIN_PRODUCTS = 4 * 10**12, 10**12
# The field's k-nearest-neighbor evaluation of features: neighbors that vote by weights.
WEIGHTED_NEIGHBORS = 20
_FEATURE_PRODUCTS = 4
# To the distance of which a near-duplicate's is compared.
RATIO_NEIGHBOR = 5
# Of a core without instructions for int8.
_PRODUCTS_PER_HOUR = 10**14
# With more classes than these, results hold the best scores of an image.
_MAX_SCORES = 100
# Of the images that are searched for at once; and nearest training images that all actors find for them, at some 100
# bytes each, of which each actor finds a quarter at most.
_REQUEST_BYTES = 8 * 2**20
_REQUEST_NEIGHBORS = 2**21
# Runs of neighbours are so short that no lane has more than this share of images above another.
_RUN_SHARE = 1 / 64
_MAX_RUN = 2048


@dataclass(frozen=True)
class LaneAssignment:
    """The rule that gives every training image its lane and its offset there.

    Runs of neighbours in the listing go to the lanes in turn: single images where there are few, so that lanes are
    alike, and as many as a shard where there are many, so that a shard goes to few actors.

    Attributes:
        num_images: Listed training images.
        num_lanes: L.
    """

    num_images: int
    num_lanes: int

    @property
    def run_length(self) -> int:
        """Neighbours that go to one lane."""
        return max(1, min(_MAX_RUN, int(self.num_images * _RUN_SHARE) // self.num_lanes))

    @property
    def lane_sizes(self) -> tuple[int, ...]:
        """Listed images of each lane."""
        rounds, rest = divmod(self.num_images, self.run_length * self.num_lanes)
        return tuple(
            rounds * self.run_length + min(max(rest - lane * self.run_length, 0), self.run_length)
            for lane in range(self.num_lanes)
        )

    def lanes(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the lanes of rows of the listing, int64 [N]."""
        return rows_N // self.run_length % self.num_lanes

    def owners(self, num_actors: int) -> npt.NDArray[np.int64]:
        """Return the rank of the actor that has each lane, int64 [L]."""
        sizes = [len(lanes) for lanes in lane_ranges(self.num_lanes, num_actors)]
        return np.repeat(np.arange(num_actors), sizes)

    def rows(self, lane: int, offsets_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows of the listing that stand at these offsets of a lane, int64 [N]."""
        runs_N, places_N = np.divmod(offsets_N, self.run_length)
        return (runs_N * self.num_lanes + lane) * self.run_length + places_N

    def offsets(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where rows of the listing stand in their lanes, int64 [N]."""
        return rows_N // (self.run_length * self.num_lanes) * self.run_length + rows_N % self.run_length


@dataclass(frozen=True)
class Request:
    """Images of one actor for which all actors are to search their training images.

    Attributes:
        kind: `valid` and `train` for images of the splits; `doubtful` for images whose label is doubtful, of both.
        spans: A part's number, the first position in it and the one behind the last; of other kinds the number is 0.
    """

    kind: Literal["valid", "train", "doubtful"]
    spans: tuple[tuple[int, int, int], ...]

    @property
    def num_positions(self) -> int:
        """Places of images, those of skipped ones included."""
        return sum(stop - start for _, start, stop in self.spans)


@dataclass(frozen=True)
class Plan:
    """What every actor knows of the job.

    Attributes:
        target: Size and mode of the images.
        num_classes: K.
        assignment: How training images come to lanes.
        part_sizes: Listed validation images of each part.
        has_training: Whether SGD follows the distances.
        batch_size: Images of a step, over all lanes.
        learning_rate: Of SGD; None for the one that fits the images.
        seed: Of the weights and of the images' order.
        gpus_per_actor: The share of a GPU that an actor has, where there are GPUs.
        num_neighbors: Nearest training images that are searched for every validation image; 0 for none.
        searches_train: Whether they are searched for every training image too.
        max_scores: With more scores of an image than these, results hold the best ones.
        model: The user's own model, where there is one.
        given: What was predicted elsewhere: a class for each image, or also scores; None for nothing.
    """

    target: Target
    num_classes: int
    assignment: LaneAssignment
    part_sizes: tuple[int, ...]
    has_training: bool
    batch_size: int
    learning_rate: float | None
    seed: int
    gpus_per_actor: float
    num_neighbors: int = 0
    searches_train: bool = False
    max_scores: int = _MAX_SCORES
    model: Model | None = None
    given: Literal["predictions", "scores"] | None = None

    @property
    def has_features(self) -> bool:
        """Whether the model's features take the place of pixels."""
        return self.model is not None and self.model.has_features

    @property
    def num_values(self) -> int:
        """Values of an image as classifiers see it, D: pixels, or features."""
        return self.model.num_outputs if self.model and self.model.has_features else self.target.num_values

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image as classifiers see it; features are a row of one channel."""
        if self.has_features:
            return 1, self.num_values, 1
        return self.target.sides

    @property
    def image_bytes(self) -> int:
        """Bytes of an image as it is kept."""
        return self.model.feature_bytes if self.model and self.model.has_features else self.target.num_values

    @property
    def num_logits(self) -> int:
        """Logits of the model that are kept with a validation image; 0 without one."""
        return self.model.num_outputs if self.model and not self.model.has_features else 0

    @property
    def num_searched(self) -> int:
        """Nearest training images that are searched for: as many as near-duplicates take, and of features votes."""
        if not self.num_neighbors:
            return 0
        return max(self.num_neighbors, WEIGHTED_NEIGHBORS if self.has_features else RATIO_NEIGHBOR)

    def target_of(self, split: Split) -> Target:
        """What images of a split become: a model that only predicts is not given those to train on."""
        return self.target.without_model if split == "train" and self.num_logits else self.target

    @property
    def class_pieces(self) -> list[range]:
        """The classes whose means, or parameters, an actor gives or takes at once: no copy of all of them is made."""
        size = max(1, _PIECE_BYTES // (2 * 4 * (self.num_values + 1)))
        return [range(first, min(first + size, self.num_classes)) for first in range(0, self.num_classes, size)]

    @property
    def num_lanes(self) -> int:
        """L, a constant of the job."""
        return self.assignment.num_lanes

    @property
    def keeps_images(self) -> bool:
        """Whether actors keep all images after the class means."""
        return self.has_training or self.num_neighbors > 0

    @property
    def num_chunks(self) -> int:
        """Chunks of each lane: every n-th image of it, shuffled together, chunk after chunk in another order."""
        max_rows = max(1, _CHUNK_BYTES // self.image_bytes)
        return max(1, -(-max(self.assignment.lane_sizes) // max_rows))

    @property
    def lane_positions(self) -> int:
        """Places of a lane where it is kept, as many as chunks of the longest lane have."""
        return self.num_chunks * -(-max(self.assignment.lane_sizes) // self.num_chunks)

    def requests(
        self, kind: Literal["valid", "train", "doubtful"], sizes: Mapping[int, int], num_actors: int
    ) -> list[Request]:
        """Cut what one of all actors has, by the number of positions of each part, into requests of bounded size."""
        num_found = max(4, num_actors) * self.num_searched
        most = max(1, min(_REQUEST_BYTES // self.image_bytes, _REQUEST_NEIGHBORS // num_found))
        requests, spans, num_left = [], [], most
        for part, size in sizes.items():
            start = 0
            while start < size:
                stop = min(size, start + num_left)
                spans.append((part, start, stop))
                num_left -= stop - start
                start = stop
                if num_left == 0:
                    requests.append(Request(kind, tuple(spans)))
                    spans, num_left = [], most
        return requests + ([Request(kind, tuple(spans))] if spans else [])

    @property
    def held_bytes(self) -> int:
        """Bytes of the images that all actors hold at one time."""
        # Else a part is scored and forgotten when it is complete; the next one fills meanwhile.
        num_valid = sum(self.part_sizes) if self.keeps_images else 2 * max(self.part_sizes, default=0)
        num_train = self.assignment.num_images if self.keeps_images else 0
        return (num_train + num_valid) * self.image_bytes + num_valid * 4 * self.num_logits


def make_plan(
    config: Config, listing: Listing, target: Target, score_bytes: int, model: Model | None = None
) -> tuple[Plan, list[Shard]]:
    """Cut both splits and settle what the actors need to know; shards come back with training first.

    Args:
        config: The options.
        listing: What the dataset holds.
        target: What every image becomes.
        score_bytes: Of one validation image's scores by all classifiers.
        model: The user's own model, where there is one.
    """
    num_images = config.shard_images or _shard_images(len(listing.train) + len(listing.valid), config)
    if model and not config.shard_images:  # that an actor is done with one before it seems to stand still
        num_images = min(num_images, _SHARD_IMAGES)
    max_images = min(num_images, max(1, MAX_SHARD_BYTES // target.decoded_bytes))
    kept_bytes = model.feature_bytes if model and model.has_features else target.num_values
    bounds = part_bounds(len(listing.valid), kept_bytes + score_bytes, config.lanes)
    train = cut_train(listing.row_groups("train"), max_images)
    valid = cut_valid(listing.row_groups("valid"), max_images, bounds, len(train))
    # Products of features are of float64, which takes some times as long as whole numbers of a byte.
    num_products = _FEATURE_PRODUCTS * model.num_outputs if model and model.has_features else target.num_values
    num_neighbors = choose_neighbors(config, len(listing.train), len(listing.valid), num_products)
    plan = Plan(
        target=target,
        num_classes=len(listing.classes),
        assignment=LaneAssignment(len(listing.train), config.lanes),
        part_sizes=tuple(stop - start for start, stop in itertools.pairwise(bounds)),
        has_training=config.epochs > 0,
        num_neighbors=num_neighbors,
        searches_train=num_neighbors > 0 and _searches_train(config, len(listing.train), num_products),
        max_scores={"top": 0, "auto": _MAX_SCORES, "all": sys.maxsize}[config.scores],
        model=model,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        gpus_per_actor=config.gpus_per_actor,
    )
    return plan, train + valid


def choose_neighbors(config: Config, num_train: int, num_valid: int, num_values: int) -> int:
    """Choose how many neighbors to search for, where the user leaves it open: none, if it took long."""
    if config.neighbors is not None:
        return config.neighbors
    num_products = num_train * num_valid * num_values
    if num_products <= _MAX_PRODUCTS:
        return _DEFAULT_NEIGHBORS
    logger.info(
        "the nearest training images are not searched for: %d x %d images of %d values take some %.1f hours of a core; "
        "--neighbors %d asks for it",
        num_train, num_valid, num_values, num_products / _PRODUCTS_PER_HOUR, _DEFAULT_NEIGHBORS,
    )  # fmt: skip
    return 0


def _searches_train(config: Config, num_train: int, num_values: int) -> bool:
    is_cheap = num_train**2 * num_values <= _MAX_TRAIN_PRODUCTS
    return config.neighbors_of == "all" or (config.neighbors_of == "auto" and is_cheap)


def _shard_images(num_images: int, config: Config) -> int:
    """Choose the size of a shard, a power of two, by the number of listed images."""
    share = 1 << max(1, num_images // _MIN_SHARDS).bit_length() - 1
    if config.height_width:  # a given size says nothing of the files', and large ones are long in decoding
        return min(_SHARD_IMAGES, max(_MIN_SHARD_IMAGES, share))
    return min(_MAX_SHARD_IMAGES, max(_SHARD_IMAGES, share))
