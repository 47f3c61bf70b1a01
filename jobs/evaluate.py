"""The command: how far do the simplest honest classifiers get on a labelled image dataset, and where do they fail?

Runs on this machine as `python jobs/evaluate.py`, and on a cluster as `ray submit cluster.yaml jobs/evaluate.py`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.config import DEVICES, MODES, Config
from pipeline.errors import EvaluationError, OptionError, without_secrets
from pipeline.results.terminal import Progress, progress_line, summary

# What a shell says of a command ended by Ctrl-C, and by a request to end.
_EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
_LINE_SECONDS = 10.0
Number = TypeVar("Number", int, float)
_DEFAULTS = Config()


class _Interrupted(BaseException):
    """The user, or the system, asked the job to end; no `except Exception` may hold it up."""


class _Signals:
    """What was asked by Ctrl-C or SIGTERM, to be answered where it is safe.

    An exception raised in the middle of Ray's compiled code would crash the process instead of ending it.
    """

    def __init__(self) -> None:
        self.received = 0
        for signum in _EXIT_CODES:
            signal.signal(signum, self._receive)

    def check(self) -> None:
        """Raise `_Interrupted` if the job was asked to end."""
        if self.received:
            raise _Interrupted

    def _receive(self, signum: int, frame: object) -> None:
        self.received = signum


class _Screen:
    """Progress on standard error: one line that changes on a terminal, else a plain line now and then."""

    def __init__(self, signals: _Signals) -> None:
        self._signals = signals
        self._is_terminal = sys.stderr.isatty()
        self._next_time = time.monotonic() + (0.0 if self._is_terminal else _LINE_SECONDS)
        self._width = 0
        self.last: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Show where the work is, if it is time to."""
        self.last = progress
        self._write(progress_line(progress))

    def show_download(self, num_bytes: int, total_bytes: int) -> None:
        """Show how far a download is."""
        filled = 30 * num_bytes // total_bytes
        bar = "#" * filled + "-" * (30 - filled)
        self._write(f"fetching mnist_sample [{bar}] {num_bytes / 2**20:.1f} of {total_bytes / 2**20:.1f} MiB")

    def clear(self) -> None:
        """Make room for a line that stays."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)
            self._width = 0

    def _write(self, line: str) -> None:
        self._signals.check()
        now = time.monotonic()
        if now < self._next_time:
            return
        self._next_time = now + (0.1 if self._is_terminal else _LINE_SECONDS)
        if self._is_terminal:
            click.echo("\r" + line.ljust(self._width), err=True, nl=False)
            self._width = len(line)
        else:
            click.echo(line, err=True)


def _number_or_auto(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    return None if value == "auto" else _parse(int, value, "auto or a whole number")


def _real_or_auto(context: click.Context, parameter: click.Parameter, value: str) -> float | None:
    return None if value == "auto" else _parse(float, value, "auto or a number")


def _parse(kind: Callable[[str], Number], value: str, expected: str) -> Number:
    try:
        return kind(value)
    except ValueError as exc:
        raise click.BadParameter(f"expected {expected}, got {value}; leave it at auto") from exc


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", default=_DEFAULTS.data, help="digits, mnist_sample, or a folder or URI of class folders.")
@click.option("--out", default=None, help="Folder or URI for the results.  [default: results/<UTC time>]")
@click.option("--classes", callback=_names, help="Only these classes, as 3,7.  [default: all]")
@click.option("--train-split", default=_DEFAULTS.train_split, help="Folder of the images to train on.")
@click.option("--valid-split", default=_DEFAULTS.valid_split, help="Folder to validate on; also val, validation, test.")
@click.option("--valid-fraction", type=float, help="Share to hold out of a dataset without splits, as 0.2.")
@click.option("--size", default=_DEFAULTS.size, help="HxW in pixels, or auto.")
@click.option("--mode", type=click.Choice(MODES), default=_DEFAULTS.mode, help="Grey or colour.")
@click.option("--draft/--no-draft", default=_DEFAULTS.draft, help="Decode far too large JPEG at a reduced scale.")
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, help="Passes of SGD; 0 leaves it out.")
@click.option("--learning-rate", default="auto", callback=_real_or_auto, help="Length of a step of SGD.")
@click.option("--batch-size", type=int, default=_DEFAULTS.batch_size, help="Images of a step, over all lanes.")
@click.option("--seed", type=int, default=_DEFAULTS.seed, help="Of the first weights and the images' order.")
@click.option("--target-accuracy", type=float, help="Stop when the validation accuracy reaches this, as 0.98.")
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation accuracy.")
@click.option("--max-seconds", type=float, help="Stop training at the end of the epoch that passes this time.")
@click.option("--actors", default="auto", callback=_number_or_auto, help="Computing processes.")
@click.option("--device", type=click.Choice(DEVICES), default=_DEFAULTS.device, help="What they compute on.")
@click.option("--gpus-per-actor", type=float, default=_DEFAULTS.gpus_per_actor, help="Share of a GPU for each.")
@click.option("--lanes", type=int, default=_DEFAULTS.lanes, help="Parts of a step's gradient; the most actors.")
@click.option("--shard-images", default="auto", callback=_number_or_auto, help="Images of a shard, at most.")
@click.option("--address", default=None, help="Ray cluster to join.  [default: the one found, else a local one]")
@click.option("--cache", default=None, help="Folder or URI that keeps decoded images for the next run.")
@click.option("--cache-gib", type=float, help="What it may hold; what was not used for longest goes.")
@click.option("--scratch", default=None, help="Folder for what memory cannot hold.  [default: TMPDIR]")
@click.option("--min-nodes", type=int, default=_DEFAULTS.min_nodes, help="Nodes with CPUs to wait for.")
@click.option("--wait-seconds", type=float, default=_DEFAULTS.wait_seconds, help="How long to wait for nodes and GPUs.")
@click.option("--overwrite", is_flag=True, help="Replace the results in --out.")
@click.option("--resume", is_flag=True, help="Go on from the last saved epoch of an unfinished run in --out.")
@click.option("--json", "is_json", is_flag=True, help="Print the summary as one JSON object.")
def main(is_json: bool, **options: Any) -> None:
    """Evaluate nearest class means and a linear model on a labelled image dataset.

    Writes accuracies and one row per image as Parquet. Exit status: 0 done, 1 failed, 2 bad usage.
    """
    # Where a stream is closed, what would be written to it is to go nowhere, and not into a file opened later.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123,SIM115
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    signals = _Signals()
    screen = _Screen(signals)
    # NumPy's own threads, for which nothing here has work, spin while they start: a tenth of a second in each process.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        has_default = ("out", "scratch")  # that of Config, which differs from run to run
        config = Config(**{name: given for name, given in options.items() if name not in has_default or given})
        # Here, because it loads Ray, during which a Ctrl-C would end in a traceback.
        from pipeline.driver import job
        from pipeline.driver.imports import leave_pandas_out

        leave_pandas_out()
        # Ray prints what its node manager has to say where only the summary belongs.
        with contextlib.redirect_stdout(sys.stderr):
            run = job.evaluate(config, screen.show, screen.show_download)
    except OptionError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(2)
    except EvaluationError as exc:
        screen.clear()
        click.echo(f"error: {exc}", err=True)
        sys.exit(1)
    except _Interrupted:
        screen.clear()
        click.echo(f"interrupted: {_left_undone(screen.last, config)}", err=True)
        sys.stderr.flush()
        # Ray is left already; an orderly end can abort in a thread of compiled code, of Ray or of the listing.
        os._exit(_EXIT_CODES[signals.received])
    screen.clear()
    gc.freeze()  # to look all through once more before the end takes a tenth of a second
    # A path may hold bytes that are no text.
    click.echo(json.dumps(run) if is_json else summary(run).encode(errors="backslashreplace").decode())


def _left_undone(last: Progress | None, config: Config) -> str:
    if last is None or last.phase == "start":
        return "nothing was evaluated"
    has_epochs = config.resume or last.phase == "score" or (last.epoch or 0) > 1
    out = without_secrets(config.out)
    again = f"go on with --resume --out {out}" if has_epochs else "run again"
    return f"{progress_line(last)}; {out} is unfinished, {again}"


if __name__ == "__main__":
    main()
