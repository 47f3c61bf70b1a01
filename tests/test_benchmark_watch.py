import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_watch import end_session, read_session, watch

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")


def test_a_session_is_read_and_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert list(read_session(process.pid)) == [process.pid]
        end_session(process.pid)
        assert process.wait() == -signal.SIGKILL
    assert read_session(process.pid) == {}


def test_own_memory_is_told_from_the_children_s(tmp_path):
    child = "data = bytearray(2**27); import time; time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    watched = watch([sys.executable, "-c", code], tmp_path / "out", tmp_path / "err")
    assert watched.exit_code == 0
    assert (tmp_path / "out").read_text() == "done\n"
    assert watched.main_peak_bytes < 2**26 < 2**27 < watched.peak_bytes
    assert watched.wall_s > 0.5
