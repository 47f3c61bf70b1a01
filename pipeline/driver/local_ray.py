"""Ray's start and end on one machine for one job, made faster by stand-ins for names inside Ray.

Input: the modules of the installed Ray.
Output: while `started_fast` or `ended_by` is entered, these modules with the stand-ins of `REPLACEMENTS`.
Invariant: no name is replaced unless all are there with the parameters counted on, and none while a cluster is joined;
plain `ray.init` and `ray.shutdown` give the same results, later.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

PLAIN_VARIABLE = "IMAGE_BASELINE_PLAIN_RAY"
_POLL_S = 0.01
_LOOK_S = 10.0
_CLIENT = "ray._raylet.GcsClient"
_RAYLET = "raylet"
# The raylet, Ray's process on every node, wants two agents that live as long as it does, and the ports they listen on.
# This one does nothing until its input, the raylet's end of a pipe, is closed; nobody connects to the ports.
_NO_AGENT = "/bin/sh -c 'read _'"
_AGENT_ARGUMENTS = {
    "--dashboard_agent_command": _NO_AGENT,
    "--runtime_env_agent_command": _NO_AGENT,
    "--metrics-agent-port": "1",
    "--metrics_export_port": "1",
    "--runtime_env_agent_port": "1",
    "--dashboard_agent_listen_port": "1",
}
_GIVEN_ARGUMENTS = _AGENT_ARGUMENTS.keys() - {"--dashboard_agent_listen_port"}


@dataclass(frozen=True)
class Replacement:
    """A name inside Ray, what stands in for it and what for.

    Attributes:
        path: The name, as `pkgutil.resolve_name` takes it.
        parameters: The first of its parameters, which the stand-in counts on.
        stand_in: Makes the stand-in from the original.
        reason: What the stand-in is for.
        saves: Of the time of the whole process on MNIST with `--epochs 0` on two CPU cores, or why it stays without.
    """

    path: str
    parameters: tuple[str, ...]
    stand_in: Callable[[Any], Any]
    reason: str
    saves: str


def _start_nothing(original: Any) -> Any:
    def start(self: Any, **_: object) -> None:
        """Stand in for the start of a process."""

    return start


def _start_without_agents(start_process: Any) -> Any:
    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == _RAYLET:
            names = [argument.partition("=")[0] for argument in command]
            if missing := _GIVEN_ARGUMENTS - set(names):
                raise RuntimeError(f"a raylet without {', '.join(sorted(missing))}")
            kept = [argument for argument, name in zip(command, names, strict=True) if name not in _AGENT_ARGUMENTS]
            command = [*kept, *(f"{name}={value}" for name, value in _AGENT_ARGUMENTS.items())]
        return start_process(command, process_type, **options)

    return start_ray_process


def _look_often_for_node(wait_for_node: Any) -> Any:
    def get_node(gcs_address: str, node_id: str) -> Any:
        client = pkgutil.resolve_name(_CLIENT)(address=gcs_address)
        deadline = time.monotonic() + _LOOK_S
        while not client.get_all_node_info() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return wait_for_node(gcs_address, node_id)

    return get_node


def _find_no_dashboard(original: Any) -> Any:
    def get_dashboard_dependency_error() -> ImportError:
        return ImportError("no dashboard is wanted")

    return get_dashboard_dependency_error


def _listen_on_this_machine(original: Any) -> Any:
    def get_node_ip_address(*_: object) -> str:
        return "127.0.0.1"

    return get_node_ip_address


STARTS = (
    Replacement(
        "ray._private.node.Node.start_api_server",
        ("self",),
        _start_nothing,
        "the dashboard's process starts even where it is said not to be included, and Ray waits for it",
        "not measured yet",
    ),
    Replacement(
        "ray._private.node.Node.start_monitor",
        ("self",),
        _start_nothing,
        "the autoscaler's process",
        "not measured yet",
    ),
    Replacement(
        "ray._private.node.Node.start_log_monitor",
        ("self",),
        _start_nothing,
        "the log forwarder's process",
        "not measured yet",
    ),
    Replacement(
        "ray._private.services.start_ray_process",
        ("command", "process_type"),
        _start_without_agents,
        "the raylet's two agents, Python processes",
        "not measured yet",
    ),
    Replacement(
        "ray._private.services.get_node",
        ("gcs_address", "node_id"),
        _look_often_for_node,
        "Ray looks once a second whether its raylet is up",
        "not measured yet",
    ),
    Replacement(
        "ray._private.utils.get_dashboard_dependency_error",
        (),
        _find_no_dashboard,
        "it imports all that the dashboard needs, to say that it can",
        "not measured yet",
    ),
    Replacement(
        "ray.util.get_node_ip_address",
        (),
        _listen_on_this_machine,
        "with the machine's own address, Ray's processes would be open to its network; nobody there is to reach them",
        "nothing; it is for security, which without it rests on Ray's tokens",
    ),
)
END = Replacement(
    "ray._private.node.Node.kill_all_processes",
    ("self",),
    lambda original: original,
    "Ray's orderly end takes up to two seconds, and has nothing to save",
    "not measured yet",
)
REPLACEMENTS = (*STARTS, END)


def find_reason_for_plain() -> str | None:
    """Say why nothing is to be replaced, by the user's wish or the installed Ray; None where all is."""
    if os.environ.get(PLAIN_VARIABLE) == "1":
        return f"{PLAIN_VARIABLE} is 1"
    for each in REPLACEMENTS:
        found = _find_parameters(each.path)
        if found is None or found[: len(each.parameters)] != each.parameters:
            expected = f"{each.path}({', '.join(each.parameters)})"
            got = "none" if found is None else f"({', '.join(found)})"
            return f"Ray {importlib.metadata.version('ray')}: expected {expected}, got {got}"
    return None


def _find_parameters(path: str) -> tuple[str, ...] | None:
    """Return the names of a function's parameters; None where there is no such function."""
    try:
        return tuple(inspect.signature(pkgutil.resolve_name(path)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None


@contextmanager
def started_fast() -> Iterator[None]:
    """Have `ray.init` start no more than a job on one machine asks for, and listen on this machine alone."""
    with ExitStack() as stack:
        for each in STARTS:
            stack.enter_context(_replaced(each.path, each.stand_in))
        yield


@contextmanager
def ended_by(end: Callable[[], None]) -> Iterator[None]:
    """Have `ray.shutdown` call `end` instead of ending its processes itself."""
    with _replaced(END.path, lambda _: lambda self, **options: end()):
        yield


@contextmanager
def _replaced(path: str, stand_in: Callable[[Any], Any]) -> Iterator[None]:
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    original = getattr(owner, name)
    setattr(owner, name, stand_in(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
