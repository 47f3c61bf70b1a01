"""What Ray needs of this machine: without it a job works otherwise, or ends with one line that says what to do."""

import os
import re
import resource
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from builders import ROOT

from pipeline.driver import session
from pipeline.errors import ClusterError

pytestmark = pytest.mark.ray
GIB = 2**30


def run(out, limits=(), python=sys.executable, **environment):
    """Run a small job, with limits that neither it nor its processes can raise."""
    words = [python, ROOT / "jobs" / "evaluate.py", "--epochs", "0", "--no-report", "--address", "local", "--out", out]
    return subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        preexec_fn=lambda: [resource.setrlimit(limit, (most, most)) for limit, most in limits],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("it's", "its path has the character '"),
        ("back\\slash", "its path has the character \\"),
        ("émile", "its path is not ASCII"),
        ("x" * 60, "more than 43"),
    ],
)
def test_a_folder_in_which_ray_cannot_start_is_not_used(tmp_path, monkeypatch, name, fault):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / name))
    chosen, why = session.choose_folder()
    assert chosen.startswith(("/tmp/ray", "/var/tmp/ray"))
    assert why.startswith(f"RAY_TMPDIR: Ray cannot use {tmp_path / name}/ray (")
    assert fault in why


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    """A file, which not even root can write into."""
    monkeypatch.setattr(session, "_MAX_FOLDER_BYTES", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert session.choose_folder() == (f"{tmp_path}/ray", None)
    (tmp_path / "ray").rmdir()
    (tmp_path / "ray").touch()
    assert session.choose_folder()[1].startswith(f"TMPDIR: Ray cannot use {tmp_path}/ray (File exists); its files are ")


def test_no_folder_with_room_is_an_error(monkeypatch):
    monkeypatch.setattr(session, "_LEAST_FREE_BYTES", 2**70)
    with pytest.raises(
        ClusterError, match=r"^\w+: expected a folder for Ray's files, got .*MiB free.*; set RAY_TMPDIR"
    ):
        session.choose_folder()


@pytest.mark.parametrize("name", ["it's", 'a b q"q', "é" * 60])
def test_a_job_works_whatever_its_folders_are_called(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    done = run(folder / "out", TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert (f"TMPDIR: Ray cannot use {folder}/ray" in done.stderr) == (len(str(folder)) > 39 or "'" in name)


@pytest.mark.parametrize(
    ("limit", "most", "message"),
    [
        (resource.RLIMIT_AS, 3 * GIB, r"error: ulimit -v: expected at least \d+ KiB .*; raise .*`ulimit -v unlimited`"),
        (resource.RLIMIT_NOFILE, 32, r"error: ulimit -n: expected at least \d+ open files, .*`ulimit -n 4096`"),
    ],
)
def test_a_limit_with_which_ray_cannot_start_is_one_line(tmp_path, limit, most, message):
    done = run(tmp_path / "out", [(limit, most)])
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(message, line), line


def test_in_little_more_than_the_least_addresses_a_job_works(tmp_path):
    most = session._BASE_ADDRESS_BYTES + session._CPU_ADDRESS_BYTES * os.cpu_count() + GIB // 2
    done = run(tmp_path / "out", [(resource.RLIMIT_AS, most)])
    assert done.returncode == 0, done.stderr


_CHECK_AS_USER = """
import os, resource
from pipeline.driver import session
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 10000))
if os.getuid() == 0:
    os.setuid(65534)
session.check_limits()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
resource.setrlimit(resource.RLIMIT_NPROC, (10, 10))
session.check_limits()
"""


def test_a_soft_limit_is_raised_and_too_few_threads_are_an_error():
    done = subprocess.run(
        [sys.executable, "-c", _CHECK_AS_USER], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "(4096, 10000)\n", done.stderr
    last = done.stderr.splitlines()[-1]
    assert "ClusterError: ulimit -u: expected at least" in last
    assert "got 10; raise the limit, as by `ulimit -u unlimited`" in last


def test_python_in_a_folder_by_which_no_worker_starts_is_one_line(tmp_path):
    made = tmp_path / "it's"
    venv.create(made, symlinks=True)
    [packages] = made.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = run(tmp_path / "out", python=made / "bin" / "python")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: Python in {made}/bin/python: expected a path by which Ray can start workers, got one with the "
        "character '; use a virtual environment in another folder\n"
    )


_SHORT_WAIT = """
import runpy, sys
from pipeline.driver import connect
connect._WORKER_SECONDS = 2.0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_workers_that_do_not_start_are_one_line(tmp_path):
    """Here because each is ended as soon as it is Python."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'RAY_RAYLET_PID' in os.environ:\n"
        "    print('OSError: [Errno 24] Too many open files', file=sys.stderr, flush=True)\n    os._exit(1)\n"
    )
    words = ["--epochs", "0", "--address", "local", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_WAIT, ROOT / "jobs" / "evaluate.py", *words],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: Ray: expected it to start a worker, got .*Too many open files; raise `ulimit -n`", last), (
        last
    )


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("accept: Too many open files", "raise `ulimit -n`"),
        ("thd.cc:157] pthread_create failed: Resource temporarily unavailable", "raise `ulimit -u`"),
        ("mmap: Cannot allocate memory", "free memory or run `ulimit -v unlimited`"),
        ("write: No space left on device", "free the disk of Ray's folder and /dev/shm"),
        ("all is well", "end what keeps this machine busy"),
    ],
)
def test_what_a_log_says_has_its_own_advice(tmp_path, log, advice):
    logs = tmp_path / f"session_2026-01-01_00-00-00_000000_{os.getpid()}" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text(f"starting\n{log}\n")
    explained = session.explain(str(tmp_path), "timed out")
    assert advice in explained
    assert str(Path(logs)) in explained
