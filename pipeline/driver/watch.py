"""Whether the cluster that a job runs on is still there.

Input: a connection to Ray. Output: an error, soon after the node manager or the head of the cluster died.
Invariant: that error is said before Ray's compiled code, which waits for a minute, ends this process without a word.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
import ray

from pipeline.errors import ClusterError, EvaluationError

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_CONNECT_SECONDS = 5.0
# A head may come back, as on Kubernetes; Ray itself waits for 60 s, and ends this process then.
HEAD_SECONDS = 45.0
_HEAD_TICK_SECONDS = 2.0
# How long this process is given to end by the error, before it is ended.
GRACE_SECONDS = 5.0


class Watch:
    """What a thread of its own sees of the cluster."""

    def __init__(
        self, processes: Sequence[psutil.Process], head: str | None, on_last: Callable[[], object] = lambda: None
    ) -> None:
        """Begin to watch.

        Args:
            processes: Of Ray, on this machine, without which this process cannot go on.
            head: The address of a cluster's head on another machine; None for none.
            on_last: Called before this process is ended, if it does not end by the error.
        """
        self._processes = processes
        self._head = head
        self._on_last = on_last
        self._fault: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise an error if the cluster is gone.

        Raises:
            ClusterError: If it is.
        """
        if self._fault:
            raise ClusterError(self._fault)

    def replace(self, exc: Exception) -> None:
        """Raise an error if the cluster is gone, in the place of what Ray made of that, which may come first.

        Raises:
            ClusterError: If it is.
        """
        if not self._fault and not isinstance(exc, EvaluationError | OSError):
            self._ended.wait(3 * _TICK_SECONDS)
        if self._fault and str(exc) != self._fault:
            raise ClusterError(self._fault) from exc

    def end(self, *, is_left: bool) -> None:
        """End, before the cluster is left if it is well, and otherwise after that, which may take too long."""
        if is_left or not self._fault:
            self._ended.set()
            self._thread.join()

    def _run(self) -> None:
        last_answer = last_try = time.monotonic()
        while not self._fault and not self._ended.wait(_TICK_SECONDS):
            for process in self._processes:
                if not _is_running(process):
                    self._fault = (
                        f"Ray: expected its process {process.pid} to run until the job ends, got its death; look for "
                        "who ended it, as the kernel does without memory, and run again"
                    )
            now = time.monotonic()
            if self._head and now - last_try > _HEAD_TICK_SECONDS:
                last_try = now
                last_answer = now if _answers(self._head) else last_answer
                if now - last_answer > HEAD_SECONDS:
                    self._fault = (
                        f"--address {self._head}: expected the cluster's head to answer, got nothing for "
                        f"{HEAD_SECONDS:.0f} s; look whether it runs, and run again"
                    )
        # Who waits inside Ray's compiled code hears of no error.
        if self._fault and not self._ended.wait(GRACE_SECONDS):
            logger.critical("error: %s", self._fault)
            self._on_last()
            os._exit(1)


def find_raylet() -> list[psutil.Process]:
    """Find Ray's node manager on this machine, by which this process is connected to a cluster."""
    argument = f"--node_id={ray.get_runtime_context().get_node_id()}"
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet" and argument in (process.info["cmdline"] or ())
    ]


def _is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
        return True
    return False
