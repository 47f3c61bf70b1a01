"""Waiting for Ray that cannot hang, and Ray's faults as errors of our own.

Input: references to results. Output: results, or an `EvaluationError` for every fault of Ray's. Invariant: with
nothing finished for `STALL_SECONDS` there is an error that names what was waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from pipeline.errors import ActorLostError, ClusterError, EvaluationError, StalledError

# A shard of large photographs from slow storage can take minutes; nothing finished for longer is a fault.
STALL_SECONDS = 600.0
_TICK_SECONDS = 0.2
Ref = Any  # ray.ObjectRef, whose type parameter says nothing about what `call` returns


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
            get_result(done)
            pending.remove(done)
    return [get_result(ref) for ref in refs]


def get_result(ref: Ref, what: str = "a task") -> Any:
    """Return a finished result; a value that is no reference is returned as it is.

    Raises:
        ActorLostError: If its actor died.
        ClusterError: If a task was lost more often than it is repeated.
        StalledError: If it is not here in `STALL_SECONDS`.
        EvaluationError: As the task or actor raised it.
    """
    if not isinstance(ref, ray.ObjectRef):
        return ref
    try:
        return ray.get(ref, timeout=STALL_SECONDS)
    except ray.exceptions.RayTaskError as exc:
        if (known := _known_cause(exc.cause, what)) is None:
            raise
        raise known from exc
    except ray.exceptions.GetTimeoutError as exc:  # it was finished, and is on its way from another node
        raise StalledError(
            f"{what}: expected its result, got none for {STALL_SECONDS:.0f} s; check the network between the nodes"
        ) from exc
    except ray.exceptions.ObjectLostError as exc:  # with the node that held it
        raise ActorLostError(f"{what}: expected its result, got {_first_line(exc)}") from exc
    except ray.exceptions.ActorUnschedulableError as exc:  # its node died before it was up
        raise ActorLostError(f"an actor: expected its node to run, got {_first_line(exc)}") from exc
    except ray.exceptions.RayActorError as exc:
        if exc.actor_init_failed:
            cause = str(exc).strip().splitlines()[-1]
            raise ClusterError(f"an actor: expected it to start, got {cause}; check its node") from exc
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


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0]
