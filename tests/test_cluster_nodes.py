"""Several nodes of Ray on one machine: the same answer with them as without, also when one of them comes or goes."""

import json
import tempfile

import pytest
from builders import command
from gate import Gate, gated_command
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

# More shards than are in flight at a time, and an epoch between the first and the last: both moments of a gate.
OPTIONS = ("--data", "digits", "--shard-images", 32, "--epochs", 3, "--no-report", "--json")
# A death is noticed after two seconds: nobody listens there any more. Who is only slow has as long as ever to answer.
IMPATIENCE = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What one process makes of the digits, without a cluster."""
    out = tmp_path_factory.mktemp("one") / "out"
    return finish(command(*OPTIONS, "--actors", 1, "--address", "local", "--out", out))["results_sha256"]


@pytest.fixture(scope="module")
def head():
    """A cluster of a head of one CPU."""
    # In a folder of its own, or other tests' jobs would find this cluster; with a short name, for its sockets.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        args = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder, "_system_config": IMPATIENCE}
        made = Cluster(initialize_head=True, head_node_args=args)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def cluster(head):
    """The head and two nodes with a pretended GPU each; what a test adds is gone after it."""
    while len(head.worker_nodes) < 2:
        head.add_node(num_cpus=1, num_gpus=1)
    kept = set(head.worker_nodes)
    yield head
    for node in head.worker_nodes - kept:
        head.remove_node(node, allow_graceful=False)
    head.wait_for_nodes()


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path / "gate")


def finish(process):
    """Wait for the end and return what run.json holds."""
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


def start(cluster, gate, moment, *options):
    """Start the job on the cluster, to stand still at a moment."""
    where = ("--address", cluster.address, "--out", gate.folder.with_name("out"))
    return gated_command(gate, moment, *OPTIONS, *where, *options)


def kill_node(cluster, node):
    """Kill a node, and wait until the cluster knows; until then its actors still work."""
    cluster.remove_node(node, allow_graceful=False)
    cluster.wait_for_nodes(timeout=300)


@pytest.mark.parametrize("moment", ["decode", pytest.param("train", marks=pytest.mark.long)])
def test_a_node_without_an_actor_that_dies_changes_nothing(cluster, reference, gate, moment):
    node = cluster.add_node(num_cpus=2)
    job = start(cluster, gate, moment)
    with gate.held(moment, job):
        kill_node(cluster, node)
    assert finish(job)["results_sha256"] == reference


@pytest.mark.parametrize("moment", [pytest.param("decode", marks=pytest.mark.long), "train"])
def test_an_actor_s_node_that_dies_changes_nothing(cluster, reference, gate, moment):
    job = start(cluster, gate, moment)
    with gate.held(moment, job):
        kill_node(cluster, next(iter(cluster.worker_nodes)))
    run = finish(job)
    assert run["results_sha256"] == reference
    assert run["actors"]["number"] == 1


def test_a_node_that_joins_is_waited_for_and_three_with_gpus_give_what_one_process_gives(cluster, reference, gate):
    job = start(cluster, gate, "nodes", "--min-nodes", 4)
    with gate.held("nodes", job):
        pass  # it waits by itself for the fourth
    cluster.add_node(num_cpus=1, num_gpus=1)
    run = finish(job)
    assert (run["num_nodes"], run["actors"]["number"], run["actors"]["gpus_each"]) == (4, 3, 1)
    assert run["results_sha256"] == reference


def test_a_node_that_joins_late_changes_nothing(cluster, reference, gate):
    job = start(cluster, gate, "decode")
    with gate.held("decode", job):
        cluster.add_node(num_cpus=1, num_gpus=1)
    assert finish(job)["results_sha256"] == reference
