"""The job on hosts that share nothing: `ray up`, `ray submit`, results in a bucket, and workers that are cut off.

A head that does no work and two workers of one CPU, as in cluster.yaml. Its tests follow one another on one cluster.
"""

import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from builders import command
from gate import Gate
from hosts import (
    Host,
    bytes_crossed,
    cut_off,
    isolated_hosts,
    listening,
    own_machines,
    processes_in,
    reconnect,
    service,
    why_not,
)

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.data]

EPOCHS = 3
# More shards than are in flight at a time, so that there is a middle of decoding.
OPTIONS = ("--epochs", EPOCHS, "--shard-images", 5)
# What Ray's processes inherit in place of a profile of the instance; without the last, every process looks for one.
STORAGE = {
    "AWS_ENDPOINT_URL": "http://10.77.0.1:5000",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# Deaths are noticed after seconds instead of a minute; the autoscaler looks every second, and restarts no worker here.
IMPATIENCE = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "3600",
}
FILL_BUCKET = """
import socket, sys, tarfile, time
from concurrent.futures import ThreadPoolExecutor
from pyarrow.fs import FileSystem
while socket.socket().connect_ex(("10.77.0.1", 5000)): time.sleep(0.2)
bucket, _ = FileSystem.from_uri("s3://bench?allow_bucket_creation=true")
bucket.create_dir("bench")
archive = tarfile.open(sys.argv[1])
files = [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]
def put(file):
    with bucket.open_output_stream(f"bench/data/{file[0]}") as stream: stream.write(file[1])
with ThreadPoolExecutor(4) as threads: list(threads.map(put, files))
"""
READ_RESULTS = """
import json, sys
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem
bucket, root = FileSystem.from_uri(sys.argv[1])
run = json.loads(bucket.open_input_stream(f"{root}/run.json").read())
run["num_predictions"] = len(pq.read_table(f"{root}/predictions", filesystem=bucket))
run["rows"] = pq.read_table(f"{root}/metrics.parquet", filesystem=bucket).to_pylist()
print(json.dumps(run))
"""
WAIT_FOR_NODES = """
import ray, sys, time
ray.init("auto", logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + float(sys.argv[2])
while (found := sum(node["Alive"] for node in ray.nodes())) != int(sys.argv[1]):
    assert time.monotonic() < deadline, f"expected {sys.argv[1]} nodes, got {found}"
    time.sleep(0.2)
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and where it is steered from."""

    switch: Host
    head: Host
    workers: list[Host]
    config: dict
    folder: Path

    def start(self, *words):
        """Start a command where the cluster is steered from."""
        return self.start_on(self.switch, *words)

    def start_on(self, host, *words):
        """Start a command on a host; what it prints goes to a file."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        with log.open("w") as file:
            return Job(subprocess.Popen(
                host.command(*words, **STEERING), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            ), log)  # fmt: skip

    def submit(self, out):
        """Start the job by `ray submit`."""
        return self.start(*SUBMIT, "jobs/evaluate.py", "--", *where(out))

    def submit_gated(self, out, moments):
        """Start the job by `ray submit`, to stand still at moments; its gate is on the head."""
        folder = f"/tmp/gate-{out}"
        gate = Gate(self.head.path(folder))
        # Every host sees the project where it is here.
        words = ("tests/evaluate_gated.py", "--", *gate.arguments(moments, folder))
        return self.start(*SUBMIT, *words, *where(out), "--no-report"), gate

    def on(self, host, script, *args):
        """Run a Python script on a host of the cluster, in the environment that its shells have."""
        return host.run("bash", "-c", 'source ~/.bashrc && exec "$@"', "bash", "python", "-c", script, *args)

    def wait_for_nodes(self, number, timeout_s=300):
        """Wait until so many nodes live."""
        waited = self.on(self.head, WAIT_FOR_NODES, number, timeout_s)
        assert waited.returncode == 0, waited.stderr

    def restore(self):
        """Connect all workers again and start Ray there anew, as after a failure of the network."""
        _, start = self.config["worker_start_ray_commands"]
        # Not asked to end: whoever cannot reach the head takes its time for that.
        script = f"source ~/.bashrc; export RAY_HEAD_IP={self.head.address}; ray stop --force; {start}"
        for worker in self.workers:
            reconnect(self.switch, worker)
        starts = [self.start_on(worker, "bash", "-c", script) for worker in self.workers]
        assert [start.end() for start in starts] == [0] * len(starts)
        self.wait_for_nodes(1 + len(self.workers))


STEERING = {**STORAGE, "RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "1"}
SUBMIT = ("ray", "submit", "/tmp/cluster.yaml")


def where(out):
    return ("--data", "s3://bench/data", "--out", f"s3://bench/{out}", *OPTIONS)


@dataclass(frozen=True)
class Job:
    """A command under way."""

    process: subprocess.Popen
    log: Path

    def text(self, _=None):
        return self.log.read_text(errors="replace")

    def end(self, timeout_s=600):
        """Wait for its end and return its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"expected an end within {timeout_s} s, got\n{self.text()[-3000:]}")


def _command_line(pid):
    try:
        return " ".join(psutil.Process(pid).cmdline()[:2])
    except psutil.NoSuchProcess:
        return ""


def _driver_peak_mib(host):
    [driver] = [pid for pid in processes_in({host.namespace("pid")}) if "/evaluate_gated.py" in _command_line(pid)]
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{driver}/status").read_text())[1]) / 1024


@pytest.fixture(scope="module")
def few_images(mnist_sample, tmp_path_factory):
    """Every fiftieth image of the sample, and packed for the bucket, whose server is slow at many small files."""
    folder = tmp_path_factory.mktemp("few")
    packed = tmp_path_factory.mktemp("packed") / "few.tar"
    names = [path.relative_to(mnist_sample).as_posix() for path in sorted(mnist_sample.rglob("*.png"))[::50]]
    subprocess.run(["tar", "-C", mnist_sample, "-cf", packed, *names], check=True)
    subprocess.run(["tar", "-C", folder, "-xf", packed], check=True)
    return folder, packed


@pytest.fixture(scope="module")
def local_run(few_images, tmp_path_factory):
    """What one process on this machine makes of the images."""
    out = tmp_path_factory.mktemp("local") / "out"
    process = command("--data", few_images[0], "--out", out, *OPTIONS, "--actors", 1, "--address", "local", "--json")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


@pytest.fixture(scope="module")
def cluster(few_images, tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with isolated_hosts(3) as (switch, (head, *workers)):
        storage = service(switch, "moto_server", "-H", switch.address, "-p", 5000, log=folder / "storage.log")
        made = Cluster(switch, head, workers, cluster_config(head, workers), folder)
        with storage:
            switch.output("tee", "/tmp/cluster.yaml", stdin=yaml.safe_dump(made.config, sort_keys=False))
            switch.output("ray", "get-auth-token", "--generate")
            up = made.start("ray", "up", "-y", "/tmp/cluster.yaml")
            with few_images[1].open("rb") as file:
                fill = switch.command("python", "-c", FILL_BUCKET, "/dev/stdin", **STORAGE)
                subprocess.run(fill, stdin=file, check=True, timeout=120)
            assert up.end() == 0, up.text()
            made.wait_for_nodes(3)
            yield made


def cluster_config(head, workers):
    """Make the file for machines of one's own as the README says, and put in what is different here."""
    config = own_machines()
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    config["auth"]["ssh_user"] = "root"
    # There is no way out, so nothing can be installed; the environment is there already.
    path = f"{Path(sys.executable).parent}:$PATH"
    settings = {"PATH": path, "PYTHONPATH": "~/image-baseline", "RAY_AUTH_MODE": "token", **STORAGE, **IMPATIENCE}
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    config["setup_commands"] = [f"echo 'export {words}' >> ~/.bashrc"]
    for role, num_cpus in (("head", 0), ("worker", 1)):
        start = f"ray start --num-cpus={num_cpus} --object-store-memory=200000000 "
        lines = config[f"{role}_start_ray_commands"]
        config[f"{role}_start_ray_commands"] = [line.replace("ray start ", start) for line in lines]
    return config


def results(cluster, out):
    return json.loads(cluster.switch.output("python", "-c", READ_RESULTS, f"s3://bench/{out}", **STORAGE))


def test_a_submitted_job_writes_what_a_local_run_writes(cluster, local_run):
    job = cluster.submit("submitted")
    assert job.end() == 0, job.text()
    run = results(cluster, "submitted")
    assert run["results_sha256"] == local_run["results_sha256"]
    assert run["num_predictions"] == run["num_valid"] == local_run["num_valid"]
    assert run["rows"] == local_run["metrics"]


@pytest.mark.long
def test_the_driver_stays_small(cluster, local_run):
    crossed = [sum(bytes_crossed(cluster.switch, cluster.workers))]
    job, gate = cluster.submit_gated("measured", "fed,score")
    with gate.held("fed", job.process, job.text):
        crossed.append(sum(bytes_crossed(cluster.switch, cluster.workers)))
    with gate.held("score", job.process, job.text):
        crossed.append(sum(bytes_crossed(cluster.switch, cluster.workers)))
        driver_peak_mib = _driver_peak_mib(cluster.head)
    assert job.end() == 0, job.text()
    fed, trained = crossed[1] - crossed[0], crossed[2] - crossed[1]
    logger.info("%.0f bytes an image over the workers' links until all are decoded", fed / local_run["num_listed"])
    logger.info("%.0f bytes a step and lane while training", trained / (EPOCHS * 4 * 8))
    logger.info("%.0f MiB is the driver's peak", driver_peak_mib)
    assert driver_peak_mib < 400


def test_a_job_submitted_to_the_dashboard_with_more_actors_writes_the_same(cluster, local_run):
    tunnel = ("ssh", "-o", "StrictHostKeyChecking=no", "-N", "-L", "8265:127.0.0.1:8265", cluster.head.address)
    with service(cluster.switch, *tunnel, log=cluster.folder / "tunnel.log"):
        words = ("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "jobs", "--")
        job = cluster.start(*words, "python", "evaluate.py", *where("job"), "--no-report", "--actors", 3)
        assert job.end() == 0, job.text()
    assert results(cluster, "job")["results_sha256"] == local_run["results_sha256"]


def test_who_has_no_token_is_refused(cluster):
    """By the cluster's own port, to a driver; and by the dashboard, to a request for its jobs."""
    join = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR')"
    joining = cluster.workers[0].run(
        "python",
        "-c",
        join,
        f"{cluster.head.address}:6379",
        RAY_AUTH_MODE="disabled",
        **{"RAY_gcs_rpc_server_reconnect_timeout_s": "1", "RAY_gcs_server_request_timeout_seconds": "2"},
    )
    assert joining.returncode != 0
    assert "auth" in joining.stderr.lower()
    ask = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8265/api/jobs/')"
    asking = cluster.head.run("python", "-c", ask)
    assert "HTTP Error 401" in asking.stderr
    outside = cluster.switch.run("python", "-c", ask.replace("127.0.0.1", cluster.head.address))
    assert "Connection refused" in outside.stderr


def test_only_ray_s_own_daemons_listen_beyond_a_host_s_own_address(cluster):
    found = {host.address: listening(host) for host in (cluster.head, *cluster.workers)}
    logger.info("listening: %s", found)
    for address, sockets in found.items():
        own = ("127.0.0.1:", f"{address}:", f"[::ffff:{address}]:", "[::ffff:127.0.0.1]:")
        assert {name for socket, name in sockets if not socket.startswith(own)} <= {
            "raylet", "gcs_server", "ray::DashboardA", "python3"
        }  # fmt: skip
    assert [socket for socket, _ in found[cluster.head.address] if socket.endswith(":8265")] == ["127.0.0.1:8265"]


def test_a_worker_cut_off_while_decoding_changes_nothing(cluster, local_run):
    job, gate = cluster.submit_gated("decoding", "decode")
    with gate.held("decode", job.process, job.text):
        cut_off(cluster.switch, cluster.workers[0])
        cluster.wait_for_nodes(2)
    assert job.end() == 0, job.text()
    assert results(cluster, "decoding")["results_sha256"] == local_run["results_sha256"]


def test_a_worker_cut_off_while_training_changes_nothing_and_the_driver_stays_small(cluster, local_run):
    cluster.restore()
    job, gate = cluster.submit_gated("training", "train,score")
    with gate.held("train", job.process, job.text):
        # One with an actor, so that it is missed.
        with_actors = [
            worker for worker in cluster.workers if any("ActorProcess" in line for line in _ray_processes(worker))
        ]
        assert with_actors, "expected an actor on a worker, got all on the head, which has no CPU"
        # It is gone at once, and the job goes on before anybody knows.
        cut_off(cluster.switch, with_actors[0])
    with gate.held("score", job.process, job.text):
        driver_peak_mib = _driver_peak_mib(cluster.head)
    assert job.end() == 0, job.text()
    logger.info("%.0f MiB is the driver's peak", driver_peak_mib)
    assert driver_peak_mib < 400
    assert "restarting all actors" in job.text()
    assert results(cluster, "training")["results_sha256"] == local_run["results_sha256"]


def test_too_little_left_to_run_on_is_an_error_within_two_minutes(cluster):
    job, gate = cluster.submit_gated("nothing", "decode")
    with gate.held("decode", job.process, job.text):
        for worker in cluster.workers:
            cut_off(cluster.switch, worker)
    assert job.end(timeout_s=120) == 1
    assert re.search(r"error: .*: expected .*, got .*; .*", job.text())


def test_ray_down_ends_the_cluster(cluster):
    """It stops the head; workers end when they have not heard from it for a while, and their agents a minute later."""
    cluster.restore()
    down = cluster.start("ray", "down", "-y", "/tmp/cluster.yaml")
    assert down.end() == 0, down.text()
    deadline = time.monotonic() + 300
    while left := [line for host in (cluster.head, *cluster.workers) for line in _ray_processes(host)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _ray_processes(host):
    lines = [_command_line(pid) for pid in processes_in({host.namespace("pid")})]
    return [
        line.strip()
        for line in lines
        if re.search(r"ray::(?!DashboardAgent|RuntimeEnvAgent)|/raylet |gcs_server", line)
    ]
