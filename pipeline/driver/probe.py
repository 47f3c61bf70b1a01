"""Which cluster to join, and asking it before it is joined.

Input: an address, or none. Output: the address of a cluster that answers, or none where nobody asked for one.
Invariant: every wait ends by a limit and by a signal, which none inside Ray does.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.driver import local_ray
from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 20.0
_POLL_SECONDS = 0.01
# As an exception of Ray's has it, and its compiled code where a token is to be used and there is none.
_NO_TOKEN = re.compile("InvalidAuthToken|AuthenticationError|authentication token", re.IGNORECASE)


def find_cluster(address: str | None) -> str | None:
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
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError as exc:
            return exc
    return None


def probe(address: str, on_wait: Callable[[], None]) -> None:
    """Ask a cluster anything, in a process that can be ended: Ray itself would wait for minutes, and hear no signal.

    A cluster that wants a token gets the user's, unless that user has said whether to use one.

    Raises:
        ClusterError: If there is no answer.
    """
    if ":" not in address or address.startswith("ray://"):
        return
    fault = _ask(address, on_wait)
    if fault and _NO_TOKEN.search(fault) and "RAY_AUTH_MODE" not in os.environ and local_ray.has_token():
        fault = _ask(address, on_wait, RAY_AUTH_MODE="token")
        if fault is None:
            local_ray.use_token()
    if fault:
        raise make_error(address, fault)


def _ask(address: str, on_wait: Callable[[], None], **variables: str) -> str | None:
    """Ask a cluster anything, and say what was wrong; None where it answered."""
    command = [sys.executable, "-c", local_ray.PROBE, address]
    with subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + PROBE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                on_wait()
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
        lines = process.stderr.read().splitlines() if process.wait() and process.stderr else []
    if process.returncode == 0:
        return None
    if told := [line for line in lines if _NO_TOKEN.search(line)]:
        return told[-1]
    if process.returncode == -signal.SIGKILL:
        return f"none in {PROBE_SECONDS:.0f} s"
    return next((line for line in reversed(lines) if line.strip()), "none")


def make_error(address: str, fault: object) -> ClusterError:
    """Say that a cluster cannot be joined, and what to do about it."""
    text = " ".join(str(fault).split())
    expected, advice = "an answer of a Ray cluster", "check that it runs"
    if _NO_TOKEN.search(text):
        expected, text = "its token to be known here", "InvalidAuthToken"
        advice = (
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of its head, by default in ~/.ray/auth_token "
            "there, or RAY_AUTH_TOKEN_PATH to a file with it"
        )
    elif "Version mismatch" in text:
        expected, advice = "a cluster of this version of Ray and of Python", "install the same on both sides"
    return ClusterError(f"--address {address}: expected {expected}, got {text}; {advice}")
