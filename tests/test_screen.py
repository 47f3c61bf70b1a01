import os
import signal
import sys
from types import SimpleNamespace

import pytest
from test_evaluate import terminal_of

from pipeline.results.screen import Screen


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_no_message_stands_behind_another_text(monkeypatch, term):
    terminal, finish = terminal_of(80)
    monkeypatch.setenv("TERM", term)
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        signals = SimpleNamespace(received=signal.SIGINT, check=lambda: None)
        screen = Screen(signals)
        screen.write_to(stream, "half a line of a library")
        screen.write("a message")
        stream.write("^C")  # as the terminal shows it
        screen.write_interrupted("nothing was evaluated")
    left = [line.rpartition("\x1b[2K")[2].rstrip("\r") for line in finish().split("\n")]
    assert [line for line in left if line != "^C"] == [
        "half a line of a library", "a message", "interrupted: nothing was evaluated", ""
    ]  # fmt: skip
