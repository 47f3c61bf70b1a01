"""Connecting to Ray: a cluster that is there, or one started here for this job alone.

Input: an address, or none.
Output: a connection, which is closed again.
Invariant: no process that was started here is left, however the job ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions

from pipeline.driver import local_ray
from pipeline.driver.cluster import STORE_SHARE, memory_limit
from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_GRACE_SECONDS = 1.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.01
_PROBE_SECONDS = 20.0
# The least that Ray takes for its object store, and the least share of /dev/shm that it is content with before it
# refuses a store that does not fit.
_LEAST_STORE_BYTES = 80 * 2**20
_SHARED_MEMORY = Path("/dev/shm")
# Read by all of Ray's processes that are started here, unless the user says otherwise.
_SETTINGS = {
    # Only there for the dashboard to show.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # As long as by default, but not a second at a time: the raylet tries its own store before that listens.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
    # While a long listing is read, workers have nothing to do, and would be ended and started again.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # A shard's memory is given back when its actor has it, and not after a second or with a hundred others: to write to
    # memory for the first time takes several times as long as to write to it again.
    "RAY_free_objects_batch_size": "1",
    # Ray's own way to pickle tables loads pyarrow.compute, 20 ms of every process. It is made for slices, with which
    # Arrow's way sends all that they were cut from; what is sent here is none.
    "RAY_DISABLE_CUSTOM_ARROW_DATA_SERIALIZATION": "1",
}


@contextmanager
def connected(address: str | None, on_wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Connect to Ray, starting it here if there is none, and leave nothing of it behind.

    Where the caller is connected already, that connection is used and kept.

    Args:
        address: Of the cluster, or None.
        on_wait: Called several times a second while a cluster's answer is waited for; what it raises ends the wait.

    Yields:
        Whether this is a cluster that was there before, which may grow, and no Ray started for this job.

    Raises:
        ClusterError: If there is no cluster at `address`, or Ray cannot be started.
    """
    if ray.is_initialized():
        yield True
        return
    others = set(psutil.Process().children())
    joined, is_fast = _find_cluster(address), False
    if joined:
        _probe(joined, on_wait)
    try:
        with _terminated_later():
            try:
                if joined:
                    _initialize(joined)
                else:
                    is_fast = _start(others)
            except Exception as exc:  # Ray raises plain ones too
                where = f"--address {joined or address}" if joined or address else "Ray"
                if not joined:
                    raise ClusterError(
                        f"{where}: expected Ray to start, got {exc}; see the newest session's logs, by default "
                        "/tmp/ray/session_latest/logs"
                    ) from exc
                raise ClusterError(f"{where}: expected a cluster that answers, got {exc}; check that it runs") from exc
        # By what was started, whatever Ray made of the address.
        yield joined is not None and all(child in others for child in psutil.Process().children())
    finally:
        # A second Ctrl-C at this point would leave Ray's processes behind.
        with _blocked({signal.SIGINT, signal.SIGTERM}):
            _leave_ray(others, is_fast=is_fast)


def _find_cluster(address: str | None) -> str | None:
    """Find the cluster to join, by the rules that `ray.init` documents, and say which and why; None for none.

    Raises:
        ClusterError: If the one that was asked for does not answer.
    """
    why = "--address"
    if address in (None, "auto"):
        named = os.environ.get("RAY_ADDRESS")
        why = "RAY_ADDRESS" if named else why
        address = named or address
    if address == "local":
        return None
    if address is None:
        latest = Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray", "ray_current_cluster")
        address, why = latest.read_text().strip() if latest.exists() else "", str(latest)
        # A cluster that is gone leaves its name: where nobody asked for it, it is not missed.
        if address and (fault := _try_port(address)):
            logger.warning("%s names a cluster at %s that does not answer (%s)", latest, address, fault)
            return None
    elif fault := _try_port(address):
        raise ClusterError(f"--address {address}: expected a cluster that answers, got {fault}; check that it runs")
    if address:
        logger.info(
            "joining the cluster at %s, by %s; --address local would start Ray for this job alone", address, why
        )
    return address or None


def _try_port(address: str) -> OSError | None:
    """Try a cluster's port: Ray itself would try for minutes, and could not be interrupted. Say what went wrong."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as exc:
            return exc
    return None


def _probe(address: str, on_wait: Callable[[], None]) -> None:
    """Ask a cluster anything, in a process that can be ended: Ray itself would wait for minutes, and hear no signal.

    Raises:
        ClusterError: If there is no answer.
    """
    if ":" not in address or address.startswith("ray://"):
        return
    command = [sys.executable, "-c", local_ray.PROBE, address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + _PROBE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                on_wait()
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
        found = "none"
        if process.returncode and process.stderr:
            found = ([line for line in process.stderr.read().splitlines() if line.strip()] or [found])[-1]
    if process.returncode:
        found = f"none in {_PROBE_SECONDS:.0f} s" if process.returncode < 0 else found
        raise ClusterError(f"--address {address}: expected an answer of a Ray cluster, got {found}; check that it runs")


def _start(others: set[psutil.Process]) -> bool:
    """Start Ray here, as fast as this version of it allows, and say whether that was fast.

    Args:
        others: Processes that this one had started before.
    """
    unset = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        reason = local_ray.find_reason_for_plain()
        if reason is None:
            try:
                with local_ray.started_fast():
                    _initialize("local", object_store_memory=_choose_store_bytes())
            except Exception as exc:  # noqa: BLE001 - whatever another version makes of the replacements
                _leave_ray(others, is_fast=False)
                reason = (
                    f"Ray {ray.__version__}: expected to start with fewer services, got {' '.join(str(exc).split())}"
                )
            else:
                return True
        logger.warning(
            "%s; Ray is started as it comes, which takes longer and listens on this machine's network", reason
        )
        _initialize("local", object_store_memory=_choose_store_bytes())
        return False
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _initialize(address: str | None, **options: Any) -> None:
    with _in_our_own_folder():
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)


@contextmanager
def _in_our_own_folder() -> Iterator[None]:
    """Leave the working folder for that of this package: workers import from it before they import from elsewhere.

    A `numpy.py` there, or a `pipeline.py`, would be taken for ours; and the folder may have been removed.
    """
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        os.chdir(Path(__file__).parents[2])
        yield
    finally:
        os.fchdir(here)
        os.close(here)


@contextmanager
def _terminated_later() -> Iterator[None]:
    """Hold a SIGTERM back until Ray is up, to be answered then as the caller has it answered.

    Ray sets handlers of its own, which raise: in a fork, as when it starts its processes, that is ignored, and the
    request with it. And those processes inherit that they do not hear it: what is asked of a whole process group, this
    process answers; without them, it could not. Who has no handler is better off with Ray's than with the system's.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    if not callable(on_terminate):
        yield
        return
    with _blocked({signal.SIGTERM}):
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():  # whatever Ray, and its compiled code, have set
                signal.signal(signal.SIGTERM, on_terminate)


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    """Have signals wait, for this thread and what it starts."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _choose_store_bytes() -> int | None:
    """Choose the size of the object store; None where Ray knows as well.

    Of control groups Ray sees none but the outermost, and would take a share of memory that this process has not.
    """
    memory = psutil.virtual_memory()
    limit = memory_limit()
    if limit >= memory.total:
        return None
    share = STORE_SHARE * min(limit, memory.available)
    # A store of more than 10 GB that does not fit /dev/shm is an error of Ray's; a smaller one goes to the disk.
    most = max(10e9, 0.95 * shutil.disk_usage(_SHARED_MEMORY).free)
    return max(_LEAST_STORE_BYTES, int(min(share, most)))


def _leave_ray(others: set[psutil.Process], *, is_fast: bool) -> None:
    """Disconnect, and end whatever this process started except `others`."""
    started = [child for child in psutil.Process().children() if child not in others]
    # Before the raylet dies: its own children are reparented to init then.
    ended = set(_family(started))

    def end_at_once() -> None:
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.suspend()  # so that it starts no other while its own are looked for
        ended.update(_family(started))
        _kill(ended)

    # Ray's services do not hear that they are asked to end, see above; and what died by itself can keep Ray waiting.
    kill_timer = threading.Timer(_GRACE_SECONDS, end_at_once)
    kill_timer.start()
    try:
        with local_ray.ended_by(end_at_once) if is_fast else nullcontext():
            ray.shutdown()
    finally:
        kill_timer.cancel()
        kill_timer.join()
        ended.update(_family(started))  # all of it, if Ray's start was interrupted and there was nothing to shut down
        _kill(ended)
    psutil.wait_procs(started, timeout=_END_SECONDS)
    deadline = time.monotonic() + _END_SECONDS
    while any(_is_living(process) for process in ended) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _is_living(process: psutil.Process) -> bool:
    """Say whether a process may yet do anything; a dead one stays listed until its parent, or init, reaps it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _family(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    family = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    return family


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
