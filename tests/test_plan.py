import itertools
import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.data.files import Location
from pipeline.data.listing import Listing
from pipeline.driver.allocation import Allocation, NodeCapacity, allocate, choose_storage, max_shards_in_flight
from pipeline.errors import ClusterError
from pipeline.plan import (
    MAX_PART_BYTES,
    MAX_PART_IMAGES,
    MAX_SHARD_BYTES,
    LaneAssignment,
    Shard,
    Target,
    cut_train,
    cut_valid,
    make_plan,
    part_bounds,
)

HUGE = 100 * MAX_SHARD_BYTES
# images, lanes
SIZES = [
    *itertools.product((1, 2, 5, 7, 8, 9, 100, 513, 1000, 12_396, 60_000), (1, 3, 8, 64)),
    (1_281_167, 8),
    (2_000_001, 7),
    (1023, 1024),
    (1024, 1024),
]
# row groups of each file, images of a shard at most
FILES = [
    ([(0, 1)], 1),
    ([(0, 5)], 2048),
    ([(0, 2048)], 2048),
    ([(0, 2049)], 2048),
    ([(0, 60_000)], 2048),
    ([(0, 7)], 1),
    ([(0, 10, 20, 30, 100)], 20),
    ([(0, 10, 20, 30, 100)], 7),
    ([(0, 3), (0, 100), (0, 1)], 50),
    ([(0, 100, 1100, 1200), (0, 1000, 2000)], 1000),
    ([(0, 1, 2, 3, 4, 5), (0, 4, 8)], 3),
    ([(0, *range(100, 10_001, 100))], 2048),
    ([(0, 999, 999, 1000)], 600),
]
# images, bytes of one, lanes
PARTS = [
    (0, 784, 8),
    (1, 784, 8),
    (100, 784, 8),
    (2048, 784, 8),
    (2049, 784, 8),
    (60_000, 784, 8),
    (60_000, 784, 64),
    (800_001, 784, 8),
    (1_000_000, 784, 1),
    (2_999_999, 784, 3),
    (60_000, 150_528, 8),
    (100, HUGE, 3),
]


def cut_both(row_groups, max_images, bounds=None):
    train = cut_train(row_groups, max_images)
    num_images = sum(groups[-1] for groups in row_groups)
    return train, cut_valid(row_groups, max_images, bounds or [0, num_images], len(train))


def make_listing(num_train, num_valid):
    def table(num_images):
        return pa.table({"key": [b"key"] * num_images, "label": pa.array([0] * num_images, pa.int32())})

    return Listing(Location("folder", "/"), ("3", "7"), table(num_train), table(num_valid), "valid", {})


def plan_of(sizes=(10_000, 5_000), side=28, **options):
    return make_plan(Config(**options), make_listing(*sizes), Target(side, side, "L"), 24)


def allocated(resources, num_nodes=1, **options):
    return allocate(Config(**options), resources, num_nodes)


def assign_in_a_loop(num_images, num_lanes, run):
    """Lane and place of every row: runs of neighbours go to the lanes in turn, each to the end of its lane."""
    lanes, places, sizes = [], [], [0] * num_lanes
    for row in range(num_images):
        lane = row // run % num_lanes
        lanes.append(lane)
        places.append(sizes[lane])
        sizes[lane] += 1
    return lanes, places, sizes


# The assignment


@pytest.mark.parametrize(("num_images", "num_lanes"), [sizes for sizes in SIZES if sizes[0] <= 60_000])
def test_lanes_and_places_are_those_of_a_loop(num_images, num_lanes):
    assignment, rows_N = LaneAssignment(num_images, num_lanes), np.arange(num_images)
    lanes, places, sizes = assign_in_a_loop(num_images, num_lanes, assignment.run_length)
    assert assignment.lanes(rows_N).tolist() == lanes
    assert assignment.places(rows_N).tolist() == places
    assert assignment.lane_sizes == tuple(sizes)


@pytest.mark.parametrize(("num_images", "num_lanes"), SIZES)
def test_every_place_of_every_lane_is_taken_once(num_images, num_lanes):
    assignment, rows_N = LaneAssignment(num_images, num_lanes), np.arange(num_images)
    starts_L = np.cumsum([0, *assignment.lane_sizes])
    taken_N = starts_L[assignment.lanes(rows_N)] + assignment.places(rows_N)
    assert np.array_equal(np.sort(taken_N), rows_N)


@pytest.mark.parametrize(("num_images", "num_lanes"), SIZES)
def test_lanes_are_alike_to_within_a_run_and_a_64th(num_images, num_lanes):
    assignment = LaneAssignment(num_images, num_lanes)
    difference = max(assignment.lane_sizes) - min(assignment.lane_sizes)
    assert difference <= assignment.run_length
    assert difference <= max(1, num_images / num_lanes / 64)


@pytest.mark.parametrize(("num_images", "num_lanes"), [sizes for sizes in SIZES if sizes[0] >= sizes[1]])
def test_no_lane_is_left_empty_when_there_are_images_for_all(num_images, num_lanes):
    assert min(LaneAssignment(num_images, num_lanes).lane_sizes) > 0


def test_few_images_go_to_the_lanes_one_by_one_and_many_in_runs():
    assert [LaneAssignment(num_images, 8).run_length for num_images in (5, 1000, 1024, 12_396, 2**20, 2**30)] == [
        1, 1, 2, 24, 2048, 2048
    ]  # fmt: skip
    assert LaneAssignment(5, 8).lane_sizes == (1, 1, 1, 1, 1, 0, 0, 0)


@pytest.mark.parametrize("num_lanes", [1, 8])
@pytest.mark.parametrize("class_sizes", [(500, 500), (6131, 6265), (990, 10), (100,) * 30, (4000, 3, 9)])
def test_every_lane_of_a_sorted_listing_has_its_share_of_every_class(class_sizes, num_lanes):
    labels_N = np.repeat(np.arange(len(class_sizes)), class_sizes)
    assignment = LaneAssignment(len(labels_N), num_lanes)
    lanes_N = assignment.lanes(np.arange(len(labels_N)))
    for lane in range(num_lanes):
        counts = np.bincount(labels_N[lanes_N == lane], minlength=len(class_sizes))
        assert np.all(np.abs(counts - np.array(class_sizes) / num_lanes) <= assignment.run_length)


def test_the_deal_and_the_parts_depend_on_the_images_and_the_lanes_alone():
    options = [{}, {"shard_images": 1}, {"shard_images": 77}, {"actors": 3}, {"batch_size": 8}, {"epochs": 0}]
    plans = [plan_of((12_396, 4_000), **each)[0] for each in options]
    assert len({(plan.assignment, plan.part_sizes) for plan in plans}) == 1


# The cut


@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_every_row_is_in_one_shard_in_order(row_groups, max_images):
    num_images = sum(groups[-1] for groups in row_groups)
    for shards in cut_both(row_groups, max_images):
        assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(num_images))
        assert sum(shard.num_images for shard in shards) == num_images


@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_no_shard_is_empty_too_large_or_of_two_files(row_groups, max_images):
    starts = np.cumsum([0, *(groups[-1] for groups in row_groups)])
    for shard in itertools.chain(*cut_both(row_groups, max_images)):
        assert 1 <= shard.num_images <= max_images
        assert starts[shard.file] <= shard.start < shard.stop <= starts[shard.file + 1]
        assert shard.first == shard.start - starts[shard.file]


@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_row_groups_that_fit_a_shard_are_not_cut(row_groups, max_images):
    for shard in cut_train(row_groups, max_images):
        for low, high in itertools.pairwise(row_groups[shard.file]):
            first, last = shard.first, shard.first + shard.num_images
            is_whole = first <= low and high <= last
            assert is_whole or high <= first or last <= low or high - low > max_images


@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_small_row_groups_are_packed(row_groups, max_images):
    shards = cut_train(row_groups, max_images)
    fits = {file for file, groups in enumerate(row_groups) if max(np.diff(groups)) <= max_images}
    for left, right in itertools.pairwise(shards):
        if left.file == right.file and left.file in fits:
            groups = row_groups[left.file]
            following = next(row for row in groups if row > right.first)
            assert following - left.first > max_images


@pytest.mark.parametrize(
    ("row_groups", "shards"),
    [
        ((0, 10, 20, 30), [(0, 20), (20, 30)]),
        ((0, 30), [(0, 15), (15, 30)]),  # two alike, not 20 and 10
        ((0, 5, 50), [(0, 5), (5, 20), (20, 35), (35, 50)]),
        ((0, 19, 21, 40), [(0, 19), (19, 21), (21, 40)]),
    ],
)
def test_a_file_is_cut_between_row_groups_and_else_in_equal_pieces(row_groups, shards):
    assert [(shard.start, shard.stop) for shard in cut_train([row_groups], 20)] == shards


@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_shards_are_numbered_through_both_splits(row_groups, max_images):
    train, valid = cut_both(row_groups, max_images)
    assert [shard.index for shard in train + valid] == list(range(len(train) + len(valid)))
    assert {shard.split for shard in train} <= {"train"}
    assert {shard.split for shard in valid} <= {"valid"}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize(("row_groups", "max_images"), FILES)
def test_no_shard_is_of_two_parts_and_its_offset_counts_from_its_parts_first_row(row_groups, max_images, num_parts):
    num_images = sum(groups[-1] for groups in row_groups)
    num_parts = min(num_parts, num_images)
    bounds = [part * num_images // num_parts for part in range(num_parts + 1)]
    _, shards = cut_both(row_groups, max_images, bounds)
    for shard in shards:
        assert bounds[shard.part] <= shard.start < shard.stop <= bounds[shard.part + 1]
        assert shard.offset == shard.start - bounds[shard.part]
    assert {shard.part for shard in shards} == set(range(num_parts))


# Parts


@pytest.mark.parametrize(("num_images", "image_bytes", "lanes"), PARTS)
def test_parts_have_all_rows_and_stay_below_their_limits(num_images, image_bytes, lanes):
    sizes = np.diff(part_bounds(num_images, image_bytes, lanes))
    assert sizes.sum() == num_images
    assert all(1 <= size <= MAX_PART_IMAGES for size in sizes)
    assert all(size == 1 or size * image_bytes <= MAX_PART_BYTES for size in sizes)
    assert len(sizes) == 0 or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("num_images", "image_bytes", "lanes", "num_parts"),
    [
        (0, 784, 8, 0),
        (100, 784, 8, 1),
        (60_000, 784, 8, 8),
        (800_000, 784, 8, 8),
        (800_001, 784, 8, 16),
        (1_000_000, 784, 1, 10),
        (60_000, 784, 64, 30),
        (10_000, 2**20, 8, 40),  # of at most 256 images
    ],
)
def test_there_is_a_part_a_lane_and_more_where_they_would_grow_large(num_images, image_bytes, lanes, num_parts):
    assert len(part_bounds(num_images, image_bytes, lanes)) - 1 == num_parts


# The plan


@pytest.mark.parametrize(("num_train", "num_valid"), [(2, 2), (5, 9), (12_396, 2_038)])
def test_the_plan_knows_the_size_of_every_part(num_train, num_valid):
    plan, shards = plan_of((num_train, num_valid), shard_images=300)
    valid = [shard for shard in shards if shard.split == "valid"]
    sizes = [sum(shard.num_images for shard in valid if shard.part == part) for part in range(len(plan.part_sizes))]
    assert list(plan.part_sizes) == sizes
    assert (sum(plan.assignment.lane_sizes), sum(sizes), min(sizes) > 0) == (num_train, num_valid, True)
    assert [shard.index for shard in shards] == list(range(len(shards)))


def test_the_plan_cuts_by_the_bytes_of_the_target():
    listing = make_listing(100, 100)
    small, large = (make_plan(Config(), listing, Target(side, side, "RGB"), 24)[1] for side in (28, 4096))
    assert (len(small), len(large)) == (2, 200)  # of 48 MiB, so that no two fit a shard


@pytest.mark.parametrize(
    ("num_images", "options", "max_images"),
    [
        (1000, {}, 2048),
        (65_535, {}, 2048),
        (65_536, {}, 4096),
        (300_000, {}, 16_384),
        (300_000, {"size": "28x28"}, 2048),
        (300_000, {"shard_images": 100}, 100),
    ],
)
def test_shards_grow_with_the_dataset_up_to_a_limit(num_images, options, max_images):
    _, shards = make_plan(Config(**options), make_listing(num_images - 10, 10), Target(28, 28, "L"), 24)
    largest = max(shard.num_images for shard in shards)
    assert min(num_images - 10, max_images // 2 + 1) <= largest <= max_images


@pytest.mark.parametrize(("side", "num_chunks"), [(28, 1), (1024, 16), (4096, 125)])
def test_lanes_have_as_many_chunks_as_8_mib_hold_images(side, num_chunks):
    plan, _ = plan_of((1000, 10), side)  # 125 images a lane
    assert plan.num_chunks == num_chunks


def test_the_plan_does_not_depend_on_the_number_of_actors():
    plans = [plan_of((100, 50), actors=actors) for actors in (None, 1, 2, 8)]
    assert plans[1:] == plans[:-1]


@pytest.mark.parametrize(("epochs", "has_training"), [(0, False), (1, True)])
def test_the_plan_carries_the_options_of_training(epochs, has_training):
    config = Config(epochs=epochs, batch_size=16, learning_rate=0.5, seed=3, gpus_per_actor=0.25)
    plan, _ = make_plan(config, make_listing(9, 9), Target(2, 3, "L"), 24)
    assert (plan.has_training, plan.batch_size, plan.learning_rate, plan.seed) == (has_training, 16, 0.5, 3)
    assert (plan.target, plan.num_classes, plan.num_lanes, plan.gpus_per_actor) == (Target(2, 3, "L"), 2, 8, 0.25)


def test_a_plan_and_its_shards_cross_a_pickle_unchanged():
    made = plan_of((100, 50))
    assert isinstance(made[1][0], Shard)
    assert pickle.loads(pickle.dumps(made)) == made


# NodeCapacity for images


def room(memory_bytes, disk_bytes=0, num_actors=1, address="10.0.0.1"):
    return NodeCapacity(address, memory_bytes, disk_bytes, num_actors)


# 15,000 images of 28x28 are 11.2 MiB; with training all are held, of which memory may give four fifths.
HELD = 15_000 * 784


@pytest.mark.parametrize(
    ("memory_bytes", "disk_bytes", "storage"),
    [(HELD / 0.8, 0, "memory"), (HELD, 2 * HELD, "disk"), (0, HELD / 0.9 + 1, "disk"), (2 * HELD, 2 * HELD, "memory")],
)
def test_images_are_kept_in_memory_where_they_fit_else_on_disk(memory_bytes, disk_bytes, storage):
    assert choose_storage(plan_of()[0], 1, [room(memory_bytes, disk_bytes)]) == storage


def test_one_node_without_the_memory_sends_all_to_disk():
    capacities = [room(HELD, HELD), room(0.1 * HELD, HELD), room(HELD, HELD)]
    assert choose_storage(plan_of()[0], 3, capacities) == "disk"


def test_one_node_with_the_memory_alone_is_refused_where_another_needs_disk():
    capacities = [room(HELD, 0), room(0.1 * HELD, HELD, address="10.0.0.2")]
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.1: expected .*; give --epochs 0, .* or another --scratch$"):
        choose_storage(plan_of()[0], 2, capacities)
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.2: expected "):
        choose_storage(plan_of(epochs=0)[0], 2, [capacities[0], room(0, HELD, address="10.0.0.2")])


@pytest.mark.parametrize(
    ("num_actors", "num_on_node", "share"), [(2, 1, 1 / 2), (4, 2, 1 / 2), (3, 1, 3 / 8), (3, 3, 1), (8, 1, 1 / 8)]
)
def test_a_node_holds_the_lanes_of_its_actors(num_actors, num_on_node, share):
    plan = plan_of()[0]
    needed = share * HELD / 0.8
    assert choose_storage(plan, num_actors, [room(needed, HELD * 2, num_on_node)]) == "memory"
    assert choose_storage(plan, num_actors, [room(0.999 * needed, HELD * 2, num_on_node)]) == "disk"


def test_images_that_fit_neither_memory_nor_disk_are_refused_with_what_there_is():
    # 15,000 images of 4096x4096 are 234.4 GiB.
    plan = plan_of(side=4096)[0]
    with pytest.raises(
        ClusterError,
        match=r"^10\.0\.0\.1: expected 234\.4 GiB for the images, got 51\.2 in memory or 100\.0 on disk; give --epochs "
        r"0, a smaller --size, more nodes, or another --scratch$",
    ):
        choose_storage(plan, 1, [room(64 * 2**30, 100 * 2**30)])


def test_without_training_nothing_is_kept_on_disk_and_who_gave_epochs_0_is_not_told_to():
    plan = plan_of(epochs=0)[0]
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.1: expected .* in memory; give a smaller --size, ") as caught:
        choose_storage(plan, 1, [room(0, 2**40)])
    assert "--epochs" not in str(caught.value)


def test_without_training_no_training_image_and_not_all_validation_images_are_held():
    # Each of the three parts is scored as soon as it is complete, and no more than two fill.
    assert choose_storage(plan_of(epochs=0)[0], 1, [room(2 * 1667 * 784 / 0.8)]) == "memory"


# The cluster


@pytest.mark.parametrize(("num_nodes", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_gpus_there_is_an_actor_a_node_up_to_the_lanes(num_nodes, num_actors, device):
    assert allocated({"CPU": 40}, num_nodes, device=device) == Allocation(num_actors, 0, 40 // num_nodes)


@pytest.mark.parametrize(("num_gpus", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_with_gpus_there_is_an_actor_a_gpu_up_to_the_lanes(num_gpus, num_actors, device):
    assert allocated({"CPU": 4, "GPU": num_gpus}, 2, device=device) == Allocation(
        num_actors, 1, 2 if num_actors < 3 else 1
    )


def test_gpus_are_left_alone_where_the_cpu_is_asked_for():
    assert allocated({"CPU": 4, "GPU": 8}, 2, device="cpu") == Allocation(2, 0, 2)


@pytest.mark.parametrize(
    ("num_gpus", "share", "num_actors"),
    [(1, 0.1, 10), (3, 0.1, 30), (1, 0.5, 2), (2, 0.5, 4), (7, 0.5, 14), (1, 0.3, 3), (1, 0.01, 64), (2, 0.25, 8)],
)
def test_actors_share_gpus(num_gpus, share, num_actors):
    got = allocated({"CPU": 4, "GPU": num_gpus}, gpus_per_actor=share, lanes=64)
    assert (got.num_actors, got.gpus_per_actor) == (num_actors, share)


@pytest.mark.parametrize(("num_gpus", "share", "num_actors"), [(2, 0.4, 4), (2, 0.6, 2), (3, 0.7, 3), (10, 0.3, 30)])
def test_no_actor_is_split_over_two_gpus(num_gpus, share, num_actors):
    # What is left of one GPU and of another makes no place: Ray would wait for it without end.
    assert allocated({"CPU": 4, "GPU": num_gpus}, gpus_per_actor=share, lanes=64).num_actors == num_actors


@pytest.mark.parametrize(("actors", "num_gpus", "share"), [(2, 1, 1), (3, 1, 0.5), (3, 2, 0.6), (1, 0, 1), (1, 0, 0.1)])
def test_cuda_without_gpus_enough_is_refused(actors, num_gpus, share):
    with pytest.raises(ClusterError, match=r"--device cuda: expected .* GPUs in the cluster, got .*; add GPUs"):
        allocated({"CPU": 4, "GPU": num_gpus}, device="cuda", actors=actors, gpus_per_actor=share)


def test_the_message_about_gpus_says_how_many():
    with pytest.raises(ClusterError, match=r"^--device cuda: expected 1\.5 GPUs in the cluster, got 0; add GPUs,"):
        allocated({"CPU": 4}, device="cuda", actors=3, gpus_per_actor=0.5)
    with pytest.raises(ClusterError, match="expected 1 GPUs in the cluster, got 0;"):
        allocated({"CPU": 4}, device="cuda")


@pytest.mark.parametrize("actors", [1, 3, 8])
def test_actors_that_were_asked_for_are_started(actors):
    assert allocated({"CPU": 2}, 5, actors=actors) == Allocation(actors, 0, 1)
    assert allocated({"CPU": 2, "GPU": 8}, 5, actors=actors) == Allocation(actors, 1, 1)


@pytest.mark.parametrize(
    ("num_cpus", "num_nodes", "actors", "num_threads"),
    [(16, 1, None, 16), (16, 1, 4, 4), (16, 1, 3, 5), (2, 1, 8, 1), (64, 4, 1, 16), (64, 4, 8, 8)],
)
def test_an_actor_s_threads_are_its_share_of_a_node(num_cpus, num_nodes, actors, num_threads):
    assert allocated({"CPU": num_cpus}, num_nodes, actors=actors).threads_per_actor == num_threads


def test_auto_takes_the_cpu_where_the_gpus_are_too_few_for_the_actors():
    assert allocated({"CPU": 2, "GPU": 2}, actors=3) == Allocation(3, 0, 1)


@pytest.mark.parametrize("resources", [{}, {"CPU": 0}, {"CPU": 0.5}, {"GPU": 8}])
def test_a_cluster_without_a_cpu_is_refused(resources):
    with pytest.raises(
        ClusterError, match=r"^the cluster: expected a CPU for decoding, got none; add a node with CPUs"
    ):
        allocated(resources)


@pytest.mark.parametrize(
    ("num_cpus", "store_mib", "max_in_flight"),
    [
        (1, 16_000, 32),
        (2, 16_000, 32),
        (9, 16_000, 36),
        (64, 16_000, 256),
        (64, 600, 10),
        (64, 599, 9),
        (64, 1, 1),
        (64, 0, 1),
    ],
)
def test_work_in_flight_is_bounded_by_cpus_and_by_a_quarter_of_the_object_store(num_cpus, store_mib, max_in_flight):
    # The largest shard has 15 images of 1 MiB.
    resources = {"CPU": num_cpus, "object_store_memory": store_mib * 2**20}
    assert max_shards_in_flight(*plan_of((1000, 1000), side=1024, shard_images=15), resources) == max_in_flight


def test_without_a_known_object_store_only_the_cpus_bound():
    assert max_shards_in_flight(*plan_of(), {"CPU": 9.9}) == 36
