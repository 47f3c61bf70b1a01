"""Connecting to Ray: a cluster that is there, or one started here with what a job needs of it and nothing else.

What enters: an address, or none. What leaves: a connection that is left again. Always: nothing that was started here
stays, however the job ends.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import ray._private.node
import ray._private.ray_constants
import ray._private.services
import ray._private.utils
import ray.exceptions

from pipeline.driver.cluster import STORE_SHARE, memory_limit
from pipeline.errors import ClusterError

_CONNECT_SECONDS = 5.0
_GRACE_SECONDS = 3.0
_END_SECONDS = 10.0
# The least that Ray takes for its object store.
_LEAST_STORE_BYTES = 80 * 2**20
_REGISTER_SECONDS = 30.0
_POLL_SECONDS = 0.01
_SHORT_SECONDS = 0.1
# Ray's node manager wants two agents that live as long as it does, and to be told where they listen: these do nothing
# until their input, its end of a pipe, is closed, whatever arguments they get; and nobody asks them anything.
_NO_AGENT = "/bin/sh -c 'read _'"
_NO_AGENTS = {
    "--dashboard_agent_command": _NO_AGENT,
    "--runtime_env_agent_command": _NO_AGENT,
    "--metrics-agent-port": "1",
    "--metrics_export_port": "1",
    "--runtime_env_agent_port": "1",
    "--dashboard_agent_listen_port": "1",
}
# Read by all of Ray's processes, unless the user says otherwise.
_SETTINGS = {
    # Only there for the dashboard to show.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # As long as by default, but not a second at a time: Ray's node manager knocks at its own store before that listens.
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
def connected(address: str | None) -> Iterator[bool]:
    """Connect to Ray, starting it here if there is none, and leave nothing of it behind.

    Where the caller is connected already, that connection is used and kept.

    Yields:
        Whether this is a cluster that was there before, which may grow, and no Ray started for this job.

    Raises:
        ClusterError: If there is no cluster at `address`, or Ray cannot be started.
    """
    if ray.is_initialized():
        yield True
        return
    signals = {signal.SIGINT, signal.SIGTERM}
    is_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    # Ray sets handlers of its own, which raise: in a fork, as when it starts its processes, that is ignored, and the
    # request with it. Who has none is better off with Ray's than with the system's.
    ray_utils: Any = ray._private.utils
    kept_handlers = [(ray_utils, "set_sigterm_handler", _do_nothing)] if callable(on_terminate) else []
    others = set(psutil.Process().children())
    _check_address(address)
    # Ray loads this when the first object is sent; while its services start there is time for it.
    threading.Thread(target=importlib.import_module, args=("ray._common.pydantic_compat",), daemon=True).start()
    try:
        try:
            with _replaced(kept_handlers), _fewer_services():
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as exc:
            where = f"--address {address}" if address else "Ray"
            raise ClusterError(f"{where}: expected a cluster that answers, got {exc}; check that it runs") from exc
        finally:
            if is_main:  # whatever Ray's compiled code has set
                signal.signal(signal.SIGTERM, on_terminate)
        yield not any(child not in others for child in psutil.Process().children())
    finally:
        # A second Ctrl-C at this point would leave Ray's processes behind.
        if is_main:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        _leave_ray(others)
        if is_main:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _check_address(address: str | None) -> None:
    """Knock at a cluster's door: Ray itself would try for minutes, and could not be interrupted."""
    address = address or os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as exc:
        raise ClusterError(
            f"--address {address}: expected a cluster that answers, got {exc}; check that it runs"
        ) from exc


@contextmanager
def _fewer_services() -> Iterator[None]:
    """Have a Ray that is started here listen on this machine alone, and do without what no job on one asks for.

    The dashboard (which starts even where it is said not to be included), its agent and that for runtime environments,
    the autoscaler's monitor and the forwarder of logs are Python processes of their own, for some of which Ray waits;
    and for what it does need it looks too seldom. Without all that, Ray's start takes about a fifth of
    the time. None of it has a public option in Ray 2.60.
    """
    node_module: Any = ray._private.node
    node = node_module.Node
    services: Any = ray._private.services
    raylet: Any = ray._raylet
    wait_for_node, start_process = services.get_node, services.start_ray_process
    wait_for_port = node_module.wait_for_persisted_port
    store_bytes = max(_LEAST_STORE_BYTES, int(STORE_SHARE * memory_limit()))

    def start_no_dashboard(self: Any, **_: object) -> None:
        self._webui_url = None

    def get_node(address: str, node_id: str) -> Any:
        client = raylet.GcsClient(address=address)
        deadline = time.monotonic() + _REGISTER_SECONDS
        while not client.get_all_node_info():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray: expected it to start within {_REGISTER_SECONDS:.0f} s, got no node; see raylet.err and "
                    "raylet.out in the newest session's logs, by default /tmp/ray/session_latest/logs"
                )
            time.sleep(_POLL_SECONDS)
        return wait_for_node(address, node_id)

    def wait_for_persisted_port(folder: str, node_id: str, name: str, timeout_ms: int) -> Any:
        _wait_for_file(Path(folder, f"{name}_{node_id}"), timeout_ms / 1000)
        return wait_for_port(folder, node_id, name, timeout_ms=timeout_ms)

    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == ray._private.ray_constants.PROCESS_TYPE_RAYLET:
            given = dict(argument.partition("=")[::2] for argument in command)
            # One for each CPU, which decodes, and one for an actor, which Ray would only start when all are wanted.
            num_workers = str(int(given["--num_prestart_python_workers"]) + 1)
            workers = dict.fromkeys(("--num_prestart_python_workers", "--maximum_startup_concurrency"), num_workers)
            changed = _NO_AGENTS | workers
            kept = [argument for argument in command if argument.partition("=")[0] not in changed]
            command = [*kept, *(f"{name}={value}" for name, value in changed.items())]
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)  # here, as a cluster that is only joined has a dashboard
        return start_process(command, process_type, **options)

    replacements: list[tuple[Any, str, Any]] = [
        (node, "start_api_server", start_no_dashboard),
        (node, "start_monitor", _do_nothing),
        (node, "start_log_monitor", _do_nothing),
        (services, "get_node", get_node),
        (node_module, "wait_for_persisted_port", wait_for_persisted_port),
        (node_module, "time", SimpleNamespace(**{**vars(time), "sleep": _sleep_little})),
        (services, "start_ray_process", start_ray_process),
        # What is asked of a whole process group, as to end, this process answers; without its services, it could not.
        (services, "ConsolePopen", functools.partial(subprocess.Popen, process_group=0)),
        # By the machine's own address Ray's daemons would be open to its network; nobody there is to reach this one.
        (ray.util, "get_node_ip_address", lambda: "127.0.0.1"),
        # With what the dashboard needs, it would load all of that here, a quarter of a second, to say that it can.
        (ray._private.utils, "get_dashboard_dependency_error", lambda: ImportError("no dashboard is wanted")),
        # Ray sees no control group but the outermost, and would take a share of memory that this process has not.
        (ray._private.ray_constants, "DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", store_bytes),
    ]
    unset = [name for name in _SETTINGS if name not in os.environ]
    try:
        with _replaced(replacements):
            yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _wait_for_file(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _sleep_little(seconds: float) -> None:
    """Stand for a short wait that is longer than what is waited for; where Ray is patient, it has to be."""
    time.sleep(seconds if seconds > _SHORT_SECONDS else min(seconds, _POLL_SECONDS))


def _do_nothing(_: object) -> None:
    """Stand for what Ray is not to do."""


def _leave_ray(others: set[psutil.Process]) -> None:
    """Disconnect, and end whatever this process started except `others`."""
    started = [child for child in psutil.Process().children() if child not in others]
    ended: set[psutil.Process] = set()
    node: Any = ray._private.node.Node

    def end_at_once(self: Any, **_: object) -> None:
        """Stand for Ray's orderly end, which takes up to two seconds and has nothing left to save."""
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.suspend()  # so that it starts no other while its own are looked for
        ended.update(_family(started))
        _kill(ended)

    # What was itself asked to end, by a signal to the whole process group, can keep Ray waiting for a minute.
    impatience = threading.Timer(_GRACE_SECONDS, lambda: _kill(_family(started)))
    impatience.start()
    with _replaced([(node, "kill_all_processes", end_at_once)]):
        ray.shutdown()
    impatience.cancel()
    ended.update(_family(started))  # all of it, if Ray's start was interrupted and there was nothing to shut down
    _kill(ended)
    psutil.wait_procs(started, timeout=_END_SECONDS)
    deadline = time.monotonic() + _END_SECONDS
    while any(_is_living(process) for process in ended) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _is_living(process: psutil.Process) -> bool:
    """Say whether a process may yet do anything; a dead one stays listed until its parent, or an init, sees to it."""
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


@contextmanager
def _replaced(replacements: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Have other values stand for attributes, given as owner, name and value, for a while."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
