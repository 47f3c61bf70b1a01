"""How a job is allocated to a cluster: actors and their devices, shards in flight, memory or disk for the images.

Input: options, plan, and what the cluster and its nodes have. Output: an `Allocation`, a bound, a kind of storage.
Invariant: an allocation changes how long a job takes, and not a bit of its results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import Config
from pipeline.cuts import Shard
from pipeline.errors import ClusterError
from pipeline.plan import Plan
from pipeline.tree import lane_ranges

# Shards in flight for each CPU: one being decoded, one waiting, the others on their way to an actor.
_SHARDS_PER_CPU = 4
# However few CPUs there are: a small dataset is decoded while its actors start.
_MIN_IN_FLIGHT = 32
# What is in flight may take this share of the object store; more would make Ray write it to disk.
_STORE_SHARE = 0.25
# Images may take this share of the memory that Ray counts; the rest is for working with them.
_MEMORY_SHARE = 0.8
_DISK_SHARE = 0.9
Storage = Literal["memory", "disk"]


@dataclass(frozen=True)
class Allocation:
    """How a job fits a cluster.

    Attributes:
        num_actors: Actors to start.
        gpus_per_actor: The share of a GPU that each asks for; 0 on CPUs.
        threads_per_actor: Threads with which each computes distances on CPUs: its share of them.
    """

    num_actors: int
    gpus_per_actor: float
    threads_per_actor: int


@dataclass(frozen=True)
class NodeCapacity:
    """What a node that actors are to run on has for images, in bytes, and how many actors come to it."""

    address: str
    memory_bytes: float
    disk_bytes: float
    num_actors: int


def allocate(config: Config, resources: Mapping[str, float], num_nodes: int) -> Allocation:
    """Choose the number of actors and what they compute on.

    Actors ask for no CPU, so that however many they are they never keep decoding from its own.

    Args:
        config: The options.
        resources: What the whole cluster has, by Ray's names: `CPU` and `GPU`.
        num_nodes: Nodes with CPUs.

    Raises:
        ClusterError: If the cluster, even when idle, lacks what the job needs.
    """
    num_cpus, num_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    if num_cpus < 1:
        raise ClusterError("the cluster: expected a CPU for decoding, got none; add a node with CPUs")
    # GPU by GPU: what is left of two of them makes no place for one more actor.
    max_on_gpus = int(num_gpus) * int(1 / config.gpus_per_actor)
    has_gpus = max_on_gpus >= (config.actors or 1)
    if config.device == "cuda" and not has_gpus:
        raise ClusterError(
            f"--device cuda: expected {_gpus((config.actors or 1) * config.gpus_per_actor)} in the cluster, got "
            f"{num_gpus:g}; add GPUs, ask for fewer --actors, or give --device cpu"
        )
    is_on_gpu = has_gpus and config.device != "cpu"
    num_actors = config.actors or min(config.lanes, max_on_gpus if is_on_gpu else num_nodes)
    return Allocation(
        num_actors, config.gpus_per_actor if is_on_gpu else 0.0, max(1, num_cpus // max(num_actors, num_nodes))
    )


def _gpus(number: float) -> str:
    return f"{number:g} GPU{'' if number == 1 else 's'}"


def max_shards_in_flight(plan: Plan, shards: list[Shard], resources: Mapping[str, float]) -> int:
    """Bound the shards between files and actors by the cluster's CPUs and the bytes of its object store.

    More are asked for than there are CPUs to decode them: what waits tells an autoscaler to start nodes.
    """
    shard_bytes = max(shard.num_images for shard in shards) * plan.target.decoded_bytes
    store_bytes = resources.get("object_store_memory", math.inf) * _STORE_SHARE
    most = max(_MIN_IN_FLIGHT, _SHARDS_PER_CPU * int(resources.get("CPU", 0)))
    return int(max(1, min(most, store_bytes // shard_bytes)))


def choose_storage(plan: Plan, num_actors: int, capacities: Sequence[NodeCapacity]) -> Storage:
    """Choose memory where the images fit every node's, else disk, for all nodes alike.

    Args:
        plan: The job's plan.
        num_actors: Actors of the job.
        capacities: Of the nodes that they run on.

    Raises:
        ClusterError: If a node has room for its actors' images neither in memory nor on disk.
    """
    # Some actors may have more lanes than others; parts are never shared less evenly.
    share = max(map(len, lane_ranges(plan.num_lanes, num_actors))) / plan.num_lanes
    needed = [plan.held_bytes * min(1.0, share * capacity.num_actors) for capacity in capacities]
    is_short = [
        num_bytes > _MEMORY_SHARE * capacity.memory_bytes
        for capacity, num_bytes in zip(capacities, needed, strict=True)
    ]
    if not any(is_short):
        return "memory"
    for capacity, num_bytes, is_it_short in zip(capacities, needed, is_short, strict=True):
        # Else nothing is kept that disk could keep.
        if num_bytes > _DISK_SHARE * capacity.disk_bytes if plan.keeps_images else is_it_short:
            advice = "--epochs 0 --neighbors 0, a smaller --size" if plan.keeps_images else "a smaller --size"
            disk = f" or {capacity.disk_bytes / 2**30:.1f} on disk" if plan.keeps_images else ""
            raise ClusterError(
                f"{capacity.address}: expected {num_bytes / 2**30:.1f} GiB for the images, got "
                f"{_MEMORY_SHARE * capacity.memory_bytes / 2**30:.1f} in memory{disk}; give {advice}, more nodes, or "
                "another --scratch"
            )
    return "disk"
