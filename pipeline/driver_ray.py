"""What the driver needs of Ray: a connection, actors, a decoding task, and waiting that cannot hang.

What enters: calls. What leaves: results, or an error of our own tree for every fault of Ray's. Always: with nothing
finished for `STALL_SECONDS` there is an error that names what was waited for.
"""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import cache_key, loading
from pipeline.archives import Archive, Scan
from pipeline.config import Config
from pipeline.decode import Header, Target
from pipeline.errors import ActorLostError, ClusterError, EvaluationError, StalledError
from pipeline.exchange import TOKEN_BYTES, Address
from pipeline.files import Location
from pipeline.imports import leave_pandas_out
from pipeline.loading import Loader, ShardFile
from pipeline.shards import Fit, Plan, Shard
from pipeline.sources import ArchiveRows
from pipeline.splits import Split

if TYPE_CHECKING:
    from pipeline.results import Output

# A shard of large photographs from slow storage can take minutes; nothing finished for longer is a fault.
STALL_SECONDS = 600.0
_TICK_SECONDS = 0.2

Ref = Any  # ray.ObjectRef, whose type parameter says nothing about what `call` returns
Actor = Any  # a handle of ActorProcess


@dataclass(frozen=True)
class PartRecord:
    """A written prediction file: its content's digest and, by classifier, its confusion counts, int64 [K, K]."""

    digest: str
    confusions: dict[str, npt.NDArray[np.int64]]


class ActorProcess:
    """A `LaneActor` in a process of Ray's.

    It is imported only there, so that the driver and the decoding workers never load torch; and it is joined with
    the writing of results here, because the modules below do not know of each other.
    """

    def __init__(self) -> None:
        leave_pandas_out()
        importlib.import_module("torch")  # while the listing is read, and not when the first images are here

    def begin(self, plan: Plan, rank: int, fit: Fit, scratch: str | None) -> tuple[str, str]:
        """Become one of a job's actors; name its device and where it keeps its images."""
        from pipeline.actors import LaneActor

        on_gpu, threads = fit.gpus_per_actor > 0, min(fit.threads_per_actor, os.cpu_count() or 1)
        self._actor = LaneActor(plan, rank, fit.num_actors, is_on_gpu=on_gpu, num_threads=threads, scratch=scratch)
        return self._actor.describe()

    def call(self, method: str, *args: object) -> Any:
        """Call a method of the actor."""
        return getattr(self._actor, method)(*args)

    def listen(self) -> Address:
        """Wait for the other actors' calls on this node's own address, and return where they reach this one."""
        return self._actor.listen(str(ray.util.get_node_ip_address()))

    def write_part(self, part: int, classes: tuple[str, ...], output: Output) -> PartRecord:
        """Score a part and write its prediction file."""
        from pipeline import results  # here, because decoding workers load this module too

        scored = self._actor.score_part(part)
        table = results.predictions_table(classes, scored.keys, scored.labels, scored.predictions, scored.scores)
        digest = results.write_table(output, f"{results.PREDICTIONS}/part-{part:05d}", table)
        return PartRecord(digest, scored.confusions)


def cluster_resources() -> dict[str, float]:
    """Return what the whole cluster has, by Ray's names."""
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def living_ids() -> set[str]:
    """Return Ray's ids of the living nodes."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def start_actors(fit: Fit, node_ids: Sequence[str]) -> list[Actor]:
    """Start the actors' processes, which import torch; nothing is waited for.

    Args:
        fit: How the job fits the cluster.
        node_ids: Of the nodes with CPUs, over which actors without a GPU are spread; GPUs are where they are.
    """
    if not node_ids:
        raise ActorLostError("the actors: expected a node with CPUs, got none")
    # The group "watch" answers while an epoch runs.
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": fit.gpus_per_actor, "concurrency_groups": {"watch": 1}}
    actor_class: Any = ray.remote(**options)(ActorProcess)
    return [
        actor_class.options(
            scheduling_strategy="DEFAULT"
            if fit.gpus_per_actor > 0
            else NodeAffinitySchedulingStrategy(node_ids[rank % len(node_ids)], soft=False)
        ).remote()
        for rank in range(fit.num_actors)
    ]


def begin(actors: Sequence[Actor], plan: Plan, fit: Fit, scratch: str | None) -> list[Ref]:
    """Give actors their job and let them meet.

    Nothing is waited for: an actor does its calls in their order, so shards can be sent before it is up.

    Args:
        actors: As `start_actors` returns them.
        plan: The job's plan.
        fit: As they were started by.
        scratch: The folder for images that memory cannot hold; None where it can.

    Returns:
        References to the names of their devices, followed by those of their meeting.
    """
    begun = [actor.begin.remote(plan, rank, fit, scratch) for rank, actor in enumerate(actors)]
    if fit.num_actors > 1:
        addresses = [actor.listen.remote() for actor in actors]
        token = secrets.token_bytes(TOKEN_BYTES)
        begun += [actor.call.remote("join_group", token, *addresses) for actor in actors]
    return begun


def decode_shard(
    loader: Ref, num_tables: int, shard: Shard, rows: Ref | pa.Table, file: Ref | None
) -> tuple[list[Ref], Ref, Ref]:
    """Start decoding a shard.

    Args:
        loader: A reference to a `Loader`.
        num_tables: How many tables come out: one for each owner of training images, one of validation images.
        shard: The shard.
        rows: As `loading.load_shard` takes them; of an archive, a reference to them.
        file: Of an archive, a reference to its `ShardFile`.

    Returns:
        References to the tables of images, to the table of skipped ones or None, and to the counts of images
        decoded, skipped (by reason) and resized, with whether all of it came from the cache.
    """
    # A list and bytes, because Ray would pickle anything else, which takes longer than all else that it does.
    sent = _to_bytes(rows) if isinstance(rows, pa.Table) else rows
    refs: Any = _decode_task(num_tables + 2).remote(loader, list(vars(shard).values()), sent, file)
    *tables, skipped, counts = refs
    return tables, skipped, counts


@cache
def _decode_task(num_returns: int) -> Any:
    return ray.remote(num_returns=num_returns)(_decode_shard)


def _decode_shard(
    loader: Loader, shard_fields: list[Any], sent: pa.Table | bytes, file: ShardFile | None
) -> tuple[Any, ...]:
    leave_pandas_out()
    shard = Shard(*shard_fields)
    rows = pa.ipc.open_stream(sent).read_all() if isinstance(sent, bytes) else sent
    tables, skipped, decoded = loading.load_shard(loader, shard, rows, file)
    num_skipped = dict(Counter(fault.reason for _, fault in decoded.faults))
    counts = (len(decoded.table), num_skipped, decoded.num_resized, decoded.is_from_cache)
    return (*tables, skipped, counts)


def _to_bytes(rows: pa.Table) -> bytes:
    """Write rows as an Arrow stream, of a slice no more than what is in it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def name_entry(location: Location, target: Target, rows: pa.Table) -> Ref:
    """Start naming the entry in the cache of a shard of class folders, by its rows of the listing."""
    ref: Ref = _name_entry.remote(location, target, _to_bytes(rows))
    return ref


@ray.remote
def _name_entry(location: Location, target: Target, sent: bytes) -> str:
    leave_pandas_out()
    return cache_key.name_entry(location, target, pa.ipc.open_stream(sent).read_all())


def scan_archive(location: Location, archive: Archive, config: Config) -> tuple[Ref, dict[Split, Ref]]:
    """Start indexing an archive.

    Returns:
        A reference to its `Scan`; and, by split, to its index, which stays in the object store.
    """
    refs: Any = _scan_archive.remote(location, archive, config)
    scan, train, valid = refs
    return scan, {"train": train, "valid": valid}


@ray.remote(num_returns=3)
def _scan_archive(location: Location, archive: Archive, config: Config) -> tuple[Scan, pa.Table, pa.Table]:
    leave_pandas_out()
    from pipeline import parquets, tars  # here, because few datasets need them

    filesystem, _ = location.filesystem
    scan = tars.scan if archive.kind == "tar" else parquets.scan
    found, index = scan(filesystem, archive, config)
    return found, index["train"], index["valid"]


def read_headers(location: Location, rows: ArchiveRows, places: Sequence[int]) -> Ref:
    """Start reading the headers of some images of an archive."""
    file = ShardFile(rows.archive, rows.labels)
    ref: Ref = _read_headers.remote(location, rows.index, file, places)
    return ref


@ray.remote
def _read_headers(location: Location, rows: pa.Table, file: ShardFile, places: Sequence[int]) -> list[Header]:
    leave_pandas_out()
    return loading.read_headers(location, rows, file, places)


def put(value: object) -> Ref:
    """Place a value in the object store once, for many tasks."""
    return ray.put(value)


def wait_some(refs: Sequence[Ref], what: str, on_tick: Callable[[], bool]) -> list[Ref]:
    """Wait until some of `refs` are finished, and return all that are.

    Args:
        refs: Not empty.
        what: What is waited for, for the error.
        on_tick: Called several times a second; returns whether there was a sign of life, and may raise.

    Raises:
        StalledError: If there is none, nor a result, for `STALL_SECONDS`.
    """
    last_sign = time.monotonic()
    pending = list(refs)
    while True:
        # Results stay where they are: only those that are asked for come to the driver.
        ready, _ = ray.wait(pending, num_returns=1, timeout=_TICK_SECONDS, fetch_local=False)
        is_alive = on_tick()
        if ready:
            # All at once, since a look costs as much as there is to look at.
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
            return list(ready)
        if is_alive:
            last_sign = time.monotonic()
        if time.monotonic() - last_sign > STALL_SECONDS:
            raise StalledError(
                f"{what}: expected a result, got none for {STALL_SECONDS:.0f} s; look for a node without memory, "
                "storage that does not answer, or others' work on the cluster's CPUs and GPUs"
            )


def wait_all(refs: Sequence[Ref], what: str, on_tick: Callable[[], bool]) -> list[Any]:
    """Wait for all of `refs` and return their results; the first fault, in time, is raised."""
    pending = list(refs)
    while pending:
        for done in wait_some(pending, what, on_tick):
            get(done)
            pending.remove(done)
    return [get(ref) for ref in refs]


def get(ref: Ref, what: str = "a task") -> Any:
    """Return a finished result; a value that is no reference is returned as it is.

    Raises:
        ActorLostError: If its actor died.
        ClusterError: If a task was lost more often than it is repeated.
        EvaluationError: As the task or actor raised it.
    """
    if not isinstance(ref, ray.ObjectRef):
        return ref
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as exc:
        if (known := _known_cause(exc.cause, what)) is None:
            raise
        raise known from exc
    except ray.exceptions.ObjectLostError as exc:  # with the node that held it
        raise ActorLostError(f"{what}: expected its result, got {_first_line(exc)}") from exc
    except ray.exceptions.ActorUnschedulableError as exc:  # its node died before it was up
        raise ActorLostError(f"an actor: expected its node to live, got {_first_line(exc)}") from exc
    except ray.exceptions.RayActorError as exc:
        if exc.actor_init_failed:
            cause = str(exc).strip().splitlines()[-1]
            raise ClusterError(f"an actor: expected it to start, got {cause}; see to the node that it is on") from exc
        raise ActorLostError(f"an actor: expected it to live, got {_first_line(exc)}") from exc
    except ray.exceptions.RayError as exc:
        raise ClusterError(
            f"{what}: expected it to end well, got {type(exc).__name__} after all its repetitions "
            f"({_first_line(exc)}); look for a node without memory, or an image that crashes its decoder"
        ) from exc


def _known_cause(cause: Exception, what: str) -> EvaluationError | None:
    """Say what a user can do about what a task or actor raised; None if that is unknown."""
    if isinstance(cause, EvaluationError):
        return cause
    if isinstance(cause, ray.exceptions.RayError):  # what it was to work on is lost
        return ActorLostError(f"{what}: expected its input, got {_first_line(cause)}")
    # torch's are its own for GPUs, and a plain one for memory.
    is_out_of_memory = type(cause).__name__ in ("OutOfMemoryError", "MemoryError")
    if is_out_of_memory or "can't allocate memory" in str(cause):
        return ClusterError(
            f"{what}: expected enough memory, got {_first_line(cause)}; give a smaller --size, --epochs 0, or more "
            "--actors on more devices"
        )
    return None


def is_finished(ref: Ref) -> bool:
    """Say whether a result, or a fault, is there."""
    return bool(ray.wait([ref], timeout=0, fetch_local=False)[0])


def count_steps(actor: Actor) -> Ref:
    """Ask an actor, beside what it is doing, for the number of training steps done."""
    return actor.call.options(concurrency_group="watch").remote("count_steps")


def end_actors(actors: Sequence[Actor]) -> None:
    """End actors at once; those that are ended already stay so."""
    for actor in actors:
        ray.kill(actor)


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]
