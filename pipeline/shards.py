"""A listing cut into shards, and shards dealt to lanes and parts: the plan of a job.

What enters: the number of images and the options. What leaves: numbered shards, each a range of the sorted listing,
and the sizes of the groups that they form. Always: the cut depends on the listing and the options alone, never on the
number of workers, and every image is in exactly one shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.decode import Target
from pipeline.errors import ClusterError
from pipeline.sources import Listing
from pipeline.splits import Split

# A shard's pixels travel as one object; larger ones would make a few of them fill the object store.
MAX_SHARD_BYTES = 64 * 2**20
MAX_PART_IMAGES = 100_000
# Shards in flight for each CPU: one being decoded, one waiting, the others on their way to an actor.
_SHARDS_PER_CPU = 4
# What is in flight may take this share of the object store; more would make Ray write it to disk.
_STORE_SHARE = 0.25


@dataclass(frozen=True)
class Shard:
    """A unit of work: some rows of one split's listing.

    Attributes:
        index: The shard's number, counted through both splits, training first.
        split: Which listing the rows are of.
        rows: The rows, as a range.
        group: The lane that a training shard belongs to; the part of the predictions that a validation shard
            is written to.
        offset: Where its first row stands among the listed images of the group.
    """

    index: int
    split: Split
    rows: range
    group: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """What every actor knows of the job.

    Attributes:
        target: Size and mode of the images.
        num_classes: K.
        lane_sizes: Listed training images of each lane.
        part_sizes: Listed validation images of each part.
        has_training: Whether SGD follows the distances.
        batch_size: Images of a step, over all lanes.
        learning_rate: Of SGD; None for the one that fits the images.
        seed: Of the weights and of the images' order.
        gpus_per_actor: The share of a GPU that an actor has, where there are GPUs.
    """

    target: Target
    num_classes: int
    lane_sizes: tuple[int, ...]
    part_sizes: tuple[int, ...]
    has_training: bool
    batch_size: int
    learning_rate: float | None
    seed: int
    gpus_per_actor: float

    @property
    def num_lanes(self) -> int:
        """L, a constant of the job."""
        return len(self.lane_sizes)


@dataclass(frozen=True)
class Fit:
    """How a job fits a cluster.

    Attributes:
        num_actors: Actors to start.
        gpus_per_actor: The share of a GPU that each asks for; 0 on CPUs.
        max_in_flight: Shards that may be on their way from file to actor at one time.
    """

    num_actors: int
    gpus_per_actor: float
    max_in_flight: int


def make_plan(config: Config, listing: Listing, target: Target) -> tuple[Plan, list[Shard]]:
    """Cut both splits and settle what the actors need to know; shards come back with training first."""
    image_bytes = target.num_values
    train = cut_train(len(listing.train), image_bytes, config.shard_images, config.lanes)
    valid = cut_valid(len(listing.valid), image_bytes, config.shard_images, config.lanes, len(train))
    plan = Plan(
        target=target,
        num_classes=len(listing.classes),
        lane_sizes=_group_sizes(train, config.lanes),
        part_sizes=_group_sizes(valid, valid[-1].group + 1),
        has_training=config.epochs > 0,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        gpus_per_actor=config.gpus_per_actor,
    )
    return plan, train + valid


def cut_train(num_images: int, image_bytes: int, shard_images: int, lanes: int) -> list[Shard]:
    """Cut the training listing into shards of every n-th image, dealt to the lanes in turn.

    The listing is sorted by class, so a stride gives every shard all classes in their proportion, and a number of
    shards that is a multiple of the lanes gives every lane its share of images, to within one per shard.

    Args:
        num_images: Images in the listing.
        image_bytes: Bytes of one decoded image.
        shard_images: Images that a shard holds at most.
        lanes: Lanes of the gradient.
    """
    num_shards = -(-_num_shards(num_images, image_bytes, shard_images) // lanes) * lanes
    filled = [0] * lanes
    shards = []
    for index in range(min(num_shards, num_images)):
        rows = range(index, num_images, num_shards)
        lane = index % lanes
        shards.append(Shard(index, "train", rows, lane, filled[lane]))
        filled[lane] += len(rows)
    return shards


def cut_valid(num_images: int, image_bytes: int, shard_images: int, lanes: int, first_index: int) -> list[Shard]:
    """Cut the validation listing into shards of neighbours, and these into parts of neighbouring shards.

    A part is one prediction file and is computed on one actor: there is one for each lane if the shards suffice,
    and more, in a multiple of the lanes, where parts would pass `MAX_PART_IMAGES`.

    Args:
        num_images: Images in the listing.
        image_bytes: Bytes of one decoded image.
        shard_images: Images that a shard holds at most.
        lanes: Lanes, the most actors that a job can have.
        first_index: The number of the first shard.
    """
    num_shards = _num_shards(num_images, image_bytes, shard_images)
    num_parts = min(num_shards, -(-num_images // (MAX_PART_IMAGES * lanes)) * lanes)
    filled = [0] * num_parts
    shards = []
    for place in range(num_shards):
        rows = range(place * num_images // num_shards, (place + 1) * num_images // num_shards)
        part = place * num_parts // num_shards
        shards.append(Shard(first_index + place, "valid", rows, part, filled[part]))
        filled[part] += len(rows)
    return shards


def fit_cluster(config: Config, plan: Plan, shards: list[Shard], resources: Mapping[str, float], num_nodes: int) -> Fit:
    """Choose the number of actors and bound the work in flight by bytes.

    Actors ask for no CPU, so that however many they are they never keep decoding from its own.

    Args:
        config: The options.
        plan: The job's plan.
        shards: All shards.
        resources: What the whole cluster has, by Ray's names: `CPU`, `GPU`, and `memory` and `object_store_memory`
            in bytes.
        num_nodes: Nodes of the cluster.

    Raises:
        ClusterError: If the cluster, even when idle, lacks what the job needs.
    """
    num_cpus, num_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    if num_cpus < 1:
        raise ClusterError("the cluster: expected a CPU for decoding, got none; add a node with CPUs")
    # GPU by GPU: what is left of two of them makes no place for one more actor.
    most_on_gpus = int(num_gpus) * int(1 / config.gpus_per_actor)
    has_gpus = most_on_gpus >= (config.actors or 1)
    if config.device == "cuda" and not has_gpus:
        raise ClusterError(
            f"--device cuda: expected {(config.actors or 1) * config.gpus_per_actor:g} GPUs in the cluster, got "
            f"{num_gpus:g}; add GPUs, ask for fewer --actors, or give --device cpu"
        )
    is_on_gpu = has_gpus and config.device != "cpu"
    # Without training a part is scored and forgotten when it is complete; the next one fills meanwhile.
    num_held = sum(plan.lane_sizes) + sum(plan.part_sizes) if plan.has_training else 2 * max(plan.part_sizes)
    held_bytes = num_held * plan.target.num_values
    memory_bytes = resources.get("memory", math.inf)
    if not is_on_gpu and held_bytes > memory_bytes:
        advice = (
            "a smaller --size, --epochs 0, or more nodes" if plan.has_training else "a smaller --size, or more nodes"
        )
        raise ClusterError(
            f"the cluster: expected {held_bytes / 2**30:.1f} GiB of memory to hold the images, got "
            f"{memory_bytes / 2**30:.1f}; give {advice}"
        )
    return Fit(
        num_actors=config.actors or min(config.lanes, most_on_gpus if is_on_gpu else num_nodes),
        gpus_per_actor=config.gpus_per_actor if is_on_gpu else 0.0,
        max_in_flight=most_in_flight(plan, shards, resources),
    )


def most_in_flight(plan: Plan, shards: list[Shard], resources: Mapping[str, float]) -> int:
    """Bound the shards between files and actors by the cluster's CPUs and the bytes of its object store.

    More are asked for than there are CPUs to decode them: what waits tells an autoscaler to start nodes.
    """
    shard_bytes = max(len(shard.rows) for shard in shards) * plan.target.num_values
    store_bytes = resources.get("object_store_memory", math.inf) * _STORE_SHARE
    return int(max(1, min(_SHARDS_PER_CPU * int(resources.get("CPU", 0)), store_bytes // shard_bytes)))


def _group_sizes(shards: list[Shard], num_groups: int) -> tuple[int, ...]:
    sizes = [0] * num_groups
    for shard in shards:
        sizes[shard.group] += len(shard.rows)
    return tuple(sizes)


def _num_shards(num_images: int, image_bytes: int, shard_images: int) -> int:
    most_images = min(shard_images, max(1, MAX_SHARD_BYTES // image_bytes))
    return -(-num_images // most_images)
