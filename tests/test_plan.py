import itertools
import pickle

import numpy as np
import pytest
from builders import key_listing, plan_of

from pipeline.config import Config
from pipeline.cuts import MAX_PART_BYTES, MAX_PART_IMAGES, Shard, cut_train, cut_valid, part_bounds
from pipeline.plan import MAX_SHARD_BYTES, LaneAssignment, make_plan
from pipeline.target import Target

HUGE = 100 * MAX_SHARD_BYTES
# images, lanes
SIZES = [
    *itertools.product((1, 2, 5, 7, 8, 9, 100, 513, 1000, 12_396, 60_000), (1, 3, 8, 64)),
    *((1_281_167, 8), (2_000_001, 7), (1023, 1024), (1024, 1024)),
]
# row groups of each file, images of a shard at most
FILES = [
    ([(0, 1)], 1), ([(0, 5)], 2048), ([(0, 2048)], 2048), ([(0, 2049)], 2048), ([(0, 60_000)], 2048), ([(0, 7)], 1),
    ([(0, 10, 20, 30, 100)], 20), ([(0, 10, 20, 30, 100)], 7), ([(0, 3), (0, 100), (0, 1)], 50),
    ([(0, 100, 1100, 1200), (0, 1000, 2000)], 1000), ([(0, 1, 2, 3, 4, 5), (0, 4, 8)], 3),
    ([(0, *range(100, 10_001, 100))], 2048), ([(0, 999, 999, 1000)], 600),
]  # fmt: skip
# images, bytes of one, lanes
PARTS = [
    (0, 784, 8), (1, 784, 8), (100, 784, 8), (2048, 784, 8), (2049, 784, 8), (60_000, 784, 8), (60_000, 784, 64),
    (800_001, 784, 8), (1_000_000, 784, 1), (2_999_999, 784, 3), (60_000, 150_528, 8), (100, HUGE, 3),
]  # fmt: skip


def cut_both(row_groups, max_images, bounds=None):
    train = cut_train(row_groups, max_images)
    num_images = sum(groups[-1] for groups in row_groups)
    return train, cut_valid(row_groups, max_images, bounds or [0, num_images], len(train))


def assign_in_a_loop(num_images, num_lanes, run):
    """Lane and index there of every row: runs of neighbours go to the lanes in turn, each to the end of its lane."""
    lanes, indices, sizes = [], [], [0] * num_lanes
    for row in range(num_images):
        lane = row // run % num_lanes
        lanes.append(lane)
        indices.append(sizes[lane])
        sizes[lane] += 1
    return lanes, indices, sizes


# The assignment


@pytest.mark.parametrize(("num_images", "num_lanes"), [sizes for sizes in SIZES if sizes[0] <= 60_000])
def test_lanes_and_indices_are_those_of_a_loop(num_images, num_lanes):
    assignment, rows_N = LaneAssignment(num_images, num_lanes), np.arange(num_images)
    lanes, indices, sizes = assign_in_a_loop(num_images, num_lanes, assignment.run_length)
    assert assignment.lanes(rows_N).tolist() == lanes
    assert assignment.offsets(rows_N).tolist() == indices
    assert assignment.lane_sizes == tuple(sizes)


@pytest.mark.parametrize(("num_images", "num_lanes"), SIZES)
def test_every_index_of_every_lane_is_taken_once(num_images, num_lanes):
    assignment, rows_N = LaneAssignment(num_images, num_lanes), np.arange(num_images)
    starts_L = np.cumsum([0, *assignment.lane_sizes])
    taken_N = starts_L[assignment.lanes(rows_N)] + assignment.offsets(rows_N)
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


def test_the_lane_assignment_and_the_parts_depend_on_the_images_and_the_lanes_alone():
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
    [(0, 784, 8, 0), (100, 784, 8, 1), (60_000, 784, 8, 8), (800_000, 784, 8, 8), (800_001, 784, 8, 16),
     (1_000_000, 784, 1, 10), (60_000, 784, 64, 30), (10_000, 2**20, 8, 40)],  # the last of at most 256 images
)  # fmt: skip
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
    listing = key_listing(100, 100)
    small, large = (make_plan(Config(), listing, Target(side, side, "RGB"), 24)[1] for side in (28, 4096))
    assert (len(small), len(large)) == (2, 200)  # of 48 MiB, so that no two fit a shard


@pytest.mark.parametrize(
    ("num_images", "options", "max_images"),
    [(1000, {}, 2048), (65_535, {}, 2048), (65_536, {}, 4096), (300_000, {}, 16_384),
     (300_000, {"size": "28x28"}, 2048), (2000, {"size": "64x64"}, 64), (10_000, {"size": "64x64"}, 512),
     (300_000, {"shard_images": 100}, 100)],
)  # fmt: skip
def test_shards_grow_with_the_dataset_up_to_a_limit(num_images, options, max_images):
    _, shards = make_plan(Config(**options), key_listing(num_images - 10, 10), Target(28, 28, "L"), 24)
    largest = max(shard.num_images for shard in shards)
    assert min(num_images - 10, max_images // 2 + 1) <= largest <= max_images


@pytest.mark.parametrize(("side", "num_chunks"), [(28, 1), (1024, 16), (4096, 125)])
def test_lanes_have_as_many_chunks_as_8_mib_hold_images(side, num_chunks):
    plan, _ = plan_of((1000, 10), side)  # 125 images a lane
    assert plan.num_chunks == num_chunks


def test_the_plan_does_not_depend_on_the_number_of_actors():
    plans = [plan_of((100, 50), actors=actors) for actors in (None, 1, 2, 8)]
    assert plans[1:] == plans[:-1]


@pytest.mark.parametrize(("side", "num_neighbors", "num_actors", "most"), [(28, 5, 4, 10_699), (28, 1000, 1, 524),
    (28, 5, 100, 4194), (28, 5, 10**6, 1), (4096, 5, 1, 1), (8, 5, 4, 104_857)])  # fmt: skip
def test_requests_are_bounded_by_their_images_and_by_what_is_found(side, num_neighbors, num_actors, most):
    plan = make_plan(Config(neighbors=num_neighbors), key_listing(99_000, 9), Target(side, side, "L"), 24)[0]
    sizes = {2: 2 * most, 5: 0, 7: most // 2 + 1}
    requests = plan.requests("valid", sizes, num_actors)
    assert [request.num_positions for request in requests] == [most, most, most // 2 + 1]
    spans = [span for request in requests for span in request.spans]
    assert all(sum(stop - start for part, start, stop in spans if part == own) == size for own, size in sizes.items())


@pytest.mark.parametrize(("epochs", "has_training"), [(0, False), (1, True)])
def test_the_plan_carries_the_options_of_training(epochs, has_training):
    config = Config(epochs=epochs, batch_size=16, learning_rate=0.5, seed=3, gpus_per_actor=0.25)
    plan, _ = make_plan(config, key_listing(9, 9), Target(2, 3, "L"), 24)
    assert (plan.has_training, plan.batch_size, plan.learning_rate, plan.seed) == (has_training, 16, 0.5, 3)
    assert (plan.target, plan.num_classes, plan.num_lanes, plan.gpus_per_actor) == (Target(2, 3, "L"), 2, 8, 0.25)


def test_a_plan_and_its_shards_cross_a_pickle_unchanged():
    made = plan_of((100, 50))
    assert isinstance(made[1][0], Shard)
    assert pickle.loads(pickle.dumps(made)) == made
