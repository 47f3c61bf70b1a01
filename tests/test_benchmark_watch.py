import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.watch import end_session, read_session, watch

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")


def test_a_session_is_read_and_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert list(read_session(process.pid)) == [process.pid]
        end_session(process.pid)
        assert process.wait() == -signal.SIGKILL
    assert read_session(process.pid) == {}


def test_own_memory_is_told_from_the_children_s(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    child = f"data = bytearray(2**27)\nimport os, time\nwhile not os.path.exists({str(seen)!r}): time.sleep(0.01)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"

    def read_and_tell(session):
        found = read_session(session)
        if any(peak_bytes > 2**27 for _, peak_bytes in found.values()):
            seen.touch()
        return found

    monkeypatch.setattr("benchmarks.watch.read_session", read_and_tell)
    began = time.monotonic()
    watched = watch([sys.executable, "-c", code], tmp_path / "out", tmp_path / "err", tmp_path)
    assert watched.exit_code == 0
    assert (tmp_path / "out").read_text() == "done\n"
    assert watched.main_peak_bytes < 2**26 < 2**27 < watched.peak_bytes
    assert 0 < watched.wall_s < time.monotonic() - began
