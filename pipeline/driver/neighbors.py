"""The search for the nearest training images, as the driver sees it: who asks, who answers, how far it is.

Input: actors that hold all images. Output: `NeighborCounts`, and the actors then know the neighbors of their images.
Invariant: images and what is found for them go from actor to actor, a bounded number of requests at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.driver.actors import Actor, follow
from pipeline.driver.state import Job, NeighborCounts
from pipeline.driver.waiting import Ref, get_result, wait_all, wait_some
from pipeline.errors import counted
from pipeline.plan import Request
from pipeline.tree import lane_ranges

# While actors search for the images of one, those of the next are on their way.
_REQUESTS_IN_FLIGHT = 2


def find(job: Job, actors: list[Actor]) -> NeighborCounts:
    """Have the neighbors of all validation images found and, if the plan says so, of all training images.

    Raises:
        ActorLostError: If an actor dies.
    """
    job.clock.enter("neighbors")
    plan, num_actors = job.plan, len(actors)
    requests: list[tuple[int, Request]] = []
    for rank in range(num_actors):
        parts = {part: size for part, size in enumerate(plan.part_sizes) if part % num_actors == rank}
        requests += [(rank, request) for request in plan.requests("valid", parts, num_actors)]
        if plan.searches_train:
            num_lanes = len(lane_ranges(plan.num_lanes, num_actors)[rank])
            sizes = {0: num_lanes * plan.lane_positions}
            requests += [(rank, request) for request in plan.requests("train", sizes, num_actors)]
    num_images = sum(plan.part_sizes) + (plan.assignment.num_images if plan.searches_train else 0)
    num_pending = _ask(job, actors, requests, num_images)
    doubtful: list[tuple[int, Request]] = []
    for rank, number in enumerate(num_pending):
        doubtful += [(rank, request) for request in plan.requests("doubtful", {0: number}, num_actors)]
    _ask(job, actors, doubtful, sum(num_pending))

    def show() -> bool:
        return job.show("neighbors", 1, 1)

    histograms = [actor.call.remote("neighborhood.histogram") for actor in actors]
    median = _median(sum(wait_all(histograms, "distances", show)))
    split_names = job.config.train_split, job.listing.valid_split
    answers = [
        actor.call.options(num_returns=3).remote("neighborhood.judge", job.listing.classes, split_names, median)
        for actor in actors
    ]
    counts = wait_all([answer[2] for answer in answers], "near-duplicates and doubtful labels", show)
    num_twins, num_same = (sum(numbers) for numbers in zip(*counts, strict=True))
    near, suspects = [answer[0] for answer in answers], [answer[1] for answer in answers]
    return NeighborCounts(median, num_twins, num_same, near, suspects)


def _ask(job: Job, actors: list[Actor], requests: list[tuple[int, Request]], num_images: int) -> list[int]:
    """Have requests, each of one actor, answered by all; return for each actor what it said at last."""
    num_pending = [0] * len(actors)
    waiting: dict[Ref, tuple[int, Request]] = {}
    left = list(reversed(requests))
    num_done, total = 0, sum(request.num_positions for _, request in requests)
    # Lanes have room for more training images than they hold.
    look = follow(actors[0], lambda _: job.show("neighbors", num_done * num_images // total, num_images))
    while left or waiting:
        while left and len(waiting) < _REQUESTS_IN_FLIGHT:
            rank, request = left.pop()
            queries = actors[rank].call.remote("neighborhood.queries", request)
            answers = [actor.call.remote("neighborhood.search", queries) for actor in actors]
            waiting[actors[rank].call.remote("neighborhood.take", request, *answers)] = rank, request
        for done in wait_some(list(waiting), f"the neighbors of images in {counted(len(waiting), 'block')}", look):
            rank, request = waiting.pop(done)
            num_pending[rank] = max(num_pending[rank], get_result(done))
            num_done += request.num_positions
    return num_pending


def _median(counts_B: npt.NDArray[np.int64]) -> float:
    """Return the upper end of the bin that the median falls into, of a histogram from 0 to 1."""
    return int(np.searchsorted(counts_B.cumsum(), counts_B.sum() / 2) + 1) / len(counts_B)
