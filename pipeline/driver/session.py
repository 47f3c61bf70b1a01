"""What Ray needs of this machine to start: a folder for its files, limits of the process, room for its objects.

Input: the environment, the limits of this process, and the logs of a start that failed.
Output: a folder and a size that Ray can start with, or a `ClusterError` that says what to change.
Invariant: what would make Ray's compiled code hang or abort is found before Ray is started.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from pipeline.driver.cluster import STORE_SHARE, memory_limit
from pipeline.errors import ClusterError

# Ray makes a Unix socket below its folder, at `session_<time>_<process id>/sockets/plasma_store`.
_MAX_SOCKET_BYTES = 107
_SOCKET_BYTES = len(f"/session_2026-01-01_00-00-00_000000_{2**22}/sockets/plasma_store")
_MAX_FOLDER_BYTES = _MAX_SOCKET_BYTES - _SOCKET_BYTES
# For logs; a worker that cannot write them dies.
_LEAST_FREE_BYTES = 32 * 2**20
# Ray's node manager takes its workers' command apart as a shell does, but Ray quotes it as Windows does: with these
# in a path no worker starts, and nothing says so.
_MISREAD = re.compile(r"['\\]")
# The least that Ray takes for its object store, and the least share of /dev/shm that it is content with before it
# refuses a store that does not fit.
_LEAST_STORE_BYTES = 80 * 2**20
_SHARED_MEMORY = Path("/dev/shm")
# Of addresses, beside the object store, which every process of Ray maps whole: two to three times what was measured
# on two CPUs, and a bit more for the threads that each further CPU brings.
_BASE_ADDRESS_BYTES, _CPU_ADDRESS_BYTES = 4 * 2**30, 2**27
# Ray's node manager had 60 files open with four workers; threads of all of Ray's processes together were 160.
_BASE_FILES, _CPU_FILES = 48, 8
_WANTED_FILES = 4096
_BASE_THREADS, _CPU_THREADS = 120, 30
# What Ray's logs say, and what can be done about it.
_CAUSES = (
    (r"Too many open files", "raise `ulimit -n`"),
    (r"pthread_create|can't start new thread|Resource temporarily unavailable", "raise `ulimit -u` or end processes"),
    (r"Cannot allocate memory|bad_alloc|MemoryError|failed to map segment", "free memory or run `ulimit -v unlimited`"),
    (r"No space left on device|SIGBUS|Bus error", "free the disk of Ray's folder and /dev/shm"),
    (r"ModuleNotFoundError|ImportError", "install this program anew"),
    (r"Permission denied|Read-only file system", "set RAY_TMPDIR to a folder of your own"),
)
_MAX_LOG_BYTES = 2**16


def choose_folder() -> tuple[str, str | None]:
    """Choose the folder for Ray's files: its own choice, unless Ray could not start there.

    Returns:
        The folder, and why it is not Ray's own choice; None where it is.

    Raises:
        ClusterError: If there is none.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    usual = os.path.join(os.environ.get(variable, "/tmp"), "ray")  # noqa: PTH118 - the very string that Ray makes of it
    fault = _find_fault(usual)
    if fault is None:
        return usual, None
    own = f"ray-{os.getuid()}"
    for folder in ("/tmp/ray", f"/tmp/{own}", f"/var/tmp/{own}"):
        if _find_fault(folder) is None:
            return folder, f"{variable}: Ray cannot use {usual} ({fault}); its files are in {folder}"
    raise ClusterError(
        f"{variable}: expected a folder for Ray's files, got {usual} ({fault}), and none in /tmp and /var/tmp can be "
        "used instead; set RAY_TMPDIR to a short path that you can write to"
    )


def _find_fault(folder: str) -> str | None:
    """Say why Ray could not start with its files in a folder, which need not be there yet; None where it could."""
    if not folder.isascii():
        return "its path is not ASCII"
    if misread := _MISREAD.search(folder):
        return f"its path has the character {misread[0]}"
    if len(folder) > _MAX_FOLDER_BYTES:
        return f"its path has {len(folder)} characters, more than {_MAX_FOLDER_BYTES}"
    there = Path(folder)
    try:
        there.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=there).close()
        free_bytes = shutil.disk_usage(there).free
    except OSError as exc:
        return exc.strerror or type(exc).__name__
    return f"it has {free_bytes / 2**20:.0f} MiB free" if free_bytes < _LEAST_FREE_BYTES else None


def check_paths() -> None:
    """See that workers can be started by the paths of Python and of Ray.

    Raises:
        ClusterError: If they cannot.
    """
    for what, path in (("Python", sys.executable), ("Ray", str(Path(ray.__file__).parent))):
        # With a space in it, a path is put in double quotes, and is read as it is.
        if not re.search(r"\s", path) and (misread := _MISREAD.search(path)):
            raise ClusterError(
                f"{what} in {path}: expected a path by which Ray can start workers, got one with the character "
                f"{misread[0]}; use a virtual environment in another folder"
            )


def check_limits() -> None:
    """Raise the limit of open files as far as this process may, and see that Ray can start within all limits.

    Raises:
        ClusterError: If it cannot.
    """
    num_cpus = os.cpu_count() or 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(max(soft, _WANTED_FILES), hard) if hard != resource.RLIM_INFINITY else max(soft, _WANTED_FILES)
    if soft not in (files, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    _expect_limit("ulimit -n", "open files", _BASE_FILES + _CPU_FILES * num_cpus, resource.RLIMIT_NOFILE)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    least = (_BASE_ADDRESS_BYTES + _CPU_ADDRESS_BYTES * num_cpus + _LEAST_STORE_BYTES) // 1024
    _expect_limit("ulimit -v", "KiB of addresses", least, resource.RLIMIT_AS, unit=1024)
    if os.getuid() != 0 and resource.getrlimit(resource.RLIMIT_NPROC)[0] != resource.RLIM_INFINITY:
        taken = _count_threads()
        _expect_limit(
            "ulimit -u", f"threads, of which {taken} are taken", taken + _BASE_THREADS + _CPU_THREADS * num_cpus,
            resource.RLIMIT_NPROC,
        )  # fmt: skip


def _expect_limit(name: str, what: str, least: int, limit: int, unit: int = 1) -> None:
    advised = _WANTED_FILES if limit == resource.RLIMIT_NOFILE else "unlimited"
    soft = resource.getrlimit(limit)[0]
    if soft != resource.RLIM_INFINITY and soft // unit < least:
        raise ClusterError(
            f"{name}: expected at least {least} {what}, which Ray needs to start, got {soft // unit}; raise the limit, "
            f"as by `{name} {advised}`, in the shell that starts the job, or have its hard limit raised"
        )


def _count_threads() -> int:
    """Count the threads of this user, which is what the limit of processes limits."""
    uid, threads = os.getuid(), 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            threads += process.num_threads() if process.uids().real == uid else 0
    return threads


def choose_store_bytes() -> int | None:
    """Choose the size of the object store; None where Ray knows as well.

    Of control groups and of a limit of addresses Ray sees nothing, and would take a share of memory that this process
    has not.
    """
    memory = psutil.virtual_memory()
    limit = memory_limit()
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit >= memory.total and addresses == resource.RLIM_INFINITY:
        return None
    share = STORE_SHARE * min(limit, memory.available)
    if addresses != resource.RLIM_INFINITY:
        share = min(share, addresses - _BASE_ADDRESS_BYTES - _CPU_ADDRESS_BYTES * (os.cpu_count() or 1))
    # A store of more than 10 GB that does not fit /dev/shm is an error of Ray's; a smaller one goes to the disk.
    most = max(10e9, 0.95 * shutil.disk_usage(_SHARED_MEMORY).free)
    return max(_LEAST_STORE_BYTES, int(min(share, most)))


def explain(folder: str, fault: object) -> str:
    """Say why Ray did not start and what to do, by the logs of this process's newest session if they tell.

    Args:
        folder: That of Ray's files.
        fault: What Ray itself says.
    """
    # `session_latest` may be another job's meanwhile.
    sessions = sorted(Path(folder).glob(f"session_*_{os.getpid()}"))
    logs = sessions[-1] / "logs" if sessions else Path(folder)
    lines = [line for log in _newest_first(logs) for line in _read_end(log)]
    for pattern, advice in _CAUSES:
        for line in [str(fault), *lines]:
            if re.search(pattern, line):
                return f"{line.strip()[:300]}; {advice}, see {logs}"
    return f"{fault}; see {logs}, and end what keeps this machine busy"


def _newest_first(logs: Path) -> Iterable[Path]:
    with suppress(OSError):
        found = [log for log in logs.iterdir() if log.suffix in (".err", ".out", ".log")]
        return sorted(found, key=lambda log: -log.stat().st_mtime)
    return []


def _read_end(log: Path) -> list[str]:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _MAX_LOG_BYTES))
        return file.read().decode(errors="replace").splitlines()
    return []
