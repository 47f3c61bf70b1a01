"""Every wait in the program has a limit: each is held here, or where the table in pipeline/driver/README.md says."""

import ast
import re
import socket
import threading
from concurrent.futures import Future

import pytest
import ray
from builders import ROOT

from pipeline.config import Config
from pipeline.data.files import locate
from pipeline.driver import cluster, probe, scan, waiting
from pipeline.driver.state import Clock
from pipeline.errors import ClusterError, DataError, StalledError

TABLE = (ROOT / "pipeline" / "driver" / "README.md").read_text()
ROWS = re.findall(r"^\| .* \| .* \| `(test_\w+\.py)::(test_\w+)` \|$", TABLE, re.MULTILINE)


def test_the_table_names_tests_that_are_there():
    assert len(ROWS) > 10
    for name, test in ROWS:
        tree = ast.parse((ROOT / "tests" / name).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_a_port_that_accepts_nobody_is_given_up(monkeypatch):
    """A queue of one caller, which is full: others' packets are left unanswered, as by a firewall."""
    monkeypatch.setattr(probe, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        host, port = server.getsockname()
        with (
            socket.create_connection((host, port)),
            pytest.raises(ClusterError, match=r"answers, got timed out; check"),
        ):
            probe.find_cluster(f"{host}:{port}")


def test_a_listing_without_end_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "LISTING_SECONDS", 0.0)
    (tmp_path / "data").mkdir()
    location = locate(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"data: expected its listing within 0 s, got none; look"):
        scan.finish_listing(Future(), location, Config(), [], None, Clock(), lambda progress: None)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_node_that_gives_no_answer_is_an_error_and_the_wait_ends_by_its_caller(monkeypatch):
    monkeypatch.setattr(cluster, "STALL_SECONDS", 0.0)
    nodes = cluster.living_nodes()
    with pytest.raises(ClusterError, match=r"a look: expected an answer from .*, got none; check that node"):
        cluster._ask(nodes, "a look", lambda: None, lambda: threading.Event().wait())

    def end():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cluster._ask(nodes, "a look", end, lambda: None)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_result_that_does_not_arrive_is_an_error(monkeypatch):
    monkeypatch.setattr(waiting, "STALL_SECONDS", 0.1)
    never = ray.remote(num_cpus=0)(lambda: threading.Event().wait()).remote()
    with pytest.raises(StalledError, match="a task: expected its result, got none for"):
        waiting.get_result(never)
    ray.cancel(never, force=True)
