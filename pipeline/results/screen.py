"""Standard error of a command: how far it is, what it has to say, and how it is asked to end.

Input: progress, messages, what libraries print, signals. Output: text. Invariant: no text stands inside another one's
line, and an interrupt is answered between two pieces of work only.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.results.progress import Progress, StatusLine, is_terminal, progress_parts

# The exit status that a shell gives to a command ended by these signals.
EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
_LINE_SECONDS = 10.0


class Interrupted(BaseException):
    """The user, or the system, asked the job to end; no error, so that nothing takes it for one."""


class Signals:
    """The last of Ctrl-C and SIGTERM, which is answered where it is safe.

    An exception raised in the middle of Ray's compiled code would crash the process instead of ending it.
    """

    def __init__(self) -> None:
        self.received = 0
        for signum in EXIT_CODES:
            signal.signal(signum, self._receive)

    def check(self) -> None:
        """Raise `Interrupted` if the job was asked to end."""
        if self.received:
            raise Interrupted

    def _receive(self, signum: int, frame: object) -> None:
        self.received = signum


class Screen(logging.Handler):
    """Progress and messages on standard error: on a terminal a line that is redrawn, else a plain line now and then.

    Messages may come from any thread; the lock is that of every logging handler.
    """

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self._signals = signals
        self._stream = sys.stderr
        self._is_terminal = is_terminal(self._stream)
        self._line: StatusLine | None = None
        self._next_time = time.monotonic() + (0.0 if self._is_terminal else _LINE_SECONDS)
        self._is_inside_line = False
        self._first: Progress | None = None
        self.last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Show how far the job is, if it is time to."""
        if self.last is None or self.last.phase != progress.phase or self.last.units > progress.units:
            self._first = progress
        self.last = progress
        self._show(progress_parts(progress, self._first), progress.share)

    def show_download(self, num_bytes: int, total_bytes: int) -> None:
        """Show how far a download is."""
        done, total = (f"{size / 2**20:.1f}" for size in (num_bytes, total_bytes))
        self._show([f"fetched {done} of {total} MiB of mnist_sample"], num_bytes / total_bytes)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message above the progress."""
        self.write(self.format(record))

    def write(self, message: str) -> None:
        """Write a line that stays, below what a library has begun."""
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full: no reason to end the job
            self.write_to(self._stream, "\n" * self._is_inside_line + f"{message}\n")

    def write_interrupted(self, left_undone: str) -> None:
        """Write the last line of a job that was asked to end, and not behind the ^C that a terminal shows."""
        with contextlib.suppress(OSError):
            if self._signals.received == signal.SIGINT and self._stream.isatty():
                self._stream.write("\r\x1b[2K" if self._is_terminal else "\n")
        self.write(f"interrupted: {left_undone}")

    def write_to(self, stream: TextIO, text: str) -> int:
        """Write what a library prints; its line is not redrawn before it ends."""
        with self._locked():
            self.clear()
            self._is_inside_line = not text.endswith("\n") if text else self._is_inside_line
            return stream.write(text)

    def clear(self) -> None:
        """Erase the progress."""
        with self._locked(), contextlib.suppress(OSError):
            if self._line is not None:
                self._line.clear()

    def _show(self, parts: list[str], share: float | None) -> None:
        self._signals.check()
        now = time.monotonic()
        if now < self._next_time:
            return
        if self._is_inside_line:  # given a moment to end, as otherwise nothing would ever be shown again
            self.write_to(self._stream, "\n")
        self._next_time = now + (0.1 if self._is_terminal else _LINE_SECONDS)
        if not self._is_terminal:
            self.write(", ".join(parts))
            return
        with self._locked(), contextlib.suppress(OSError):
            self._line = self._line or StatusLine(self._stream)
            self._line.draw(parts, share)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


class Printed:
    """Standard error as libraries get it: what they print is written above the progress."""

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        """Write a text."""
        return self._screen.write_to(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy, which has no stream yet
            raise AttributeError(name)
        return getattr(self._stream, name)
