"""Single parts of this program (the steps of SGD, the driver), and the loops that they are compared with.

Run from `jobs/` as `python -m benchmarks.parts NAME REQUEST`.

Input: the name of a part and a `Task` as JSON, on the command line. Output: an `Answer` as JSON, the last line on
standard output. Invariant: `phase_s` covers the steps, or the feeding, alone, without start-up, loading and the first
epoch, which warms up.

Axes: N images, B rows of a step, K classes, D values of one image, P parameters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.request import Answer, serve

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import numpy.typing as npt
    import torch

    from pipeline.compute.actor import LaneActor
    from pipeline.compute.exchange import Address
    from pipeline.compute.tiles import Params
    from pipeline.driver.state import Job

_NUM_LANES = 8
_SEED = 0
_SHARD_IMAGES = 2048


@dataclass(frozen=True)
class Task:
    """The work for a part.

    Attributes:
        arrays: Folder of `train_images.npy` (uint8 [N, D]), `train_labels.npy` (int64 [N]) and the same of `valid`.
        batch_size: Images of a step.
        num_epochs: Timed epochs; one more, not timed, comes first.
        num_shards: Shards that the driver hands out.
        num_threads: Threads of an actor, or of the loop that has several; two actors have as many together.
    """

    arrays: str = ""
    batch_size: int = 256
    num_epochs: int = 10
    num_shards: int = 0
    num_threads: int = 1

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read one of the arrays."""
        import numpy as np

        array: npt.NDArray[Any] = np.load(Path(self.arrays, f"{name}.npy"))
        return array


def train_actor(task: Task) -> Answer:
    """Train with one `LaneActor` in this process, without Ray."""
    return _time_epochs(task, _make_actor(task, 0, 1))


def train_two_actors(task: Task) -> Answer:
    """Train with two `LaneActor`s that exchange the gradients of their lanes, each in a process with one thread."""
    import multiprocessing
    import secrets

    from pipeline.compute.exchange import TOKEN_BYTES

    first = _make_actor(task, 0, 2)
    address = first.listen("127.0.0.1")
    token = secrets.token_bytes(TOKEN_BYTES)
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    other = context.Process(target=_run_other, args=(task, address, token, tell))
    other.start()
    try:
        first.join_group(token, address, told.recv())
        return _time_epochs(task, first)
    finally:
        other.join(30)
        other.kill()


def _run_other(task: Task, address: Address, token: bytes, tell: Connection) -> None:
    second = _make_actor(task, 1, 2)
    own_address = second.listen("127.0.0.1")
    tell.send(own_address)
    second.join_group(token, address, own_address)
    second.finish_means()
    second.begin_training()
    for epoch in range(task.num_epochs + 1):
        second.train_epoch(epoch + 1)


def _make_actor(task: Task, rank: int, num_actors: int) -> LaneActor:
    """Make an actor that holds the images of its lanes."""
    import numpy as np
    import pyarrow as pa

    from pipeline.compute.actor import LaneActor
    from pipeline.plan import LaneAssignment, Plan
    from pipeline.target import Target

    images_ND, labels_N = task.load("train_images"), task.load("train_labels")
    target = Target(1, images_ND.shape[1], "L")
    plan = Plan(
        target=target,
        num_classes=int(labels_N.max()) + 1,
        assignment=LaneAssignment(len(labels_N), _NUM_LANES),
        part_sizes=(),
        has_training=True,
        batch_size=task.batch_size,
        learning_rate=None,
        seed=_SEED,
        gpus_per_actor=1.0,
    )
    made = LaneActor(plan, rank, num_actors, is_on_gpu=False, num_threads=max(1, task.num_threads // num_actors))
    lanes_N = plan.assignment.lanes(np.arange(len(labels_N)))
    rows_M = np.flatnonzero(plan.assignment.owners(num_actors)[lanes_N] == rank)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images_ND[rows_M].reshape(-1, 1, target.width))
    labels = pa.array(labels_N[rows_M], pa.int32())
    made.add_train(0, pa.table({"row": pa.array(rows_M, pa.int32()), "class": labels, "image": tensors}))
    return made


def _time_epochs(task: Task, first: LaneActor) -> Answer:

    first.finish_means()
    first.begin_training()
    first.train_epoch(1)
    started = time.perf_counter()
    for epoch in range(task.num_epochs):
        first.train_epoch(epoch + 2)
    seconds = time.perf_counter() - started
    return _answer(task, first.model, seconds)


def torch_loop(task: Task) -> Answer:
    """Train by a plain torch loop over a tensor in memory, in one thread as an actor: same rows, same arithmetic."""
    import torch

    torch.set_num_threads(1)
    return torch_loop_threads(task)


def torch_loop_threads(task: Task) -> Answer:
    """Do the same with so many threads, or torch's default number."""
    import torch

    from pipeline.compute import tiles
    from pipeline.compute.classifiers import sgd_linear

    if task.num_threads > 1:
        torch.set_num_threads(task.num_threads)
    images_ND, labels_N = (torch.from_numpy(task.load(f"train_{name}")) for name in ("images", "labels"))
    num_classes = int(labels_N.max()) + 1
    centre_D, rate = _centre_and_rate(task)
    params_P = sgd_linear.initial_params(num_classes, images_ND.shape[1]).clone()
    mean_P = params_P.clone()
    weights_KD, bias_K = tiles.split_params(params_P, num_classes)
    started, num_steps = 0.0, 0
    for epoch in range(task.num_epochs + 1):
        if epoch == 1:
            started = time.perf_counter()
        losses, num_correct, norms = [], torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
        for rows_B in _epoch_rows(task, epoch + 1, len(labels_N)):
            labels_B = labels_N[rows_B]
            inputs_BD = images_ND[rows_B].float().div_(255).sub_(centre_D)
            logits_BK = torch.addmm(bias_K, inputs_BD, weights_KD.T)
            num_correct += (logits_BK.argmax(1) == labels_B).sum()
            log_probabilities_BK = torch.log_softmax(logits_BK, 1)
            losses.append(-log_probabilities_BK.gather(1, labels_B[:, None]).squeeze(1))
            errors_BK = log_probabilities_BK.exp_()
            errors_BK[torch.arange(len(labels_B)), labels_B] -= 1
            errors_BK /= len(labels_B)
            gradient_KD, gradient_K = errors_BK.T @ inputs_BD, errors_BK.sum(0)
            norms += torch.hypot(torch.linalg.vector_norm(gradient_KD), torch.linalg.vector_norm(gradient_K))
            weights_KD.sub_(gradient_KD, alpha=rate)
            bias_K.sub_(gradient_K, alpha=rate)
            num_steps += 1
            sgd_linear.average(mean_P, params_P, num_steps)
    seconds = time.perf_counter() - started
    model = tiles.Params(num_classes, images_ND.shape[1], mean_P.device)
    model.load(mean_P)
    return _answer(task, model, seconds)


def sklearn_sgd(task: Task) -> Answer:
    """Train scikit-learn's linear model by SGD with log loss, a class against the rest, for as many epochs.

    It has no batches, so that only the time of an epoch can be compared; the model is another one.
    Source: https://scikit-learn.org/stable/modules/sgd.html
    """
    import numpy as np
    from sklearn.linear_model import SGDClassifier

    inputs_ND, labels_N = task.load("train_images").astype(np.float32) / 255, task.load("train_labels")
    model = SGDClassifier(loss="log_loss", max_iter=task.num_epochs, tol=None, random_state=_SEED, n_jobs=-1)
    started = time.perf_counter()
    model.fit(inputs_ND, labels_N)
    seconds = time.perf_counter() - started
    valid_labels_N = task.load("valid_labels")
    num_correct = int((model.predict(task.load("valid_images").astype(np.float32) / 255) == valid_labels_N).sum())
    num_images = len(labels_N) + len(valid_labels_N)
    num_units = task.num_epochs * len(labels_N)
    return Answer(num_images, num_correct, len(valid_labels_N), phase_s=seconds, num_units=num_units)


def _centre_and_rate(task: Task) -> tuple[torch.Tensor, float]:
    import torch

    from pipeline.compute.classifiers import nearest_mean, sgd_linear

    images_ND, labels_N = (torch.from_numpy(task.load(f"train_{name}")) for name in ("images", "labels"))
    sums_KD, counts_K = nearest_mean.class_sums(images_ND, labels_N, int(labels_N.max()) + 1)
    means_KD = nearest_mean.class_means(sums_KD, counts_K)
    found = sgd_linear.find_centre(counts_K, means_KD, nearest_mean.sum_squares(images_ND))
    return found.centre_D.float(), found.safe_rate


def _epoch_rows(task: Task, epoch: int, num_images: int) -> Iterator[torch.Tensor]:
    """Yield the rows of an epoch's steps: those that the lanes of an actor take in the same step."""
    import numpy as np
    import torch

    from pipeline.compute import lanes
    from pipeline.plan import LaneAssignment

    lanes_N = LaneAssignment(num_images, _NUM_LANES).lanes(np.arange(num_images))
    orders = []
    for lane in range(_NUM_LANES):
        rows = torch.from_numpy(np.flatnonzero(lanes_N == lane))
        # A lane of these images is one chunk.
        orders.append(rows[lanes.shuffled(len(rows), _SEED, epoch, lane, 0)])
    lane_rows = task.batch_size // _NUM_LANES
    num_steps = -(-max(map(len, orders)) // lane_rows)
    return (torch.cat([order[step * lane_rows :][:lane_rows] for order in orders]) for step in range(num_steps))


def _answer(task: Task, model: Params, seconds: float) -> Answer:
    """Score the validation images with the trained parameters."""
    import torch

    from pipeline.compute.classifiers import sgd_linear

    images_ND, labels_N = (torch.from_numpy(task.load(f"valid_{name}")) for name in ("images", "labels"))
    centre_D, _ = _centre_and_rate(task)
    found_N = sgd_linear.log_probabilities(model, images_ND, centre_D).argmax(1)
    num_train = len(task.load("train_labels"))
    return Answer(
        num_train + len(labels_N),
        int((found_N == labels_N).sum()),
        len(labels_N),
        checksum=float(torch.linalg.vector_norm(model.stored_S)),
        phase_s=seconds,
        num_units=task.num_epochs * num_train,
    )


def feed_shards(task: Task) -> Answer:
    """Let the driver hand out shards; the decoding task and the actor do nothing.

    All else is as in a job: keys are taken from the listing and sent, and every result is waited for.
    """
    import numpy as np
    import psutil
    import ray

    from pipeline.cuts import Shard
    from pipeline.decoding.digests import Digests
    from pipeline.driver import connect, feed, tasks
    from pipeline.driver.actors import PartRecord, end_actors

    def decode_nothing(
        loader: object, shards: list[list[Any]], *_: object
    ) -> tuple[None, None, Digests, tuple[int, dict[str, int], int, bool]]:
        none = np.zeros(0, np.int64)
        no_images = Digests(none, none, none.astype(np.uint64).reshape(0, 2), none.astype(np.uint32))
        return None, None, no_images, (Shard(*shards[0]).num_images, {}, 0, False)

    class IdleActor:
        def call(self, method: str, *_: object) -> object:
            is_last = method == "finish_means"
            return (np.ones(2, np.int64), np.zeros((2, 784), np.float32)) if is_last else None

        def write_part(self, *_: object, has_report: bool) -> tuple[PartRecord, None]:
            return PartRecord("", {}), None

    # Replaces the real function in this process alone, and is sent to the workers in the same way.
    stand_in: Any = ray.remote(decode_nothing)
    tasks._decode_shards = stand_in
    sizes: list[int] = []

    def measure_memory(done: int) -> None:
        if not sizes and done >= task.num_shards * _SHARD_IMAGES // 4:
            sizes.append(psutil.Process().memory_info().rss)

    with connect.connected("local"):
        idle: Any = ray.remote(num_cpus=0)(IdleActor)
        actors = [idle.remote()]
        # Start the workers before the timed phase.
        warm_up = ray.remote(lambda: None)
        ray.get([warm_up.remote() for _ in range(4 * (os.cpu_count() or 1))])
        ray.get(actors[0].call.remote("warm_up"))
        job = _make_job(task, measure_memory)
        started = time.perf_counter()
        counts = feed.feed(job, actors, [])
        seconds = time.perf_counter() - started
        end_actors(actors)
    return Answer(
        counts.num_decoded.total(),
        phase_s=seconds,
        num_units=task.num_shards,
        quarter_bytes=sizes[0] if sizes else None,
    )


def _make_job(task: Task, on_done: Callable[[int], None]) -> Job:
    """Make a job of `num_shards` shards; all name the same rows, so that the listing stays small."""
    import pyarrow as pa

    from pipeline.config import Config
    from pipeline.cuts import Shard
    from pipeline.data.files import Location
    from pipeline.data.listing import Listing
    from pipeline.driver.allocation import allocate
    from pipeline.driver.state import Clock, Job
    from pipeline.plan import make_plan
    from pipeline.results.writing import Output
    from pipeline.target import Target

    config = Config(epochs=0, neighbors=0)
    keys = pa.array([b"train/class/%09d.png" % number for number in range(_SHARD_IMAGES)], pa.binary())
    rows = pa.table({"key": keys, "label": pa.array([0] * _SHARD_IMAGES, pa.int32())})
    listing = Listing(Location("folder", "/nothing"), ("a", "b"), rows, rows, "valid", {})
    plan, shards = make_plan(config, listing, target := Target(28, 28, "L"), 0)
    last = shards[-1]
    many = [Shard(index, "train", 0, _SHARD_IMAGES, 0, 0) for index in range(task.num_shards - 1)]
    many.append(replace(last, index=task.num_shards - 1))
    allocation = allocate(config, {"CPU": float(os.cpu_count() or 1)}, 1)
    return Job(
        config,
        listing,
        target,
        plan,
        many,
        allocation,
        "memory",
        frozenset(),
        Output("/nothing"),
        None,
        Clock(),
        lambda progress: on_done(progress.done),
    )


PARTS: dict[str, Callable[[Task], Answer]] = {
    "actor": train_actor,
    "actors_2": train_two_actors,
    "torch_loop": torch_loop,
    "torch_loop_threads": torch_loop_threads,
    "sklearn_sgd": sklearn_sgd,
    "driver": feed_shards,
}


if __name__ == "__main__":
    serve(PARTS, Task)
