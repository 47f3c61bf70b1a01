"""Ray started here: fast where its insides are as expected, plain where not, and always with the same result."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import uuid

import pytest
import ray
from builders import ROOT, command, end_processes, processes_with
from gate import Gate

from pipeline.driver import local_ray, probe
from pipeline.errors import ClusterError

pytestmark = pytest.mark.ray
MARK = "IMAGE_BASELINE_TEST_MARK"
PLAIN = "Ray is started as it comes, which takes longer and listens on this machine's network"
_RUN = """
import os, runpy, sys
from ray._private import node, services
exec(os.environ["CHANGE"])
sys.argv = ["evaluate.py", *sys.argv[1:]]
runpy.run_path(os.environ["COMMAND"], run_name="__main__")
"""
# Gone from the class, where it is looked for; Ray itself finds it all the same.
_REMOVE = """
original = node.Node.{name}
del node.Node.{name}
def find(self, name):
    return original.__get__(self) if name == "{name}" else object.__getattribute__(self, name)
node.Node.__getattr__ = find
"""
_CHANGE_SIGNATURE = """
original = services.start_ray_process
services.start_ray_process = lambda *arguments, **options: original(*arguments, **options)
"""
_BREAK = """
from pipeline.driver import local_ray
local_ray._GIVEN_ARGUMENTS |= {"--unknown"}
"""


def run(out, change="", **environment):
    words = ["--epochs", "0", "--no-report", "--json", "--address", "local", "--out", out]
    environment = {"PYTHONPATH": str(ROOT), "CHANGE": change, "COMMAND": f"{ROOT}/jobs/evaluate.py", **environment}
    return subprocess.run(
        [sys.executable, "-c", _RUN, *words],
        env={**os.environ, local_ray.PLAIN_VARIABLE: "", **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """That of a job on Ray started fast, which says nothing of it."""
    done = run(tmp_path_factory.mktemp("fast") / "out")
    assert (done.returncode, PLAIN in done.stderr) == (0, False), done.stderr
    return json.loads(done.stdout)["results_sha256"]


def test_all_that_is_replaced_is_in_the_installed_ray(monkeypatch):
    monkeypatch.delenv(local_ray.PLAIN_VARIABLE, raising=False)
    assert local_ray.find_reason_for_plain() is None


@pytest.mark.parametrize(
    ("change", "variable", "reason"),
    [
        ("", "1", "IMAGE_BASELINE_PLAIN_RAY is 1"),
        pytest.param(
            _REMOVE.format(name="start_monitor"),
            "",
            f"Ray {ray.__version__}: expected ray._private.node.Node.start_monitor(self), got none",
            marks=pytest.mark.long,
        ),
        pytest.param(
            _REMOVE.format(name="kill_all_processes"),
            "",
            f"Ray {ray.__version__}: expected ray._private.node.Node.kill_all_processes(self), got none",
            marks=pytest.mark.long,
        ),
        (
            _CHANGE_SIGNATURE,
            "",
            f"Ray {ray.__version__}: expected ray._private.services.start_ray_process(command, process_type), got "
            "(arguments, options)",
        ),
    ],
)
def test_a_plain_ray_gives_the_same_and_says_so_in_one_line(digest, tmp_path, change, variable, reason):
    done = run(tmp_path / "out", change, **{local_ray.PLAIN_VARIABLE: variable})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results_sha256"] == digest
    assert [line for line in done.stderr.splitlines() if PLAIN in line] == [f"{reason}; {PLAIN}"]


def test_what_only_shows_when_ray_starts_is_a_plain_ray_too(digest, tmp_path):
    done = run(tmp_path / "out", _BREAK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results_sha256"] == digest
    [line] = [line for line in done.stderr.splitlines() if PLAIN in line]
    reason = "expected to start with fewer services, got a raylet without --unknown"
    assert line == f"Ray {ray.__version__}: {reason}; {PLAIN}"


_SHOW_REPLACED = """
import pkgutil, sys, ray
from pipeline.driver import connect, local_ray, probe
names = [name.path for replacement in local_ray.REPLACEMENTS for name in replacement.names]
originals = {path: pkgutil.resolve_name(path) for path in names}
def watch(call):
    def watched(*arguments, **options):
        replaced = [path for path, original in originals.items() if pkgutil.resolve_name(path) is not original]
        print(call.__name__, replaced)
        return call(*arguments, **options)
    return watched
ray.init, ray.shutdown = watch(ray.init), watch(ray.shutdown)
with connect.connected(sys.argv[1] or None) as connection:
    print(connection.is_joined)
print([path for path, original in originals.items() if pkgutil.resolve_name(path) is not original])
"""


def show_replaced(address, **environment):
    done = subprocess.run(
        [sys.executable, "-c", _SHOW_REPLACED, address],
        env={**os.environ, "PYTHONPATH": str(ROOT), local_ray.PLAIN_VARIABLE: "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_replaced_while_ray_starts_and_ends_here():
    starts = [name.path for each in local_ray.STARTS for name in each.names]
    ends = [name.path for name in local_ray.END.names]
    assert show_replaced("local") == f"init {starts}\nFalse\nshutdown {ends}\n[]\n"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("told_by", ["--address", "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"])
def test_nothing_is_replaced_where_a_cluster_is_joined(tmp_path, told_by):
    address = ray.get_runtime_context().gcs_address
    folder = tmp_path / "ray"
    folder.mkdir()
    if told_by.endswith("TMPDIR"):
        (folder / "ray_current_cluster").write_text(address)
    where = told_by if told_by == "TMPDIR" else "RAY_TMPDIR"
    environment = {"RAY_ADDRESS": address if told_by == "RAY_ADDRESS" else "", where: str(tmp_path)}
    shown = show_replaced(address if told_by == "--address" else "", **environment)
    assert shown == "init []\nTrue\nshutdown []\n[]\n"


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Where Ray leaves the address of the newest cluster of this machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_a_cluster_that_is_gone_and_that_nobody_asked_for_is_not_waited_for(named, caplog):
    named.write_text("127.0.0.1:9")
    assert probe.find_cluster(None) is None
    assert caplog.messages == [
        f"{named} names a cluster at 127.0.0.1:9 that does not answer ([Errno 111] Connection refused)"
    ]
    with pytest.raises(ClusterError, match=r"--address 127.0.0.1:9: expected a cluster that answers, got .*refused"):
        probe.find_cluster("127.0.0.1:9")


@pytest.mark.parametrize("asked_by", ["--address", "RAY_ADDRESS", "ray_current_cluster"])
def test_it_is_said_which_cluster_is_joined_and_why(named, monkeypatch, caplog, asked_by):
    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level(logging.INFO):
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if asked_by == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        elif asked_by == "ray_current_cluster":
            named.write_text(address)
        assert probe.find_cluster(address if asked_by == "--address" else None) == address
    assert caplog.messages[0].startswith(f"joining the cluster at {address}, by ")
    assert asked_by in caplog.messages[0]
    assert probe.find_cluster("local") is None


@pytest.mark.parametrize("signum", [None, signal.SIGINT, signal.SIGTERM])
def test_a_port_that_never_answers_is_one_line_and_a_signal_ends_the_wait(tmp_path, signum):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = command("--address", address, "--out", tmp_path / "out")
        server.accept()[0].close()  # the port was tried; now an answer is waited for
        with server.accept()[0]:
            if signum is not None:
                process.send_signal(signum)
            stdout, stderr = process.communicate(timeout=60)
    last = stderr.splitlines()[-1]
    if signum is None:
        assert process.returncode == 1
        assert (
            last
            == f"error: --address {address}: expected an answer of a Ray cluster, got none in 20 s; check that it runs"
        )
    else:
        assert (process.returncode, last) == (128 + signum, "interrupted: nothing was evaluated")
    assert stdout == ""


_HOLD = """
import pathlib, time
original, folder = services.start_ray_process, pathlib.Path(os.environ["GATE"])
def start_ray_process(command, process_type, **options):
    started = original(command, process_type, **options)
    if process_type == "raylet":
        (folder / "raylet").touch()
        while not (folder / "raylet.go").exists(): time.sleep(0.01)
    return started
services.start_ray_process = start_ray_process
"""


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_request_to_all_of_the_group_while_a_plain_ray_starts_is_answered(tmp_path, signum):
    mark = str(uuid.uuid4())
    variables = {"CHANGE": _HOLD, "COMMAND": f"{ROOT}/jobs/evaluate.py", "GATE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, "--out", tmp_path / "out", "--address", "local"],
        env={**os.environ, **variables, local_ray.PLAIN_VARIABLE: "1", MARK: mark},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        with Gate(tmp_path).held("raylet", process):
            os.killpg(process.pid, signum)
        stdout, stderr = process.communicate(timeout=60)
        left = processes_with(MARK, mark)
    finally:
        end_processes(processes_with(MARK, mark))
    assert (process.returncode, stdout, left) == (128 + signum, "", []), stderr
    assert stderr.splitlines()[-1] == "interrupted: nothing was evaluated"


def test_every_replacement_says_what_it_saves():
    assert all("%" in each.saves or each.saves.startswith("nothing; ") for each in local_ray.REPLACEMENTS)
