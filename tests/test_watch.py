"""The death of the cluster under a job: soon one line, and nothing left."""

import socket
import subprocess
import sys
import uuid

import psutil
import pytest
from builders import ROOT, end_processes, processes_with

from pipeline.driver import watch
from pipeline.errors import ActorLostError, ClusterError

MARK = "IMAGE_BASELINE_TEST_MARK"


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def wait_for_fault(watching):
    watching._thread.join(0.0)
    while watching._fault is None:
        watching._ended.wait(0.01)


def test_the_death_of_a_process_is_an_error_in_the_place_of_others(sleeper, monkeypatch):
    watching = watch.Watch([sleeper], None)
    watching.check()
    sleeper.kill()
    lost = RuntimeError("what Ray says, before the death was seen")
    with pytest.raises(ClusterError, match=rf"^Ray: expected its process {sleeper.pid} to run .*, got its death; look"):
        watching.replace(lost)
    with pytest.raises(ClusterError, match="got its death"):
        watching.check()
    watching.end(is_left=True)


def test_errors_of_a_job_whose_cluster_is_well_stay_as_they_are(sleeper):
    watching = watch.Watch([sleeper], None)
    watching.replace(ActorLostError("an actor: expected it to live"))
    watching.replace(RuntimeError("another"))
    watching.end(is_left=False)
    watching.check()


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_head_that_does_not_answer_in_time_is_an_error(monkeypatch, is_listening):
    monkeypatch.setattr(watch, "HEAD_SECONDS", 0.0 if not is_listening else 600.0)
    monkeypatch.setattr(watch, "_HEAD_TICK_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
        if not is_listening:
            server.close()
        watching = watch.Watch([], head)
        if is_listening:
            server.accept()[0].close()
            watching.check()
        else:
            wait_for_fault(watching)
            with pytest.raises(ClusterError, match=rf"^--address {head}: expected the cluster's head to answer"):
                watching.check()
        watching.end(is_left=True)


_NEVER_ENDS = """
import subprocess, time
import psutil
from pipeline.driver import watch
watch.GRACE_SECONDS = 0.1
process = subprocess.Popen(["sleep", "600"])
watch.Watch([psutil.Process(process.pid)], None, lambda: print("ended", flush=True))
process.kill()
time.sleep(600)
"""


def test_who_waits_inside_ray_is_ended_after_the_line():
    done = subprocess.run(
        [sys.executable, "-c", _NEVER_ENDS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "ended\n")
    assert done.stderr.startswith("error: Ray: expected its process ")


@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_job_whose_ray_is_killed_ends_with_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    mark = str(uuid.uuid4())
    monkeypatch.setenv(MARK, mark)
    words = ["--address", "local", "--epochs", "100000", "--learning-rate", "0.01", "--out", tmp_path / "out"]
    command = [sys.executable, ROOT / "jobs" / "evaluate.py", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not any("ActorProcess" in each.name() for each in processes_with(MARK, mark)):
                assert process.poll() is None
            [killed] = [each for each in psutil.Process(process.pid).children() if each.name() == name]
            killed.kill()
            stdout, stderr = process.communicate(timeout=60)
            # A worker ends by itself when it sees that its Ray is gone.
            _, left = psutil.wait_procs(processes_with(MARK, mark), timeout=30)
        finally:
            end_processes(processes_with(MARK, mark))
    assert (process.returncode, stdout, left) == (1, "", []), stderr
    assert stderr.splitlines()[-1].startswith(f"error: Ray: expected its process {killed.pid} to run")
