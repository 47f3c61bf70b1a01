"""Several nodes of Ray on one machine: the same answer with them as without, also when one of them comes or goes."""

import json
import os
import re
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest
from conftest import command
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]

# Many small shards and steps, so that there is a middle to be hit.
OPTIONS = ("--data", "digits", "--shard-images", 8, "--epochs", 40, "--json")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What one process makes of the digits, without a cluster."""
    out = tmp_path_factory.mktemp("one") / "out"
    return Job(command(*OPTIONS, "--actors", 1, "--address", "local", "--out", out)).finish()["results_sha256"]


@pytest.fixture
def cluster():
    """A head of one CPU and two nodes with a pretended GPU each."""
    # In a folder of its own, or other tests' jobs would find this cluster; with a short name, for its sockets.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, num_gpus=1)
            yield made
        finally:
            made.shutdown()


@dataclass
class Job:
    """A job under way, and what its terminal has shown so far."""

    process: subprocess.Popen
    shown: bytes = b""

    def read(self, screen):
        """Read the terminal to its end: a job whose terminal nobody reads stands still."""
        with suppress(OSError):  # what reading gives when nobody can write any more
            while chunk := os.read(screen, 4096):
                self.shown += chunk
        os.close(screen)

    def wait_for(self, pattern):
        """Wait until the terminal has shown something; a job that ends before fails the test."""
        while not re.search(pattern, self.shown):
            assert self.process.poll() is None, self.shown
            time.sleep(0.01)

    def finish(self):
        """Wait for the end and return what run.json holds."""
        stdout, _ = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, self.shown
        return json.loads(stdout)


def start(cluster, out, *options):
    """Start the job on the cluster."""
    screen, terminal = os.openpty()
    job = Job(command(*OPTIONS, "--address", cluster.address, "--out", out, *options, stderr=terminal))
    os.close(terminal)
    threading.Thread(target=job.read, args=(screen,), daemon=True).start()
    return job


DECODING = rb"decoded [\d,]+ of 1,797"
TRAINING = rb"epoch \d+ of 40, step [\d,]+ of [\d,]+, loss"


def test_three_nodes_with_gpus_give_what_one_process_gives(cluster, reference, tmp_path):
    cluster.add_node(num_cpus=1, num_gpus=1)
    job = start(cluster, tmp_path / "out")
    run = job.finish()
    assert (run["num_nodes"], run["actors"]["number"], run["actors"]["gpus_each"]) == (4, 3, 1)
    assert run["results_sha256"] == reference


@pytest.mark.parametrize("pattern", [DECODING, TRAINING], ids=["decoding", "training"])
def test_a_node_without_an_actor_that_dies_changes_nothing(cluster, reference, tmp_path, pattern):
    node = cluster.add_node(num_cpus=2)
    job = start(cluster, tmp_path / "out")
    job.wait_for(pattern)
    cluster.remove_node(node, allow_graceful=False)
    assert job.finish()["results_sha256"] == reference


@pytest.mark.parametrize("pattern", [DECODING, TRAINING], ids=["decoding", "training"])
def test_an_actor_s_node_that_dies_changes_nothing(cluster, reference, tmp_path, pattern):
    job = start(cluster, tmp_path / "out")
    job.wait_for(pattern)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    run = job.finish()
    assert run["results_sha256"] == reference
    assert run["actors"]["number"] == 1


def test_a_node_that_joins_is_waited_for_and_used(cluster, reference, tmp_path):
    job = start(cluster, tmp_path / "out", "--min-nodes", 4)
    job.wait_for(rb"waiting for the cluster.s nodes, 3 of 4")
    cluster.add_node(num_cpus=1, num_gpus=1)
    run = job.finish()
    assert (run["num_nodes"], run["results_sha256"]) == (4, reference)


def test_a_node_that_joins_late_changes_nothing(cluster, reference, tmp_path):
    job = start(cluster, tmp_path / "out")
    job.wait_for(DECODING)
    cluster.add_node(num_cpus=1, num_gpus=1)
    assert job.finish()["results_sha256"] == reference
