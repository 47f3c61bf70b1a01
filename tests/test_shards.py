import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.decode import Target
from pipeline.files import Location
from pipeline.shards import MAX_PART_IMAGES, MAX_SHARD_BYTES, Shard, cut_train, cut_valid, make_plan
from pipeline.sources import Listing

HUGE = 100 * MAX_SHARD_BYTES
# images, bytes of one, images of a shard at most, lanes
CUTS = [
    (0, 784, 2048, 8),
    (1, 784, 2048, 8),
    (5, 784, 2048, 8),
    (7, 784, 1, 8),
    (8, 784, 2048, 8),
    (9, 784, 2048, 8),
    (100, 784, 1, 3),
    (100, 784, 7, 8),
    (100, HUGE, 2048, 8),
    (899, 64, 2048, 8),
    (1000, 784, 2048, 1),
    (1000, MAX_SHARD_BYTES // 10, 2048, 4),
    (1000, 784, 10**9, 1024),
    (12_396, 784, 2048, 8),
    (60_000, 784, 2048, 8),
    (60_000, 12_288, 2048, 7),
    (20_000, 784, 2048, 64),
]


def cut_both(num_images, image_bytes, shard_images, lanes):
    train = cut_train(num_images, image_bytes, shard_images, lanes)
    return train, cut_valid(num_images, image_bytes, shard_images, lanes, len(train))


def group_sizes(shards, num_groups):
    return [sum(len(shard.rows) for shard in shards if shard.group == group) for group in range(num_groups)]


def make_listing(num_train, num_valid):
    def table(num_images):
        return pa.table({"key": [b"key"] * num_images, "label": pa.array([0] * num_images, pa.int32())})

    return Listing(Location("folder", "/"), ("3", "7"), table(num_train), table(num_valid), "valid", {})


def rows_of(shards):
    return [row for shard in shards for row in shard.rows]


@pytest.mark.parametrize("cut", CUTS)
def test_every_row_is_in_exactly_one_shard(cut):
    for shards in cut_both(*cut):
        assert sorted(rows_of(shards)) == list(range(cut[0]))


@pytest.mark.parametrize("cut", CUTS)
def test_no_shard_is_empty_or_above_its_limits(cut):
    num_images, image_bytes, shard_images, lanes = cut
    for shards in cut_both(num_images, image_bytes, shard_images, lanes):
        for shard in shards:
            assert 1 <= len(shard.rows) <= shard_images
            assert len(shard.rows) == 1 or len(shard.rows) * image_bytes <= MAX_SHARD_BYTES


@pytest.mark.parametrize("cut", CUTS)
def test_there_are_no_more_shards_than_the_limits_ask_for(cut):
    num_images, image_bytes, shard_images, lanes = cut
    fewest = -(-num_images // max(1, min(shard_images, MAX_SHARD_BYTES // image_bytes)))
    train, valid = cut_both(*cut)
    assert len(valid) == fewest
    assert len(train) < fewest + lanes


@pytest.mark.parametrize("cut", CUTS)
def test_shards_are_numbered_through_both_splits(cut):
    train, valid = cut_both(*cut)
    assert [shard.index for shard in train + valid] == list(range(len(train) + len(valid)))
    assert {shard.split for shard in train} <= {"train"}
    assert {shard.split for shard in valid} <= {"valid"}


@pytest.mark.parametrize("cut", CUTS)
def test_lanes_hold_the_same_number_of_images_to_within_one_a_shard(cut):
    num_images, image_bytes, shard_images, lanes = cut
    train = cut_train(num_images, image_bytes, shard_images, lanes)
    sizes = group_sizes(train, lanes)
    assert sum(sizes) == num_images
    assert max(sizes) - min(sizes) <= max(1, len(train) / lanes)


@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut[0] >= cut[3]])
def test_no_lane_is_left_empty_when_there_are_images_for_all(cut):
    assert min(group_sizes(cut_train(*cut), cut[3])) > 0


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_training_shards_are_dealt_to_the_lanes_in_turn(lanes):
    shards = cut_train(9_999, 784, 512, lanes)
    assert [shard.group for shard in shards] == list(range(lanes)) * (len(shards) // lanes)


def test_fewer_images_than_lanes_fill_the_first_lanes_with_one_each():
    assert group_sizes(cut_train(5, 784, 2048, 8), 8) == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("class_sizes", [(500, 500), (6131, 6265), (990, 10), (100,) * 30, (4000, 3, 9)])
@pytest.mark.parametrize("lanes", [1, 8])
def test_every_training_shard_of_a_sorted_listing_has_all_classes_in_their_proportion(class_sizes, lanes):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    shards = cut_train(len(labels), 784, 256, lanes)
    for shard in shards:
        counts = np.bincount(labels[shard.rows], minlength=len(class_sizes))
        assert np.all(np.abs(counts - np.array(class_sizes) / len(shards)) < 1)


@pytest.mark.parametrize("cut", CUTS)
def test_offsets_count_the_images_before_in_the_same_lane_or_part(cut):
    for shards in cut_both(*cut):
        before = {}
        for shard in shards:
            assert shard.offset == before.get(shard.group, 0)
            before[shard.group] = shard.offset + len(shard.rows)


@pytest.mark.parametrize("cut", [*CUTS, (799_999, 784, 2048, 8), (2_000_001, 784, 2048, 2)])
def test_parts_are_runs_of_neighbours_without_a_gap(cut):
    shards = cut_valid(*cut, 0)
    assert [shard.rows.start for shard in shards[1:]] == [shard.rows.stop for shard in shards[:-1]]
    parts = [shard.group for shard in shards]
    assert parts == sorted(parts)
    assert set(parts) == set(range(len(set(parts))))


@pytest.mark.parametrize(
    ("num_images", "lanes", "num_parts"),
    [(0, 8, 0), (100, 8, 1), (60_000, 8, 8), (800_000, 8, 8), (800_001, 8, 16), (1_000_000, 1, 10), (60_000, 64, 30)],
)
def test_there_is_a_part_a_lane_and_more_where_they_would_grow_large(num_images, lanes, num_parts):
    assert len({shard.group for shard in cut_valid(num_images, 784, 2048, lanes, 0)}) == num_parts


@pytest.mark.parametrize(("num_images", "lanes"), [(800_000, 8), (1_000_000, 3), (2_999_999, 8), (999_999, 1)])
def test_parts_hold_about_100_000_images_at_most_and_are_alike(num_images, lanes):
    shards = cut_valid(num_images, 784, 2048, lanes, 0)
    sizes = group_sizes(shards, shards[-1].group + 1)
    assert max(sizes) <= MAX_PART_IMAGES + 2048
    assert max(sizes) - min(sizes) <= 2 * 2048


@pytest.mark.parametrize(("num_train", "num_valid"), [(2, 2), (5, 9), (12_396, 2_038)])
def test_the_plan_knows_the_size_of_every_lane_and_part(num_train, num_valid):
    plan, shards = make_plan(Config(lanes=8, shard_images=300), make_listing(num_train, num_valid), Target(28, 28, "L"))
    train = [shard for shard in shards if shard.split == "train"]
    assert list(plan.lane_sizes) == group_sizes(train, 8)
    assert list(plan.part_sizes) == group_sizes(shards[len(train) :], len(plan.part_sizes))
    assert (sum(plan.lane_sizes), sum(plan.part_sizes), min(plan.part_sizes) > 0) == (num_train, num_valid, True)
    assert [shard.index for shard in shards] == list(range(len(shards)))


def test_the_plan_cuts_by_the_bytes_of_the_target():
    listing = make_listing(100, 100)
    small, large = (make_plan(Config(), listing, Target(side, side, "RGB"))[1] for side in (28, 4096))
    assert (len(small), len(large)) == (9, 200)  # of 48 MiB, so that no two fit a shard


def test_the_plan_does_not_depend_on_the_number_of_actors():
    plans = [make_plan(Config(actors=actors), make_listing(100, 50), Target(28, 28, "L")) for actors in (None, 1, 2, 8)]
    assert plans[1:] == plans[:-1]


@pytest.mark.parametrize(("epochs", "has_training"), [(0, False), (1, True)])
def test_the_plan_carries_the_options_of_training(epochs, has_training):
    config = Config(epochs=epochs, batch_size=16, learning_rate=0.5, seed=3, gpus_per_actor=0.25)
    plan, _ = make_plan(config, make_listing(9, 9), Target(2, 3, "L"))
    assert (plan.has_training, plan.batch_size, plan.learning_rate, plan.seed) == (has_training, 16, 0.5, 3)
    assert (plan.target, plan.num_classes, plan.num_lanes, plan.gpus_per_actor) == (Target(2, 3, "L"), 2, 8, 0.25)


def test_images_larger_than_a_shard_make_one_each():
    shards = cut_valid(100_000, HUGE, 2048, 8, 0)
    assert len(shards) == 100_000


@pytest.mark.parametrize("cut", CUTS)
def test_the_same_arguments_give_the_same_shards(cut):
    assert cut_both(*cut) == cut_both(*cut)


def test_a_plan_and_its_shards_cross_a_pickle_unchanged():
    made = make_plan(Config(), make_listing(100, 50), Target(28, 28, "L"))
    assert isinstance(made[1][0], Shard)
    assert pickle.loads(pickle.dumps(made)) == made
