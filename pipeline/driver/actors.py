"""The actors' processes: started, given their job, asked and ended.

Input: an allocation and a plan. Output: handles of actors and references to their answers. Invariant: the driver never
imports what an actor computes with; an actor does its calls in the order in which they are sent.
"""

from __future__ import annotations

import gc
import importlib
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.compute.exchange import TOKEN_BYTES, Address
from pipeline.driver.allocation import Allocation
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.waiting import Ref, get_result, is_finished
from pipeline.errors import ActorLostError, ModelError
from pipeline.model import Probed, Wanted
from pipeline.plan import Plan
from pipeline.results import tables

if TYPE_CHECKING:
    from pipeline.data.score_join import GivenRows
    from pipeline.results.mistakes import Noted
    from pipeline.results.writing import Output

Actor = Any  # a handle of ActorProcess


@dataclass(frozen=True)
class PartRecord:
    """A written prediction file.

    Attributes:
        digest: Of its content.
        confusions: By classifier, as in `ScoredPart`.
        num_twins_correct: By classifier, how many of the images with a twin in training are predicted right.
        num_in_top: By classifier with scores, of many classes, how many images have theirs among the best scores.
    """

    digest: str
    confusions: dict[str, npt.NDArray[np.int32]]
    num_twins_correct: dict[str, int] = field(default_factory=dict)
    num_in_top: dict[str, int] = field(default_factory=dict)


class ActorProcess:
    """A `LaneActor` in a process of Ray's.

    It is imported only there, so that the driver and the decoding workers never load torch; and it is joined with
    the writing of results here, because each would else have to know of the other.
    """

    def __init__(self) -> None:
        leave_pandas_out()
        # While the listing is read, and not when the first images are here. The objects of an import stay: looking
        # through them for garbage takes time.
        gc.disable()
        importlib.import_module("torch")
        gc.freeze()
        gc.enable()
        self._program: Any = None
        self._fault: ModelError | None = None

    def load_model(self, content: npt.NDArray[np.uint8], *, is_on_gpu: bool) -> None:
        """Load the user's own model from the bytes of its file."""
        from pipeline.compute.actor import choose_device
        from pipeline.compute.program import load_program

        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(1)  # as when it is run
        self._device = choose_device(is_on_gpu=is_on_gpu)
        try:
            self._program = load_program(content.tobytes(), self._device)
        except ModelError as exc:  # which nobody waits for; it is raised when the model is asked for
            self._fault = exc

    def probe_model(self, wanted: Wanted) -> Probed:
        """Look at the model that was loaded."""
        from pipeline.compute.program import probe

        if self._fault is not None:
            raise self._fault
        return probe(self._program, wanted, self._device)

    def begin(self, plan: Plan, rank: int, allocation: Allocation, scratch: str | None) -> tuple[str, str]:
        """Become one of a job's actors; name its device and where it keeps its images."""
        from pipeline.compute.actor import LaneActor

        if self._fault is not None:
            raise self._fault
        on_gpu, threads = allocation.gpus_per_actor > 0, min(allocation.threads_per_actor, os.cpu_count() or 1)
        self._plan = plan
        self._actor = LaneActor(
            plan,
            rank,
            allocation.num_actors,
            is_on_gpu=on_gpu,
            num_threads=threads,
            scratch=scratch,
            program=self._program,
        )
        return self._actor.describe()

    def call(self, method: str, *args: object) -> Any:
        """Call a method of the actor, or, as `neighborhood.search`, of what it consists of."""
        return attrgetter(method)(self._actor)(*args)

    def listen(self) -> Address:
        """Wait for the other actors' calls on this node's own address, and return where they reach this one."""
        return self._actor.listen(str(ray.util.get_node_ip_address()))

    def write_part(
        self,
        part: int,
        classes: tuple[str, ...],
        output: Output,
        median: float | None,
        *given: GivenRows,
        has_report: bool,
    ) -> tuple[PartRecord, dict[str, Noted] | None]:
        """Score a part and write its prediction file.

        Args:
            part: Its number.
            classes: Names of the K classes.
            output: Where it goes.
            median: That of the nearest distances, if there are any.
            given: Rows among which are those of its images, where they were predicted elsewhere.
            has_report: Whether a page will show mistakes.

        Returns:
            What came of it, and what the page may show: another object, so that it stays where it is until then.
        """
        # Here, because decoding workers load this module too.
        from pipeline.compute.classifiers import used_classifiers
        from pipeline.results import mistakes, writing
        from pipeline.results.finished import with_other

        scored, plan = self._actor.score_part(part, median, given), self._plan
        scores: dict[str, Any] = dict(scored.scores)
        used = used_classifiers(plan.num_neighbors, has_training=plan.has_training, model=plan.model, given=plan.given)
        for each in used:
            if each.has_scores and scores[each.name].shape[1] > plan.max_scores:
                scores[each.name] = tables.choose_top(
                    scores[each.name], scored.labels, are_distances=each.has_distances
                )
        names = (*classes, *(plan.model.extra_classes if plan.model else ()))
        table = tables.predictions_table(
            names, scored.keys, scored.labels, scored.predictions, scores, scored.neighbors
        )
        digest = writing.write_table(output, f"{writing.PREDICTIONS}/part-{part:05d}", table)
        record = PartRecord(digest, scored.confusions, scored.num_twins_correct, scored.num_in_top)
        # While the scores are in memory: to read them again takes longer than all else of the page.
        return record, mistakes.note(table.to_batches(), with_other(names)) if has_report else None


def start_actors(allocation: Allocation, node_ids: Sequence[str], model: Ref | None = None) -> list[Actor]:
    """Start the actors' processes, which import torch; nothing is waited for.

    Args:
        allocation: How the job fits the cluster.
        node_ids: Of the nodes with CPUs, over which actors without a GPU are spread; GPUs are where they are.
        model: A reference to the bytes of the user's own model, uint8, which they load; what is wrong with it shows
            when they are asked for anything of it.
    """
    if not node_ids:
        raise ActorLostError("the actors: expected a node with CPUs, got none")
    # The group "watch" answers while an epoch runs.
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": allocation.gpus_per_actor, "concurrency_groups": {"watch": 1}}
    actor_class: Any = ray.remote(**options)(ActorProcess)
    actors = [
        actor_class.options(
            scheduling_strategy="DEFAULT"
            if allocation.gpus_per_actor > 0
            else NodeAffinitySchedulingStrategy(node_ids[rank % len(node_ids)], soft=False)
        ).remote()
        for rank in range(allocation.num_actors)
    ]
    if model is not None:
        for actor in actors:
            actor.load_model.remote(model, is_on_gpu=allocation.gpus_per_actor > 0)
    return actors


def begin_actors(actors: Sequence[Actor], plan: Plan, allocation: Allocation, scratch: str | None) -> list[Ref]:
    """Give actors their job and connect them.

    Nothing is waited for: an actor does its calls in their order, so shards can be sent before it is up.

    Args:
        actors: As `start_actors` returns them.
        plan: The job's plan.
        allocation: As they were started by.
        scratch: The folder for images that memory cannot hold; None where it can.

    Returns:
        References to the names of their devices, followed by those of their connecting.
    """
    begun = [actor.begin.remote(plan, rank, allocation, scratch) for rank, actor in enumerate(actors)]
    if allocation.num_actors > 1:
        addresses = [actor.listen.remote() for actor in actors]
        token = secrets.token_bytes(TOKEN_BYTES)
        begun += [actor.call.remote("join_group", token, *addresses) for actor in actors]
    return begun


def follow(actor: Actor, show: Callable[[int], object]) -> Callable[[], bool]:
    """Return a function that shows how much of its work an actor has done, and says whether it goes on.

    Args:
        actor: It is asked beside what it is doing.
        show: Called with the number of steps of an epoch, or of blocks searched, that are done.
    """

    def ask() -> Ref:
        return actor.call.options(concurrency_group="watch").remote("count_steps")

    asked, last_count = ask(), 0

    def look() -> bool:
        nonlocal asked, last_count
        count = last_count
        if is_finished(asked):
            count = get_result(asked)
            asked = ask()
        show(count)
        has_moved, last_count = count != last_count, count
        return has_moved

    return look


def end_actors(actors: Sequence[Actor]) -> None:
    """End actors at once; those that are ended already stay so."""
    for actor in actors:
        ray.kill(actor)
