"""Connecting to Ray: a cluster that is there, or one started here with what a job needs of it and nothing else.

What enters: an address, or none. What leaves: a connection that is left again. Always: nothing that was started here
stays, however the job ends.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.node
import ray._private.ray_constants
import ray._private.services
import ray._private.utils
import ray.exceptions

from pipeline.errors import ClusterError

_CONNECT_SECONDS = 5.0
_GRACE_SECONDS = 3.0
# Ray's own share of a node's memory for its object store, and the least that it takes.
STORE_SHARE = 0.3
_LEAST_STORE_BYTES = 80 * 2**20
_REGISTER_SECONDS = 10.0
_POLL_SECONDS = 0.02


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
    # Ray sets a handler of its own, which would end the job without a word.
    on_terminate = signal.getsignal(signal.SIGTERM)
    others = set(psutil.Process().children())
    _check_address(address)
    try:
        try:
            with _fewer_services():
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
            if is_main:
                signal.signal(signal.SIGTERM, on_terminate)
        yield not any(child not in others for child in psutil.Process().children())
    finally:
        # A second Ctrl-C at this point would leave Ray's processes behind.
        if is_main:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        _leave_ray(others)
        if is_main:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def memory_limit() -> float:
    """Return the bytes of memory that this process and its siblings may take, by the machine and control groups."""
    limit = float(psutil.virtual_memory().total)
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return limit
    for _, controllers, path in (line.split(":", 2) for line in groups):
        # Version 2 has one tree, and version 1 one for memory.
        base, name = (
            ("/sys/fs/cgroup", "memory.max") if not controllers else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        )
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (Path(base, path.strip("/")), *Path(base, path.strip("/")).parents):
            with suppress(OSError, ValueError):  # not there, or `max`
                limit = min(limit, float((folder / name).read_text()))
    return limit


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

    The dashboard (which starts even where it is said not to be included), the autoscaler's monitor and the forwarder of
    logs are Python processes of their own; Ray waits a second for the first, and another for its node to register,
    because it looks for that once a second. Without all that, Ray's start takes about half the time. None of it has a
    public option in Ray 2.60.
    """
    node: Any = ray._private.node.Node
    services: Any = ray._private.services
    raylet: Any = ray._raylet
    wait_for_node = services.get_node
    store_bytes = max(_LEAST_STORE_BYTES, int(STORE_SHARE * memory_limit()))

    def start_no_dashboard(self: Any, **_: object) -> None:
        self._webui_url = None

    def get_node(address: str, node_id: str) -> Any:
        client = raylet.GcsClient(address=address)
        deadline = time.monotonic() + _REGISTER_SECONDS
        while not client.get_all_node_info() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return wait_for_node(address, node_id)

    replacements: list[tuple[Any, str, Any]] = [
        (node, "start_api_server", start_no_dashboard),
        (node, "start_monitor", _do_nothing),
        (node, "start_log_monitor", _do_nothing),
        (services, "get_node", get_node),
        # By the machine's own address Ray's daemons would be open to its network; nobody there is to reach this one.
        (ray.util, "get_node_ip_address", lambda: "127.0.0.1"),
        # With what the dashboard needs, it would load all of that here, a quarter of a second, to say that it can.
        (ray._private.utils, "get_dashboard_dependency_error", lambda: ImportError("no dashboard is wanted")),
        # Ray sees no control group but the outermost, and would take a share of memory that this process has not.
        (ray._private.ray_constants, "DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", store_bytes),
    ]
    originals: list[tuple[Any, str, Any]] = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _do_nothing(self: object) -> None:
    """Stand for the start of a service."""


def _leave_ray(others: set[psutil.Process]) -> None:
    """Disconnect, and end whatever this process started except `others`."""
    started = [child for child in psutil.Process().children() if child not in others]
    started += [grandchild for child in started for grandchild in _descendants(child)]
    # What was itself asked to end, by a signal to the whole process group, can keep Ray waiting for a minute.
    impatience = threading.Timer(_GRACE_SECONDS, _kill, [started])
    impatience.start()
    ray.shutdown()
    impatience.cancel()
    # The agents of Ray's node manager outlive it by a moment, or for good if Ray's start was interrupted.
    _kill(started)
    psutil.wait_procs(started, timeout=10)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []
