"""One digest of a job for any number of actors and threads, in memory and on disk, on three kinds of images.

Actors are threads of this process here, with sockets between them; of whole jobs, with `long`, processes of Ray's.
"""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_job import actor_pids, kill_once_in_epoch

from pipeline import Config
from pipeline.compute.actor import LaneActor
from pipeline.compute.exchange import TOKEN_BYTES
from pipeline.driver import cluster, job
from pipeline.plan import _PIECE_BYTES, LaneAssignment, Plan
from pipeline.results.figures import epoch_metric
from pipeline.target import Target

HOST, TOKEN = "127.0.0.1", bytes(TOKEN_BYTES)
NUM_PARTS = 2
# Of the latter, which are more than actors add gradients of, each actor has some.
NUM_CLASSES = {"colours": 120, "many_colours": 260}
ACTORS = [(2, 1), (3, 2), (4, 1), (8, 1)]
THREADS = [(1, 2), (1, 5), (2, 5)]
ONE = (1, 1)


@cache
def colours(num_classes=120, side=24, num_images=600):
    """Noise around a colour picture of noise for each class: images [N, H, W, 3] and labels of both splits."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 150, (num_classes, side, side, 3))
    splits = []
    for number in (num_images // num_classes, 1):
        labels_N = np.repeat(np.arange(num_classes), number)
        noise = random.integers(0, 106, (len(labels_N), side, side, 3))
        splits.append(((classes[labels_N] + noise).astype(np.uint8), labels_N))
    return splits


@cache
def some_of(root, train=60, valid=20):
    """The first files of each class: images [N, H, W, 1] and labels of both splits."""
    splits = []
    for split, number in (("train", train), ("valid", valid)):
        folders = sorted((root / split).iterdir())
        files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())[:number]]
        images = np.stack([np.asarray(Image.open(path))[..., None] for path, _ in files])
        splits.append((images, np.array([label for _, label in files])))
    return splits


def run(splits, num_actors, num_threads, scratch=None):
    """Do a whole job, and return a digest of all that comes of it."""
    (images_NHWC, labels_N), (others_NHWC, other_labels_N) = splits
    _, height, width, num_channels = images_NHWC.shape
    part_size = -(-len(other_labels_N) // NUM_PARTS)
    plan = Plan(
        target=Target(height, width, "RGB" if num_channels == 3 else "L"),
        num_classes=int(labels_N.max()) + 1,
        assignment=LaneAssignment(len(labels_N), 8),
        part_sizes=(part_size, len(other_labels_N) - part_size),
        has_training=True,
        batch_size=64,
        learning_rate=None,
        seed=0,
        gpus_per_actor=1.0,
    )
    started = [
        LaneActor(plan, rank, num_actors, is_on_gpu=False, num_threads=num_threads, scratch=scratch)
        for rank in range(num_actors)
    ]
    addresses = [actor.listen(HOST) for actor in started] if num_actors > 1 else []
    lanes_N = plan.assignment.lanes(np.arange(len(labels_N)))
    owners_N = plan.assignment.owners(num_actors)[lanes_N]

    def act(rank):
        actor, answers = started[rank], []
        if addresses:
            actor.join_group(TOKEN, *addresses)
        rows_N = np.flatnonzero(owners_N == rank)
        actor.add_train(0, make_table(rows_N, images_NHWC, labels_N))
        for part in range(rank, NUM_PARTS, num_actors):
            rows_N = np.arange(part * part_size, min((part + 1) * part_size, len(other_labels_N)))
            actor.add_valid(part, -part * part_size, make_table(rows_N, others_NHWC, other_labels_N))
        answers.append(actor.finish_means())
        actor.begin_training()
        epochs = [actor.train_epoch(epoch) for epoch in (1, 2)]
        answers.append([params for _, params in epochs] if rank == 0 else None)
        return (
            answers,
            [record for record, _ in epochs],
            {part: actor.score_part(part) for part in range(rank, NUM_PARTS, num_actors)},
        )

    with ThreadPoolExecutor(num_actors, initializer=partial(torch.set_num_threads, 1)) as pool:
        of_actors = list(pool.map(act, range(num_actors)))
    for actor in started:
        actor.close()
    history = [
        replace(epoch_metric(list(records)), seconds=0)
        for records in zip(*(each[1] for each in of_actors), strict=True)
    ]
    parts = {part: scored for _, _, own in of_actors for part, scored in own.items()}
    return digest_of((of_actors[0][0], [astuple(row) for row in history], [vars(parts[n]) for n in range(NUM_PARTS)]))


def digest_of(value):
    """Digest arrays, and what holds them, whatever they are views of."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(repr((value.dtype, value.shape)).encode() + value.tobytes()).hexdigest()
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        value = [digest_of(each) for each in value]
    return hashlib.sha256(pickle.dumps(str(value))).hexdigest()


def make_table(rows_N, images_NHWC, labels_N):
    return pa.table(
        {
            "row": pa.array(rows_N, pa.int32()),
            "key": pa.array([str(row) for row in rows_N]),
            "class": pa.array(labels_N[rows_N], pa.int32()),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images_NHWC[rows_N])),
        }
    )


@cache
def expected(kind, root):
    return run(splits_of(kind, root), *ONE)


def splits_of(kind, root):
    return some_of(root) if root else colours(NUM_CLASSES[kind])


@pytest.fixture(
    params=[
        *NUM_CLASSES,
        pytest.param("mnist_sample", marks=pytest.mark.data),
        pytest.param("mnist_png", marks=(pytest.mark.data, pytest.mark.long)),
    ]
)
def dataset(request, one_thread):
    """A kind of images, and the folder of those that are files."""
    return request.param, None if request.param in NUM_CLASSES else request.getfixturevalue(request.param)


@pytest.mark.parametrize(("num_actors", "num_threads"), ACTORS + THREADS)
def test_actors_and_threads_do_not_change_a_bit(dataset, num_actors, num_threads):
    assert run(splits_of(*dataset), num_actors, num_threads) == expected(*dataset)


@pytest.mark.parametrize("num_actors", [1, 3])
def test_images_on_disk_do_not_change_a_bit(dataset, num_actors, tmp_path):
    assert run(splits_of(*dataset), num_actors, 2, str(tmp_path)) == expected(*dataset)


def test_another_image_changes_the_digest(one_thread):
    (images_NHWC, labels_N), valid = colours()
    assert run([(images_NHWC ^ 1, labels_N), valid], *ONE) != expected("colours", None)


@pytest.fixture(scope="module")
def colour_files(tmp_path_factory):
    """The 120 classes as files."""
    return write_files(tmp_path_factory.mktemp("colours"), colours())


def write_files(root, splits):
    for split, (images_NHWC, labels_N) in zip(("train", "valid"), splits, strict=True):
        for row, (image_HWC, label) in enumerate(zip(images_NHWC, labels_N, strict=True)):
            path = Path(root, split, f"{label:03d}", f"{row}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HWC).save(path)
    return root


@pytest.mark.ray
@pytest.mark.data
@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["colour_files", "mnist_sample", "mnist_png"])
def test_whole_jobs_have_one_digest(kind, request, tmp_path, monkeypatch):
    data = str(request.getfixturevalue(kind))

    def evaluate(name, on_progress=lambda progress: None, **options):
        config = {"epochs": 3, "neighbors": 0, "device": "cpu", "report": False, **options}
        return job.evaluate(Config(data=data, out=str(tmp_path / name), **config), on_progress)["results_sha256"]

    first = evaluate("1", actors=1)
    assert [evaluate(str(number), actors=number) for number in (2, 3, 4, 8)] == [first] * 4
    on_progress, killed = kill_once_in_epoch(2, actor_pids)
    assert evaluate("killed", on_progress, actors=2) == first
    assert killed
    monkeypatch.setattr(cluster, "memory_limit", lambda: 10_000.0)
    assert evaluate("disk", actors=2, scratch=str(tmp_path)) == first


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_parameters_that_come_in_pieces_are_those_of_their_epoch(tmp_path):
    data = write_files(tmp_path / "data", colours(330, num_images=660))
    assert _PIECE_BYTES < 8 * 330 * 24 * 24 * 3

    def evaluate(name, on_progress=lambda progress: None):
        config = Config(data=str(data), out=str(tmp_path / name), epochs=4, neighbors=0, device="cpu", report=False)
        return job.evaluate(config, on_progress)["results_sha256"]

    on_progress, killed = kill_once_in_epoch(3, actor_pids)
    assert evaluate("killed", on_progress) == evaluate("whole")
    assert killed
