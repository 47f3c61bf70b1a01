"""The cluster as the job finds it: its nodes, waiting for more of them, and whether all see the same files.

Input: the options. Output: nodes, or an error that says what the cluster lacks. Invariant: what is waited for is asked
of the autoscaler, where there is one, and not for longer than `--wait-seconds`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config
from pipeline.data import files, uris
from pipeline.data.files import Location
from pipeline.driver.allocation import Allocation, NodeCapacity
from pipeline.driver.waiting import STALL_SECONDS, get_result
from pipeline.errors import ClusterError, DataError, OutputError
from pipeline.results.writing import RUN_FILE, Output

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
# Ray's own share of a node's memory for its object store.
STORE_SHARE = 0.3


@dataclass(frozen=True)
class Node:
    """A living node: Ray's id for it, its address, and what it has, by Ray's names."""

    node_id: str
    address: str
    resources: dict[str, float] = field(hash=False)

    @property
    def num_cpus(self) -> float:
        """CPUs that Ray may use; 0 on a head that is to do no work."""
        return self.resources.get("CPU", 0.0)


def living_nodes() -> list[Node]:
    """Return the cluster's living nodes, by address."""
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.node_id))


def cluster_resources() -> dict[str, float]:
    """Return what the whole cluster has, by Ray's names."""
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def living_ids() -> set[str]:
    """Return Ray's ids of the living nodes."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def working_nodes() -> list[Node]:
    """Return the living nodes that have CPUs, those with most first."""
    return sorted((node for node in living_nodes() if node.num_cpus > 0), key=lambda node: -node.num_cpus)


def total_resources(nodes: Sequence[Node]) -> dict[str, float]:
    """Add up what nodes have."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node.resources)
    return dict(total)


def describe_cluster(nodes: Sequence[Node]) -> str:
    """Say in one line what a cluster has."""
    words = []
    for node in nodes:
        kinds = [name.removeprefix("accelerator_type:") for name in node.resources if name.startswith("accelerator")]
        num_gpus = node.resources.get("GPU", 0.0)
        gpus = f", {num_gpus:g} GPUs{f' ({kinds[0]})' if kinds else ''}" if num_gpus else ""
        words.append(f"{node.address} with {node.num_cpus:g} CPUs{gpus}")
    return f"cluster of {len(nodes)} node{'s' if len(nodes) != 1 else ''}: {'; '.join(words)}"


def wait_for_nodes(config: Config, on_tick: Callable[[str, int, int], None]) -> None:
    """Wait until the cluster has the nodes and GPUs that were asked for.

    What is missing is asked for by a placement group, which Ray's autoscaler starts nodes for.

    Args:
        config: `min_nodes` nodes with CPUs are waited for, and with `--device cuda` the GPUs of all actors.
        on_tick: Called several times a second with what is waited for, how much of it there is, and how much is wanted.

    Raises:
        ClusterError: If they are not there in time.
    """
    if len(working_nodes()) < config.min_nodes:
        bundles = [{"CPU": 0.01}] * config.min_nodes
        _wait_for(config, bundles, "STRICT_SPREAD", lambda: len(working_nodes()), config.min_nodes, "nodes", on_tick)
    wait_for_gpus(config, on_tick)


def wait_for_gpus(config: Config, on_tick: Callable[[str, int, int], None]) -> None:
    """Wait for the GPUs that `--device cuda` needs, as `wait_for_nodes` does; also after a node with some has died."""
    num_gpus = -(-(config.actors or 1) // int(1 / config.gpus_per_actor))
    if config.device == "cuda" and _num_gpus() < num_gpus:
        _wait_for(config, [{"GPU": 1.0}] * num_gpus, "SPREAD", _num_gpus, num_gpus, "GPUs", on_tick)


def _num_gpus() -> int:
    return int(sum(node.resources.get("GPU", 0.0) for node in living_nodes()))


def _wait_for(
    config: Config,
    bundles: list[dict[str, float]],
    strategy: str,
    count: Callable[[], int],
    num_wanted: int,
    what: str,
    on_tick: Callable[[str, int, int], None],
) -> None:
    deadline = time.monotonic() + config.wait_seconds
    group = placement_group(bundles, strategy=strategy)
    try:
        while (num_there := count()) < num_wanted:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster: expected {num_wanted} {what} within {config.wait_seconds:g} s, got {num_there}; "
                    "start more nodes, raise --wait-seconds, or ask for less"
                )
            on_tick(what, num_there, num_wanted)
            time.sleep(_TICK_SECONDS)
    finally:
        remove_placement_group(group)


def check_paths(
    nodes: Sequence[Node], location: Location, names: Sequence[bytes], output: Output, on_tick: Callable[[], None]
) -> None:
    """See that every node finds the same files under a local `--data`, and the driver's under a local `--out`.

    Args:
        nodes: All of them.
        location: The dataset.
        names: Some of its files, below a local root; none for a URI.
        output: Where the results go.
        on_tick: Called several times a second.

    Raises:
        DataError: If a node lacks images of the dataset.
        OutputError: If a node does not see the results' folder.
    """
    sizes = files.file_sizes(location, names)
    marker = None
    try:
        if not uris.is_uri(output.root):
            marker = Path(output.root, f".{RUN_FILE}.{secrets.token_hex(8)}.tmp")
            try:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError as exc:
                raise OutputError(
                    f"--out {output.root}: expected to write there, got {exc.strerror}; choose another"
                ) from exc
        answers = _ask(
            nodes, "a look at the files", on_tick, _see_files, location, names, str(marker) if marker else None
        )
        for node, (seen_sizes, sees_marker) in answers:
            if seen_sizes != sizes:
                raise DataError(
                    f"--data {location.root}: expected the same images on every node, got others or none on "
                    f"{node.address}; give a URI, or a folder that all nodes share"
                )
            if not sees_marker:
                raise OutputError(
                    f"--out {output.root}: expected a folder that every node sees, got one that {node.address} does "
                    "not; give a URI, or a folder that all nodes share"
                )
    finally:
        if marker:
            marker.unlink(missing_ok=True)


def _see_files(location: Location, names: Sequence[bytes], marker: str | None) -> tuple[list[int], bool]:
    return files.file_sizes(location, names), marker is None or os.path.exists(marker)  # noqa: PTH110 - no Path for one look


def measure_capacities(
    nodes: Sequence[Node], allocation: Allocation, scratch: str, on_tick: Callable[[], None]
) -> list[NodeCapacity]:
    """Ask the nodes that actors may run on for the memory and disk that images can take.

    Raises:
        ClusterError: If a node has no such folder.
    """
    is_on_gpu = allocation.gpus_per_actor > 0
    fitting = [node for node in nodes if (node.resources.get("GPU", 0.0) if is_on_gpu else node.num_cpus) > 0]
    chosen = sorted(fitting, key=lambda node: -node.num_cpus)[: allocation.num_actors]
    num_each = -(-allocation.num_actors // len(chosen))
    if len(nodes) == 1:  # this one: no process need be started for it
        answers = [(chosen[0], _measure_capacity(scratch))]
    else:
        answers = _ask(chosen, "a look at the nodes' memory and disks", on_tick, _measure_capacity, scratch)
    capacities = []
    for node, (memory_bytes, disk_bytes) in answers:
        if disk_bytes is None:
            raise ClusterError(
                f"--scratch {scratch}: expected a folder on every node, got none on {node.address}; choose another"
            )
        # Ray's figure leaves out its object store; a control group's limit it may not know of.
        memory_bytes = min(node.resources.get("memory", math.inf), memory_bytes)
        capacities.append(NodeCapacity(node.address, memory_bytes, disk_bytes, num_each))
    return capacities


def _ask(
    nodes: Sequence[Node], what: str, on_tick: Callable[[], None], function: Callable[..., Any], *args: object
) -> list[tuple[Node, Any]]:
    """Call a function on every node; one that dies meanwhile gives no answer."""
    task: Any = ray.remote(num_cpus=0)(function)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(*args)] = node
    answers = []
    deadline = time.monotonic() + STALL_SECONDS
    while asked:
        on_tick()
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=_TICK_SECONDS)
        living = {node.node_id for node in living_nodes()}
        for ref in ready:
            node = asked.pop(ref)
            try:
                answers.append((node, get_result(ref, f"{what} of {node.address}")))
            except ClusterError:
                if node.node_id in living:
                    raise
        asked = {ref: node for ref, node in asked.items() if node.node_id in living}
        if asked and time.monotonic() > deadline:
            raise ClusterError(
                f"{what}: expected an answer from {next(iter(asked.values())).address}, got none; check that node"
            )
    return answers


def _measure_capacity(scratch: str) -> tuple[float, float | None]:
    """Return the memory that this process's control groups leave, after Ray's own share, and the free disk, if any."""
    disk_bytes = shutil.disk_usage(scratch).free if Path(scratch).is_dir() else None
    return memory_limit() * (1 - STORE_SHARE), disk_bytes


def memory_limit() -> float:
    """Return the bytes of memory that this process and its siblings may take, by the machine and control groups."""
    limit = float(psutil.virtual_memory().total)
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return limit
    for _, controllers, path in (line.split(":", 2) for line in groups):
        # Version 2 has one tree, and version 1 one for memory.
        base, name = (
            ("/sys/fs/cgroup", "memory.max") if not controllers else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (Path(base, path.strip("/")), *Path(base, path.strip("/")).parents):
            with suppress(OSError, ValueError):  # not there, or `max`
                limit = min(limit, float((folder / name).read_text()))
    return limit
