"""How far a job is: plain lines in a log, one that is redrawn by `rich` on a terminal.

Input: `Progress` records. Output: text. Invariant: `rich`, 30 ms of start-up, is loaded only where a terminal is
attached; both forms say the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_BAR_STEP, _MAX_BAR = 10, 30


@dataclass(frozen=True)
class Progress:
    """How far a phase is.

    Attributes:
        phase: `start`, `nodes`, `GPUs`, `scan`, `times`, `decode`, `means`, `train`, `neighbors`, `score`,
            `duplicates` or `report`.
        done: Nodes or GPUs that are there, archives indexed, files whose times are known, images decoded or skipped,
            steps of the epoch, parts written, or buckets of digests grouped.
        total: Of how many.
        seconds: Since the phase began.
        epoch: While training, the epoch under way, from 1.
        num_epochs: The most epochs there will be.
        loss: While training, the mean training loss of the last finished epoch, in nats.
    """

    phase: str
    done: int
    total: int
    seconds: float
    epoch: int | None = None
    num_epochs: int | None = None
    loss: float | None = None

    @property
    def units(self) -> tuple[int, int]:
        """Units done and in all; those of training are the steps of all epochs."""
        if self.epoch is None or self.num_epochs is None or self.phase != "train":
            return self.done, self.total
        return (self.epoch - 1) * self.total + self.done, self.num_epochs * self.total

    @property
    def share(self) -> float | None:
        """The share that is done, 0 to 1; None where it cannot be known."""
        done, total = self.units
        return None if self.phase in ("start", *_WAITS) or total == 0 else done / total


# What is of an unknown length.
_WAITS = {
    "scores": ["the images are listed", "matching the scores with them"],
    "means": ["all images are decoded", "computing the class means"],
    "duplicates": ["all images are scored", "grouping those with the same pixels"],
    "report": ["the results are complete", "making the page"],
}


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines on a stream can be redrawn; a dumb terminal is a log."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def progress_line(progress: Progress, first: Progress | None = None) -> str:
    """Say in one line how far the work is, how fast, and how long it still takes."""
    return ", ".join(progress_parts(progress, first))


def progress_parts(progress: Progress, first: Progress | None = None) -> list[str]:
    """Say how far the work is: the main thing, then details, of which the last is the most important.

    Args:
        progress: As it stands.
        first: The first progress of the phase in this run: a resumed training does not begin at zero.
    """
    done, total = f"{progress.done:,}", f"{progress.total:,}"
    match progress.phase:
        case "start":
            return ["starting Ray and listing the images"]
        case "nodes" | "GPUs":
            return [f"waiting for the cluster's {progress.phase}", f"{done} of {total} are there"]
        case "scan":
            return [f"indexed {done} of {total} archives"]
        case "times":
            return [f"looked up {done} of {total} files for the cache"]
        case "decode" if progress.done == 0:
            return [f"starting to decode {total} images"]
        case "decode":
            return [f"decoded {done} of {total} images", *_speed(progress, first)]
        case "scores" | "means" | "duplicates" | "report":
            return _WAITS[progress.phase]
        case "neighbors":
            return [f"searched the neighbors of {done} of {total} images", *_speed(progress, first)]
        case "train":
            loss = [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
            speed = [] if first is None else _speed(progress, first)
            return [f"epoch {progress.epoch} of {progress.num_epochs}", f"step {done} of {total}", *loss, *speed]
        case _:
            return [f"scored {done} of {total} prediction files", *_speed(progress, first)]


def _speed(progress: Progress, first: Progress | None) -> list[str]:
    """Return the mean rate of the phase and the time left at that rate; nothing before there is a rate."""
    done, total = progress.units
    num_done = done - (first.units[0] if first else 0)
    seconds = progress.seconds - (first.seconds if first else 0.0)
    if num_done <= 0 or seconds <= 0:
        return []
    rate = num_done / seconds
    return [
        f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second",
        f"{_duration((total - done) / rate)} left",
    ]


class StatusLine:
    """The last line of a terminal, which is redrawn in place, as wide as the terminal at most.

    This is not `rich.progress.Progress`, which hides the cursor: where Ray's compiled code ends the process, the
    terminal would stay without one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = make_console(stream)
        self._is_drawn = False

    def draw(self, parts: Sequence[str], share: float | None = None) -> None:
        """Draw a bar, if a share is known and there is space for it, and as many parts of the text as fit."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        _fit_to_terminal(self._console)  # whose size may have changed
        space = self._console.width - 1  # in the last column, terminals wrap
        kept = list(parts)
        while len(kept) > 1 and len(", ".join(kept)) > space:
            kept.pop(-2 if len(kept) > 2 else -1)
        text = Text(", ".join(kept))
        text.truncate(space, overflow="ellipsis")
        # In steps, so that the text stays where it is while its length changes by a digit.
        width = min(_MAX_BAR, (space - text.cell_len - 1) // _BAR_STEP * _BAR_STEP)
        with self._console:  # one write
            self._erase()
            if share is not None and width > 0:
                self._console.print(ProgressBar(1.0, share, width), " ", sep="", end="")
            self._console.print(text, end="")
        self._is_drawn = True

    def clear(self) -> None:
        """Erase the line, before a line that stays."""
        if self._is_drawn:
            self._erase()
            self._is_drawn = False

    def _erase(self) -> None:
        from rich.control import Control
        from rich.segment import ControlType

        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


def make_console(stream: TextIO) -> Console:
    """Prepare a terminal for `rich`, as wide as it is."""
    from rich.console import Console

    console = Console(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False)
    _fit_to_terminal(console)
    return console


def _fit_to_terminal(console: Console) -> None:
    """Take the width of the stream's own terminal: COLUMNS, which `rich` prefers, may be that of another one."""
    with suppress(OSError):
        if columns := os.get_terminal_size(console.file.fileno()).columns:
            console.width = columns


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
