"""A cluster that is asked before it is joined: its token, its version."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
from builders import ROOT, end_processes

pytestmark = pytest.mark.ray
_HEAD = """
import sys, ray
from ray._private import worker
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
context = ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, logging_level="ERROR")
if "mismatch" in sys.argv:
    cluster = _internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster")
    changed = cluster.replace(ray.__version__.encode(), b"1.0.0")
    _internal_kv_put(b"CLUSTER_METADATA", changed, overwrite=True, namespace=b"cluster")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
TOKEN = "0123456789abcdef" * 4


@contextmanager
def head(home, *words, **variables):
    """Run a cluster of another user's, in a process of its own."""
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    with subprocess.Popen(
        [sys.executable, "-c", _HEAD, *words], env={**environment, "HOME": str(home), **variables},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield process.stdout.readline().strip()
        finally:
            end_processes([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])


def join(address, out, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = ["--epochs", "0", "--no-report", "--address", address, "--out", out]
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / "evaluate.py", *words], env={**environment, **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_token_in_the_home_folder_is_used_and_none_or_a_wrong_one_is_one_line(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    (tmp_path / "nobody").mkdir()
    without = {"HOME": str(tmp_path / "nobody")}
    with head(tmp_path) as address:  # as `ray start --head` does where there is a token
        done = join(address, tmp_path / "out", HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN[::-1]}
        for given in ({}, {"RAY_AUTH_MODE": "token"}, wrong):
            done = join(address, tmp_path / "none", **{**without, **given})
            told, line = done.stderr.splitlines()
            assert (done.returncode, done.stdout, told.startswith("joining")) == (1, "", True)
            assert re.match(
                rf"error: --address {address}: expected its token to be known here, got InvalidAuthToken; set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to .* or RAY_AUTH_TOKEN_PATH to a file", line,
            ), line  # fmt: skip


def test_a_cluster_of_another_ray_is_one_line(tmp_path):
    with head(tmp_path, "mismatch", RAY_AUTH_MODE="disabled") as address:
        done = join(address, tmp_path / "out", RAY_AUTH_MODE="disabled")
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
    expected = f"error: --address {address}: expected a cluster of this version of Ray and of Python, got "
    assert line.startswith(expected), line
    assert line.endswith("; install the same on both sides")
