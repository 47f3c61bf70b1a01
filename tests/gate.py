"""A gate that the job waits at: what a test does to it there is done at that moment, however fast the machine is."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builders import ROOT

_EVALUATE = ROOT / "jobs" / "evaluate.py"
_GATED = ROOT / "tests" / "evaluate_gated.py"


@dataclass(frozen=True)
class Gate:
    """A job's gate, by the folder that it and the test share."""

    folder: Path

    def arguments(self, moments, folder=None):
        """Return what evaluate_gated.py takes before the job's own arguments; on a host the folder has another name."""
        return str(_EVALUATE), str(folder or self.folder), moments

    @contextmanager
    def held(self, moment, process, said=lambda process: process.communicate(), timeout_s=600):
        """Wait until the job stands still at a moment; it goes on after the context, however that ends."""
        deadline = time.monotonic() + timeout_s
        try:
            while not (self.folder / moment).exists():
                assert process.poll() is None, f"expected {moment}, got the end of the job: {said(process)}"
                assert time.monotonic() < deadline, f"expected {moment} within {timeout_s} s"
                time.sleep(0.01)
            yield
        finally:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{moment}.go").touch()


def gated_command(gate, moment, *args, stderr=subprocess.PIPE, **environment):
    """Start the command as `builders.command` does, to stand still at a moment, as evaluate_gated.py names them."""
    return subprocess.Popen(
        [sys.executable, str(_GATED), *gate.arguments(moment), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
