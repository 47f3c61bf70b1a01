"""Ray's start and end on one machine for one job, made faster by replacing names inside Ray.

Input: the modules of the installed Ray.
Output: while `started_fast` or `ended_by` is entered, these modules with the names of `REPLACEMENTS` replaced.
Invariant: no name is replaced unless all are there with the parameters counted on, and none while a cluster is joined;
plain `ray.init` and `ray.shutdown` give the same results, later.

Measured and left out, since they save less than 5 %: a shorter wait for the raylet (1 %), for the ports of its
processes (4 %), and for everything else (0 %). With all of it plain, a whole process takes 1.85 times as long.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# A program that asks a cluster anything, for a process that can be ended; with another Ray it asks nothing.
PROBE = """
import sys
try:
    from ray._raylet import GcsClient
    ask = GcsClient(address=sys.argv[1]).internal_kv_get
except (ImportError, TypeError):  # of a version of Ray that has no such thing
    sys.exit(0)
ask(b"image-baseline", namespace=b"none", timeout=10)
"""
PLAIN_VARIABLE = "IMAGE_BASELINE_PLAIN_RAY"
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
_PRESTARTED, _AT_ONCE = "--num_prestart_python_workers", "--maximum_startup_concurrency"
_GIVEN_ARGUMENTS = {*_AGENT_ARGUMENTS, _PRESTARTED, _AT_ONCE} - {"--dashboard_agent_listen_port"}


@dataclass(frozen=True)
class Name:
    """A name inside Ray: its path, the first of its parameters, which are relied on, and what makes its replacement."""

    path: str
    parameters: tuple[str, ...]
    replace: Callable[[Any], Any]


@dataclass(frozen=True)
class Replacement:
    """What is replaced for one purpose.

    Attributes:
        names: The names.
        reason: The purpose.
        saves: Of the time of a whole process on MNIST, `--epochs 0`, on two CPU cores: the median of eight pairs with
            and without this replacement, the lowest and the highest; or why it stays without.
    """

    names: tuple[Name, ...]
    reason: str
    saves: str


def _start_nothing(original: Any) -> Any:
    def start(self: Any, **_: object) -> None:
        """Start no process."""

    return start


def _find_no_dashboard(original: Any) -> Any:
    def get_dashboard_dependency_error() -> ImportError:
        return ImportError("no dashboard is wanted")

    return get_dashboard_dependency_error


def _change_raylet(start_process: Any) -> Any:
    def start_ray_process(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == _RAYLET:
            given = dict(argument.partition("=")[::2] for argument in command)
            if missing := _GIVEN_ARGUMENTS - given.keys():
                raise RuntimeError(f"a raylet without {', '.join(sorted(missing))}")
            # One for each CPU, which decodes, and one for an actor, which Ray would only start when all are asked for.
            workers = dict.fromkeys((_PRESTARTED, _AT_ONCE), str(int(given[_PRESTARTED]) + 1))
            changed = _AGENT_ARGUMENTS | workers
            kept = [argument for argument in command if argument.partition("=")[0] not in changed]
            command = [*kept, *(f"{name}={value}" for name, value in changed.items())]
        return start_process(command, process_type, **options)

    return start_ray_process


def _listen_on_this_machine(original: Any) -> Any:
    def get_node_ip_address(*_: object) -> str:
        return "127.0.0.1"

    return get_node_ip_address


STARTS = (
    Replacement(
        (
            Name("ray._private.node.Node.start_api_server", ("self",), _start_nothing),
            Name("ray._private.utils.get_dashboard_dependency_error", (), _find_no_dashboard),
            Name("ray._private.node.Node.start_monitor", ("self",), _start_nothing),
            Name("ray._private.node.Node.start_log_monitor", ("self",), _start_nothing),
        ),
        "no processes for the dashboard, the autoscaler and the forwarding of logs: the dashboard's starts, after an "
        "import of all that it needs, even where it is said not to be included, and Ray waits for it",
        "24 % (21 to 25); one by one: start_api_server 17 %, start_monitor 9 %, start_log_monitor 4 %, the import 3 %",
    ),
    Replacement(
        (Name("ray._private.services.start_ray_process", ("command", "process_type"), _change_raylet),),
        "no agents beside the raylet, two Python processes; and all workers are started at once",
        "agents 16 % (12 to 21), workers 7 % (-3 to 12)",
    ),
    Replacement(
        (Name("ray.util.get_node_ip_address", (), _listen_on_this_machine),),
        "with the machine's own address, Ray's processes would be open to its network; nobody there is to reach them",
        "nothing; it is for security, which without it rests on Ray's tokens",
    ),
)
END = Replacement(
    (Name("ray._private.node.Node.kill_all_processes", ("self",), lambda original: original),),
    "Ray's orderly end takes up to two seconds, and has nothing to save",
    "14 % (11 to 21)",
)
REPLACEMENTS = (*STARTS, END)


def find_reason_for_plain() -> str | None:
    """Say why nothing is to be replaced, by the user's wish or the installed Ray; None where all is."""
    if os.environ.get(PLAIN_VARIABLE) == "1":
        return f"{PLAIN_VARIABLE} is 1"
    for each in (name for replacement in REPLACEMENTS for name in replacement.names):
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


def has_token() -> bool:
    """Say whether the user has a token for clusters, in a variable or in the home folder."""
    loader = _find("ray._raylet.AuthenticationTokenLoader")
    return bool(loader and loader.instance().has_token(ignore_auth_mode=True))


def use_token() -> None:
    """Have this process, which was started without, show the user's token to a cluster."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if settings := _find("ray._raylet.Config"):  # where they were read before
        settings.initialize("")


def _find(path: str) -> Any:
    with suppress(ImportError, AttributeError):
        return pkgutil.resolve_name(path)
    return None


@contextmanager
def started_fast() -> Iterator[None]:
    """Have `ray.init` start no more than a job on one machine asks for, and listen on this machine alone."""
    with ExitStack() as stack:
        for each in (name for replacement in STARTS for name in replacement.names):
            stack.enter_context(_replaced(each.path, each.replace))
        yield


@contextmanager
def ended_by(end: Callable[[], None]) -> Iterator[None]:
    """Have `ray.shutdown` call `end` instead of ending its processes itself."""
    [name] = END.names
    with _replaced(name.path, lambda _: lambda self, **options: end()):
        yield


@contextmanager
def _replaced(path: str, replace: Callable[[Any], Any]) -> Iterator[None]:
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    original = getattr(owner, name)
    setattr(owner, name, replace(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
