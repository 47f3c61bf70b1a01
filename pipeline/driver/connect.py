"""Connecting to Ray: a cluster that is there, or one started here for this job alone.

Input: an address, or none.
Output: a connection, which is closed again.
Invariant: no process that was started here is left, however the job ends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions

from pipeline.driver import local_ray, session
from pipeline.driver.probe import find_cluster, make_error, probe
from pipeline.driver.watch import Watch, find_raylet
from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 1.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.01
_TICK_SECONDS = 0.05
# Ray itself waits 30 s for its first process, and as long for the second.
_RETRY_SECONDS = 15.0
_WORKER_SECONDS = 45.0
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
    # Else `ray.init` waits for the first workers itself: without limit, deaf to signals, and holding Python's lock.
    "RAY_prestart_worker_first_driver": "0",
}


@dataclass(frozen=True)
class Connection:
    """A connection to Ray.

    Attributes:
        is_joined: Whether this is a cluster that was there before, which may grow, and no Ray started for this job.
        check: To be called several times a second; raises a `ClusterError` once the cluster is gone.
    """

    is_joined: bool
    check: Callable[[], None]


@contextmanager
def connected(address: str | None, on_wait: Callable[[], None] = lambda: None) -> Iterator[Connection]:
    """Connect to Ray, starting it here if there is none, and leave nothing of it behind.

    Where the caller is connected already, that connection is used and kept.

    Args:
        address: Of the cluster, or None.
        on_wait: Called several times a second while Ray is waited for; what it raises ends the wait.

    Yields:
        The connection.

    Raises:
        ClusterError: If there is no cluster at `address`, or Ray cannot be started.
    """
    if ray.is_initialized():
        yield Connection(is_joined=True, check=lambda: None)
        return
    others = set(psutil.Process().children())
    joined, is_fast, watch, folder = find_cluster(address), False, None, ""
    if joined:
        probe(joined, on_wait)
    else:
        folder = _prepare_start()
    try:
        with _terminated_later():
            if joined:
                _join(joined)
            else:
                is_fast = _start(folder, others)
        started = [child for child in psutil.Process().children() if child not in others]
        is_joined = joined is not None and not started  # by what was started, whatever Ray made of the address
        head = str(ray.get_runtime_context().gcs_address) if is_joined else None
        watch = Watch(find_raylet() if is_joined else started, head, partial(_end, others))
        if not is_joined:
            _wait_for_workers(folder, on_wait, watch.check)
        yield Connection(is_joined, watch.check)
    except Exception as exc:
        if watch:
            watch.replace(exc)
        raise
    finally:
        # A second Ctrl-C at this point would leave Ray's processes behind.
        with _blocked({signal.SIGINT, signal.SIGTERM}):
            if watch:
                watch.end(is_left=False)
            _leave_ray(others, is_fast=is_fast)
            if watch:
                watch.end(is_left=True)


def _join(address: str) -> None:
    try:
        _initialize(address)
    except Exception as exc:  # Ray raises plain ones too
        raise make_error(address, exc) from exc


def _prepare_start() -> str:
    """See that Ray can start here, and return the folder for its files."""
    session.check_paths()
    session.check_limits()
    folder, why = session.choose_folder()
    if why:
        logger.info(why)
    return folder


def _start(folder: str, others: set[psutil.Process]) -> bool:
    """Start Ray here, as fast as this version of it allows, and say whether that was fast.

    Args:
        folder: For Ray's files.
        others: Processes that this one had started before.

    Raises:
        ClusterError: If it cannot be started.
    """
    options = {"object_store_memory": session.choose_store_bytes(), "_temp_dir": folder}
    unset = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(unset)
    began = time.monotonic()
    try:
        reason = local_ray.find_reason_for_plain()
        if reason is None:
            try:
                with local_ray.started_fast():
                    _initialize("local", **options)
            except Exception as exc:
                _leave_ray(others, is_fast=False)
                if time.monotonic() - began > _RETRY_SECONDS:  # for a wait in vain, what is replaced is no reason
                    raise
                reason = (
                    f"Ray {ray.__version__}: expected to start with fewer services, got {' '.join(str(exc).split())}"
                )
            else:
                return True
        logger.warning(
            "%s; Ray is started as it comes, which takes longer and listens on this machine's network", reason
        )
        _initialize("local", **options)
        return False
    except Exception as exc:  # Ray raises plain ones too
        raise ClusterError(f"Ray: expected it to start, got {session.explain(folder, exc)}") from exc
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _wait_for_workers(folder: str, *on_wait: Callable[[], None]) -> None:
    """Have as many workers started as Ray's node manager would start by itself, and wait for them.

    Raises:
        ClusterError: If there is not even one in time.
    """
    # One for each CPU, which decodes. Ray starts one more than it is asked for, which becomes an actor; asked for that
    # too, it starts two more, and the job waits for them: 0.3 s.
    start = ray.remote(num_cpus=1)(lambda: None)
    asked = [start.remote() for _ in range(int(ray.cluster_resources().get("CPU", 0)))]
    deadline = time.monotonic() + _WORKER_SECONDS
    done: list[Any] = []
    # For all: who asks for more before they are up has more of them started than there is work for.
    while len(done) < len(asked) and (not done or time.monotonic() < deadline):
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=_TICK_SECONDS)
        for each in on_wait:
            each()
        if not done and time.monotonic() > deadline:
            fault = f"no worker within {_WORKER_SECONDS:.0f} s"
            raise ClusterError(f"Ray: expected it to start a worker, got {session.explain(folder, fault)}")


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


def _leave_ray(others: set[psutil.Process], *, is_fast: bool) -> None:
    """Disconnect, and end whatever this process started except `others`."""
    started = [child for child in psutil.Process().children() if child not in others]
    # Before the raylet dies: its own children are reparented to init then.
    ended = set(_family(started))

    def end_at_once() -> None:
        ended.update(_end(others))

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


def _end(others: set[psutil.Process]) -> list[psutil.Process]:
    """End at once whatever this process started except `others`, and return it."""
    started = [child for child in psutil.Process().children() if child not in others]
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.suspend()  # so that it starts no other while its own are looked for
    ended = _family(started)
    _kill(ended)
    return ended


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
            family += process.children(recursive=True) if _is_living(process) else _find_orphans(process)
    return family


def _find_orphans(raylet: psutil.Process) -> list[psutil.Process]:
    """Find the workers of a node manager that died: init is their parent now, and they notice it late or never."""
    orphans = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.ppid() == 1 and process.environ().get("RAY_RAYLET_PID") == str(raylet.pid):
                orphans.append(process)
    return orphans


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
