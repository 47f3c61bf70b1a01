"""Run a command to its end and measure it: wall time, CPU time, memory.

Input: a command. Output: a `Watched`. Invariant: every process of the command's session has ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_SAMPLE_SECONDS = 0.2
_GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Watched:
    """The time and memory that a command took.

    `cpu_s` and the peaks are sampled from all processes of the session five times a second: Ray's raylet does not wait
    for its workers, so that `wait4` does not count them. Up to the last 0.2 s of a process are not counted. Where
    `wait4` reports more CPU time, or where there is no /proc, its figure is used.

    Attributes:
        exit_code: Of the process that was started.
        wall_s: From the start of the process to its end.
        cpu_s: User and system time of all processes, Ray's services included.
        peak_bytes: Resident memory of the largest process.
        main_peak_bytes: Resident memory of the process that was started, with the pages of the object store that it
            touched.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    main_peak_bytes: int


def watch(command: Sequence[str], out: Path, err: Path, folder: Path) -> Watched:
    """Run a process to its end, in a session of its own and in a working folder; its output goes to two files."""
    seen: dict[int, tuple[float, int]] = {}
    has_ended = threading.Event()

    def sample() -> None:
        while not has_ended.wait(_SAMPLE_SECONDS):
            seen.update(read_session(process.pid))

    # A command that joins a running Ray would not measure the start of Ray.
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    # An interrupt waits until there is a process to end.
    interrupts: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, _: interrupts.append(signum)) for signum in INTERRUPTS}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, cwd=folder, env=environment, start_new_session=True
        )
    try:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if interrupts:
            raise KeyboardInterrupt
        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    except KeyboardInterrupt:
        process.terminate()  # which ends its Ray too; after the grace period it is killed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        has_ended.set()
        end_session(process.pid)
    sampler.join()
    cpu_s = max(usage.ru_utime + usage.ru_stime, sum(seconds for seconds, _ in seen.values()))
    # `ru_maxrss` includes the memory of this process before exec: used only where nothing was sampled.
    unit = 1 if sys.platform == "darwin" else 1024
    main_peak_bytes = seen[process.pid][1] if process.pid in seen else usage.ru_maxrss * unit
    peak_bytes = max([main_peak_bytes, *(size for _, size in seen.values())])
    return Watched(process.returncode, wall_s, cpu_s, peak_bytes, main_peak_bytes)


def read_session(session: int) -> dict[int, tuple[float, int]]:
    """Return CPU seconds and peak resident bytes of a session's processes, by process; nothing without /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name in brackets: state, parent, group, session, ..., user and system time in ticks.
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) != session:
                continue
            peak = re.search(rb"VmHWM:\s+(\d+) kB", (folder / "status").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
        if peak:  # one that has ended but was not waited for has no memory
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(folder.name)] = (cpu_s, int(peak[1]) * 1024)
    return found


def end_session(session: int) -> None:
    """Kill every process that a command left: its process group, and the groups that Ray makes for workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    for pid in read_session(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
