"""Lanes against a plain model of the order that their module describes; an image's pixels are its row's four bytes."""

import itertools
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.compute.actor import LaneActor
from pipeline.compute.lanes import Lanes, shuffled
from pipeline.errors import ClusterError
from pipeline.plan import LaneAssignment, Plan
from pipeline.target import Target

CPU = torch.device("cpu")
# images, lanes, rows that a lane gives to a step, images of a chunk at most
SHAPES = [
    (100, 1, 16, 1000), (203, 8, 4, 1000), (203, 8, 4, 5), (203, 8, 64, 5), (32, 8, 8, 1000), (5, 8, 2, 1000),
    (1030, 3, 7, 50), (9, 2, 1, 1), (203, 8, 4, 3),  # the last with chunks of fewer images than a lane gives
]  # fmt: skip


def lane_plan(num_images, num_lanes=8, seed=0):
    return Plan(
        target=Target(1, 4, "L"),
        num_classes=3,
        assignment=LaneAssignment(num_images, num_lanes),
        part_sizes=(1,),
        has_training=True,
        batch_size=num_lanes,
        learning_rate=None,
        seed=seed,
        gpus_per_actor=1.0,
    )


def label_of(rows_N):
    return np.asarray(rows_N) * 7 % 3


def fill_lanes(plan, rows_N, lanes=None, scratch=None, device=CPU, store=CPU):
    """Put images where they belong, in pieces that come in any order."""
    lanes = range(plan.num_lanes) if lanes is None else lanes
    made = Lanes(plan, lanes, device, store, scratch)
    rows_N = np.asarray([row for row in rows_N if plan.assignment.lanes(np.array([row]))[0] in lanes])
    for piece_N in np.array_split(np.random.default_rng(0).permutation(rows_N), 5):
        images_ND = torch.from_numpy(piece_N.astype("<i4").view(np.uint8).reshape(-1, 4)).to(device)
        made.put(piece_N, images_ND, torch.from_numpy(label_of(piece_N)).to(device))
    return made


def steps_of(made, lane_rows, num_steps, epoch=1):
    """The rows of every step, by lane, with the labels checked."""
    steps = []
    for images_BD, labels_B, counts in made.batches(epoch, lane_rows, num_steps):
        assert images_BD.device == labels_B.device
        rows_B = images_BD.cpu().numpy().view("<i4").ravel()
        assert (images_BD.dtype, labels_B.dtype) == (torch.uint8, torch.int64)
        assert labels_B.tolist() == label_of(rows_B).tolist()
        steps.append([rows.tolist() for rows in np.split(rows_B, np.cumsum(counts)[:-1])])
    return steps


def order_in_a_loop(plan, rows, lane, epoch, num_chunks):
    """The rows of a lane in the order of an epoch: chunk after chunk, each of every n-th image of the lane."""
    assignment, taken = plan.assignment, []
    own = [row for row in rows if assignment.lanes(np.array([row]))[0] == lane]
    by_index = {int(assignment.offsets(np.array([row]))[0]): row for row in own}
    for chunk in shuffled(num_chunks, plan.seed, epoch, lane, "chunks").tolist():
        inside = [by_index[index] for index in sorted(by_index) if index % num_chunks == chunk]
        taken += [inside[index] for index in shuffled(len(inside), plan.seed, epoch, lane, chunk).tolist()]
    return taken


@pytest.fixture(params=["memory", "disk"])
def scratch(request, tmp_path):
    """Where images are kept: None for memory."""
    return str(tmp_path) if request.param == "disk" else None


@pytest.mark.parametrize(("num_images", "num_lanes", "lane_rows", "chunk_images"), SHAPES)
@pytest.mark.parametrize("has_holes", [False, True])
def test_an_epoch_is_that_of_a_loop(monkeypatch, scratch, num_images, num_lanes, lane_rows, chunk_images, has_holes):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * chunk_images)
    plan = lane_plan(num_images, num_lanes, seed=3)
    rows = [row for row in range(num_images) if not (has_holes and row % 5 in (1, 2))]
    num_steps = -(-max(plan.assignment.lane_sizes) // lane_rows)
    steps = steps_of(fill_lanes(plan, rows, scratch=scratch), lane_rows, num_steps, epoch=2)
    num_chunks = -(-max(plan.assignment.lane_sizes) // chunk_images)
    assert plan.num_chunks == num_chunks
    for lane in range(num_lanes):
        order = order_in_a_loop(plan, rows, lane, 2, num_chunks)
        cuts = [order[step * lane_rows : (step + 1) * lane_rows] for step in range(num_steps)]
        assert [step[lane] for step in steps] == cuts
    assert sorted(itertools.chain(*itertools.chain(*steps))) == rows


@pytest.mark.parametrize("chunk_images", [5, 1000])
def test_a_lane_gives_the_same_whoever_holds_it(monkeypatch, chunk_images):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * chunk_images)
    plan = lane_plan(203)
    together = steps_of(fill_lanes(plan, range(203)), 4, 7)
    for lanes in ([0], [7], [1, 4, 7]):
        alone = steps_of(fill_lanes(plan, range(203), lanes), 4, 7)
        assert alone == [[step[lane] for lane in lanes] for step in together]


def test_lanes_without_images_left_give_none():
    steps = steps_of(fill_lanes(lane_plan(8, 2), [0, 2, 4, 1]), 2, 4)
    assert [[len(rows) for rows in step] for step in steps] == [[2, 1], [1, 0], [0, 0], [0, 0]]


def test_a_lane_of_which_nothing_is_left_gives_nothing(scratch):
    made = Lanes(lane_plan(20, 2), [1], CPU, CPU, scratch)
    for images_BD, labels_B, counts in made.batches(1, 4, 2):
        assert (images_BD.shape, labels_B.shape, counts) == ((0, 4), (0,), [0])


@pytest.mark.parametrize("chunk_images", [10, 1000])
def test_epochs_seeds_and_lanes_have_orders_of_their_own_that_come_again(monkeypatch, chunk_images):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * chunk_images)
    orders = []
    for seed, epoch in itertools.product((0, 1), (1, 2)):
        plan = lane_plan(400, 8, seed)
        first, again = (steps_of(fill_lanes(plan, range(400)), 50, 1, epoch) for _ in range(2))
        assert first == again
        orders += [tuple(row // 8 for row in rows) for rows in first[0]]
    assert len(set(orders)) == 2 * 2 * 8


def test_the_classes_of_a_sorted_listing_are_in_every_chunk_in_their_share(monkeypatch):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * 30)
    plan = lane_plan(960, 8)
    assert plan.num_chunks == 4
    for step in steps_of(fill_lanes(plan, range(960)), 30, 4):  # a chunk of each lane
        for rows in step:
            counts = np.bincount(np.asarray(rows) // 240, minlength=4)
            assert max(abs(counts - 7.5)) <= 1


@pytest.mark.parametrize("num_images", [0, 1, 2, 999])
def test_an_order_is_a_permutation(num_images):
    assert sorted(shuffled(num_images, 0, 1, 0, 0).tolist()) == list(range(num_images))


def test_drawing_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shuffled(50, 0, 1, 0, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="has no /proc")
def test_what_is_on_disk_has_no_name_there(tmp_path):
    made = fill_lanes(lane_plan(1000), range(1000), scratch=str(tmp_path))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert all(line.endswith("(deleted)") for line in mapped)  # so that it goes with the process, however that ends
    assert (len(mapped), list(tmp_path.iterdir())) == (1, [])
    del made
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_one_line_before_any_image_is_there(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(ClusterError, match=r"^--scratch .*: expected 0\.0 GiB"):
            Lanes(lane_plan(2**19), range(8), CPU, CPU, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(ClusterError, match=r"gone: expected .*, got No such file"):
        Lanes(lane_plan(10), range(8), CPU, CPU, str(tmp_path / "gone"))


# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a torch built for it")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kept_in", ["gpu", "memory", "disk"])
@pytest.mark.parametrize("chunk_images", [5, 1000])
def test_an_epoch_on_the_gpu_takes_the_images_of_one_on_the_cpu(monkeypatch, tmp_path, kept_in, chunk_images):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * chunk_images)
    plan, rows = lane_plan(203), [row for row in range(203) if row % 5]
    gpu = torch.device("cuda", 0)
    scratch, store = str(tmp_path) if kept_in == "disk" else None, gpu if kept_in == "gpu" else CPU
    made = fill_lanes(plan, rows, None, scratch, gpu, store)
    assert {images_BD.device for images_BD, *_ in made.batches(2, 4, 7)} == {gpu}
    assert steps_of(made, 4, 7, epoch=2) == steps_of(fill_lanes(plan, rows), 4, 7, epoch=2)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("has_room", [True, False])
def test_an_actor_keeps_images_on_its_gpu_where_there_is_room(monkeypatch, tmp_path, has_room):
    if not has_room:
        monkeypatch.setattr("pipeline.compute.actor._GPU_SHARE", 0.0)
    actor = LaneActor(lane_plan(203), 0, 1, is_on_gpu=True, scratch=str(tmp_path))
    assert actor.describe() == (torch.cuda.get_device_name(0), "gpu" if has_room else "disk")


@pytest.mark.parametrize(("num_images", "num_lanes", "lane_rows", "chunk_images"), SHAPES)
def test_blocks_hold_every_image_once(monkeypatch, scratch, num_images, num_lanes, lane_rows, chunk_images):
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", 4 * chunk_images)
    monkeypatch.setattr("pipeline.compute.lanes._MIN_BLOCK_ROWS", 7)
    monkeypatch.setattr("pipeline.compute.lanes._MAX_BLOCK_ROWS", 7)
    rows = [row for row in range(num_images) if row % 5]
    found = []
    for block in fill_lanes(lane_plan(num_images, num_lanes), rows, scratch=scratch).blocks(CPU):
        assert 0 < len(block.rows_T) <= 7
        assert block.images_TD.numpy().view("<i4").ravel().tolist() == block.rows_T.tolist()
        assert block.labels_T.tolist() == label_of(block.rows_T).tolist()
        found += block.rows_T.tolist()
    assert sorted(found) == rows


def test_blocks_of_large_images_are_of_few():
    plan = replace(lane_plan(40, 1), target=Target(1024, 1024, "RGB"))
    lanes = Lanes(plan, range(1), CPU, CPU, None)
    for row in range(40):
        lanes.put(np.array([row]), torch.zeros(1, 3 * 2**20, dtype=torch.uint8), torch.zeros(1))
    sizes = [len(block.rows_T) for block in lanes.blocks(CPU)]
    assert (sum(sizes), max(sizes) <= 16) == (40, True)


def test_keys_are_found_wherever_they_are_kept(scratch):
    made = Lanes(lane_plan(60), range(8), CPU, CPU, scratch)
    for rows_N in (np.arange(30, 60), np.arange(0, 30, 2)):
        keys = pa.chunked_array([[f"key {row}" for row in rows_N]])
        made.put(rows_N, torch.zeros(len(rows_N), 4, dtype=torch.uint8), torch.zeros(len(rows_N)), keys)
    wanted = np.array([58, 0, 30, 4, 4])
    assert made.keys_of(wanted).tolist() == [f"key {row}" for row in wanted]
