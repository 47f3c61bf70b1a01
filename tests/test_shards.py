import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.decode import Target
from pipeline.errors import ClusterError
from pipeline.files import Location
from pipeline.shards import MAX_PART_IMAGES, MAX_SHARD_BYTES, Fit, Shard, cut_train, cut_valid, fit_cluster, make_plan
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


def fit(resources, num_nodes=1, sizes=(10_000, 5_000), side=28, **options):
    config = Config(**options)
    plan, shards = make_plan(config, make_listing(*sizes), Target(side, side, "L"))
    return fit_cluster(config, plan, shards, resources, num_nodes)


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


@pytest.mark.parametrize(("num_nodes", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_gpus_there_is_an_actor_a_node_up_to_the_lanes(num_nodes, num_actors, device):
    assert fit({"CPU": 40}, num_nodes, device=device) == Fit(num_actors, 0, 160)


@pytest.mark.parametrize(("num_gpus", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_with_gpus_there_is_an_actor_a_gpu_up_to_the_lanes(num_gpus, num_actors, device):
    assert fit({"CPU": 4, "GPU": num_gpus}, 2, device=device) == Fit(num_actors, 1, 16)


def test_gpus_are_left_alone_where_the_cpu_is_asked_for():
    assert fit({"CPU": 4, "GPU": 8}, 2, device="cpu") == Fit(2, 0, 16)


@pytest.mark.parametrize(
    ("num_gpus", "share", "num_actors"),
    [(1, 0.1, 10), (3, 0.1, 30), (1, 0.5, 2), (2, 0.5, 4), (7, 0.5, 14), (1, 0.3, 3), (1, 0.01, 64), (2, 0.25, 8)],
)
def test_actors_share_gpus(num_gpus, share, num_actors):
    got = fit({"CPU": 4, "GPU": num_gpus}, gpus_per_actor=share, lanes=64)
    assert (got.num_actors, got.gpus_per_actor) == (num_actors, share)


@pytest.mark.parametrize(("num_gpus", "share", "num_actors"), [(2, 0.4, 4), (2, 0.6, 2), (3, 0.7, 3), (10, 0.3, 30)])
def test_no_actor_is_split_over_two_gpus(num_gpus, share, num_actors):
    # What is left of one GPU and of another makes no place: Ray would wait for it without end.
    assert fit({"CPU": 4, "GPU": num_gpus}, gpus_per_actor=share, lanes=64).num_actors == num_actors


@pytest.mark.parametrize(("actors", "num_gpus", "share"), [(2, 1, 1), (3, 1, 0.5), (3, 2, 0.6), (1, 0, 1), (1, 0, 0.1)])
def test_cuda_without_gpus_enough_is_refused(actors, num_gpus, share):
    with pytest.raises(ClusterError, match=r"--device cuda: expected .* GPUs in the cluster, got .*; add GPUs"):
        fit({"CPU": 4, "GPU": num_gpus}, device="cuda", actors=actors, gpus_per_actor=share)


def test_the_message_about_gpus_says_how_many():
    with pytest.raises(ClusterError, match=r"^--device cuda: expected 1\.5 GPUs in the cluster, got 0; add GPUs,"):
        fit({"CPU": 4}, device="cuda", actors=3, gpus_per_actor=0.5)
    with pytest.raises(ClusterError, match="expected 1 GPUs in the cluster, got 0;"):
        fit({"CPU": 4}, device="cuda")


@pytest.mark.parametrize("actors", [1, 3, 8])
def test_actors_that_were_asked_for_are_started(actors):
    assert fit({"CPU": 2}, 5, actors=actors) == Fit(actors, 0, 8)
    assert fit({"CPU": 2, "GPU": 8}, 5, actors=actors) == Fit(actors, 1, 8)


def test_auto_takes_the_cpu_where_the_gpus_are_too_few_for_the_actors():
    assert fit({"CPU": 2, "GPU": 2}, actors=3) == Fit(3, 0, 8)


@pytest.mark.parametrize("resources", [{}, {"CPU": 0}, {"CPU": 0.5}, {"GPU": 8}])
def test_a_cluster_without_a_cpu_is_refused(resources):
    with pytest.raises(
        ClusterError, match=r"^the cluster: expected a CPU for decoding, got none; add a node with CPUs"
    ):
        fit(resources)


# 15,000 images of 28x28 are 11.2 MiB.
@pytest.mark.parametrize("num_bytes", [15_000 * 784 - 1, 0])
def test_images_that_no_memory_can_hold_are_refused(num_bytes):
    with pytest.raises(ClusterError, match=r"^the cluster: expected 0\.0 GiB of memory to hold the images, got 0\.0; "):
        fit({"CPU": 2, "memory": num_bytes})


def test_images_that_just_fit_are_taken():
    assert fit({"CPU": 2, "memory": 15_000 * 784}).num_actors == 1


def test_memory_is_said_in_gib():
    # 15,000 images of 4096x4096 are 234.4 GiB.
    with pytest.raises(ClusterError, match=r"expected 234\.4 GiB of memory to hold the images, got 64\.0; give a "):
        fit({"CPU": 2, "memory": 64 * 2**30}, side=4096)


def test_images_on_gpus_are_not_counted_as_memory():
    assert fit({"CPU": 2, "GPU": 1, "memory": 1}).num_actors == 1


def test_without_training_no_training_image_is_held():
    assert fit({"CPU": 2, "memory": 5_000 * 784}, epochs=0).num_actors == 1


def test_without_training_not_all_validation_images_are_held():
    # Each of the three parts is scored as soon as it is complete.
    assert fit({"CPU": 2, "memory": 4_000 * 784}, epochs=0).num_actors == 1


def test_who_gave_epochs_0_is_not_told_to_give_it():
    with pytest.raises(ClusterError, match=r"^the cluster: expected .* of memory") as caught:
        fit({"CPU": 2, "memory": 1}, epochs=0)
    assert "--epochs" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_cpus", "store_mib", "max_in_flight"),
    [(1, 16_000, 4), (2, 16_000, 8), (64, 16_000, 256), (64, 600, 10), (64, 599, 9), (64, 1, 1), (64, 0, 1)],
)
def test_work_in_flight_is_bounded_by_cpus_and_by_a_quarter_of_the_object_store(num_cpus, store_mib, max_in_flight):
    # The largest shard has 15 images of 1 MiB.
    resources = {"CPU": num_cpus, "object_store_memory": store_mib * 2**20}
    assert fit(resources, sizes=(1000, 1000), side=1024, shard_images=15).max_in_flight == max_in_flight


def test_without_a_known_object_store_only_the_cpus_bound():
    assert fit({"CPU": 2.9}).max_in_flight == 8
