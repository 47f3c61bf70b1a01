"""How many actors a cluster gets, on what, and where they keep their images."""

import pytest
from builders import plan_of

from pipeline.config import Config
from pipeline.driver.allocation import Allocation, NodeCapacity, allocate, choose_storage, max_shards_in_flight
from pipeline.errors import ClusterError

# 15,000 images of 28x28 are 11.2 MiB; with training all are held, of which memory may give four fifths.
HELD = 15_000 * 784


def allocated(resources, num_nodes=1, **options):
    return allocate(Config(**options), resources, num_nodes)


def node(memory_bytes, disk_bytes=0, num_actors=1, address="10.0.0.1"):
    return NodeCapacity(address, memory_bytes, disk_bytes, num_actors)


@pytest.mark.parametrize(
    ("memory_bytes", "disk_bytes", "storage"),
    [(HELD / 0.8, 0, "memory"), (HELD, 2 * HELD, "disk"), (0, HELD / 0.9 + 1, "disk"), (2 * HELD, 2 * HELD, "memory")],
)
def test_images_are_kept_in_memory_where_they_fit_else_on_disk(memory_bytes, disk_bytes, storage):
    assert choose_storage(plan_of()[0], 1, [node(memory_bytes, disk_bytes)]) == storage


def test_one_node_without_the_memory_sends_all_to_disk():
    capacities = [node(HELD, HELD), node(0.1 * HELD, HELD), node(HELD, HELD)]
    assert choose_storage(plan_of()[0], 3, capacities) == "disk"


def test_one_node_with_the_memory_alone_is_refused_where_another_needs_disk():
    capacities = [node(HELD, 0), node(0.1 * HELD, HELD, address="10.0.0.2")]
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.1: expected .* --epochs 0"):
        choose_storage(plan_of()[0], 2, capacities)
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.2: expected "):
        choose_storage(plan_of(epochs=0, neighbors=0)[0], 2, [capacities[0], node(0, HELD, address="10.0.0.2")])


@pytest.mark.parametrize(
    ("num_actors", "num_on_node", "share"), [(2, 1, 1 / 2), (4, 2, 1 / 2), (3, 1, 1 / 2), (3, 3, 1), (8, 1, 1 / 8)]
)
def test_a_node_holds_the_lanes_of_its_actors(num_actors, num_on_node, share):
    plan = plan_of()[0]
    needed = share * HELD / 0.8
    assert choose_storage(plan, num_actors, [node(needed, HELD * 2, num_on_node)]) == "memory"
    assert choose_storage(plan, num_actors, [node(0.999 * needed, HELD * 2, num_on_node)]) == "disk"


def test_images_that_fit_neither_memory_nor_disk_are_refused_with_what_there_is():
    # 15,000 images of 4096x4096 are 234.4 GiB.
    plan = plan_of(side=4096)[0]
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.1: expected 234\.4 GiB .*, got 51\.2 .* 100\.0 on disk"):
        choose_storage(plan, 1, [node(64 * 2**30, 100 * 2**30)])


def test_without_training_nothing_is_kept_on_disk_and_epochs_0_is_not_advised():
    plan = plan_of(epochs=0, neighbors=0)[0]
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.1: expected .* in memory;") as caught:
        choose_storage(plan, 1, [node(0, 2**40)])
    assert "--epochs" not in str(caught.value)


def test_without_training_no_training_image_and_not_all_validation_images_are_held():
    # Each of the three parts is scored as soon as it is complete, and no more than two fill.
    assert choose_storage(plan_of(epochs=0, neighbors=0)[0], 1, [node(2 * 1667 * 784 / 0.8)]) == "memory"


@pytest.mark.parametrize(("num_nodes", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_gpus_there_is_an_actor_a_node_up_to_the_lanes(num_nodes, num_actors, device):
    assert allocated({"CPU": 40}, num_nodes, device=device) == Allocation(num_actors, 0, 40 // num_nodes)


@pytest.mark.parametrize(("num_gpus", "num_actors"), [(1, 1), (3, 3), (8, 8), (20, 8)])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_with_gpus_there_is_an_actor_a_gpu_up_to_the_lanes(num_gpus, num_actors, device):
    num_threads = 2 if num_actors < 3 else 1
    assert allocated({"CPU": 4, "GPU": num_gpus}, 2, device=device) == Allocation(num_actors, 1, num_threads)


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
    # What is left of one GPU and of another serves no actor: Ray would wait for it without end.
    assert allocated({"CPU": 4, "GPU": num_gpus}, gpus_per_actor=share, lanes=64).num_actors == num_actors


@pytest.mark.parametrize(
    ("actors", "num_gpus", "share", "needed"),
    [(2, 1, 1, "2"), (3, 1, 0.5, "1.5"), (3, 0, 0.5, "1.5"), (3, 2, 0.6, "1.8"), (1, 0, 1, "1"), (None, 0, 1, "1"),
     (1, 0, 0.1, "0.1")],
)  # fmt: skip
def test_cuda_without_gpus_enough_is_refused(actors, num_gpus, share, needed):
    with pytest.raises(ClusterError, match=f"^--device cuda: expected {needed} GPUs? in the cluster, got {num_gpus}"):
        allocated({"CPU": 4, "GPU": num_gpus}, device="cuda", actors=actors, gpus_per_actor=share)


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
    with pytest.raises(ClusterError, match=r"^the cluster: expected a CPU .*, got none"):
        allocated(resources)


@pytest.mark.parametrize(
    ("num_cpus", "store_mib", "max_in_flight"),
    [(1, 16_000, 32), (2, 16_000, 32), (9, 16_000, 36), (64, 16_000, 256), (64, 600, 10), (64, 599, 9), (64, 1, 1),
     (64, 0, 1)],
)  # fmt: skip
def test_work_in_flight_is_bounded_by_cpus_and_by_a_quarter_of_the_object_store(num_cpus, store_mib, max_in_flight):
    # The largest shard has 15 images of 1 MiB.
    resources = {"CPU": num_cpus, "object_store_memory": store_mib * 2**20}
    assert max_shards_in_flight(*plan_of((1000, 1000), side=1024, shard_images=15), resources) == max_in_flight


def test_without_a_known_object_store_only_the_cpus_bound():
    assert max_shards_in_flight(*plan_of(), {"CPU": 9.9}) == 36
