"""A command run to its end and watched: how long, how much CPU, how much memory, and nothing left of it.

What enters: a command. What leaves: a `Watched`. Always: every process of the command's session has ended.
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
    """What a command took.

    `wall_s` is from starting the process to its end, as a user waits for it. `cpu_s` and the peaks come from
    looking at all processes of its session five times a second, because Ray's raylet does not wait for its workers,
    so that `wait4` knows nothing of them. Counted: user and system time of every process seen, Ray's services too.
    Not counted: the last fifth of a second of a process and those that live no longer. Where `wait4` knows of more CPU
    time, or there is no /proc, its figure stands. `peak_bytes` is the resident memory of the largest process,
    `main_peak_bytes` that of the process that was started, pages of the object store that it touched included.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    main_peak_bytes: int


def watch(command: Sequence[str], out: Path, err: Path) -> Watched:
    """Run a process to its end in a session of its own, its output going to two files."""
    seen: dict[int, tuple[float, int]] = {}
    has_ended = threading.Event()

    def look() -> None:
        while not has_ended.wait(_SAMPLE_SECONDS):
            seen.update(read_session(process.pid))

    # A Ray that runs on this machine already would spare a command its start.
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    # An interrupt waits until there is a process to end.
    interrupts: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, _: interrupts.append(signum)) for signum in INTERRUPTS}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
    try:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if interrupts:
            raise KeyboardInterrupt
        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    except KeyboardInterrupt:
        process.terminate()  # lets it end its Ray; what is slower than that is killed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        has_ended.set()
        end_session(process.pid)
    looker.join()
    cpu_s = max(usage.ru_utime + usage.ru_stime, sum(seconds for seconds, _ in seen.values()))
    # Only where nothing was seen: it knows this process's own memory, before it became the command, as well.
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
    """Kill what a command left behind, its process group and the groups that Ray gives its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    for pid in read_session(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
