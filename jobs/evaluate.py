"""The command: evaluate simple classifiers on a labelled image dataset.

Run on this machine as `python jobs/evaluate.py`, or on a cluster as `ray submit cluster.yaml jobs/evaluate.py`.

Input: options. Output: the summary on standard output, progress and messages on standard error, and an exit status.
Invariant: a user's mistake, an interrupt and an output that cannot be written are one line each.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import click

from pipeline import __version__
from pipeline.config import (
    DEVICES,
    FEATURE_DTYPES,
    INCOMPLETE_CLASSES,
    INTERPOLATIONS,
    MODES,
    NEIGHBORS_OF,
    OUTPUTS,
    RESIZES,
    SCORES,
    Config,
)
from pipeline.errors import EvaluationError, OptionError, usage_line, without_secrets
from pipeline.results.progress import Progress, is_terminal, progress_line
from pipeline.results.screen import EXIT_CODES, Interrupted, Printed, Screen, Signals
from pipeline.results.summary import print_summary, summary

Number = TypeVar("Number", int, float)
_DEFAULTS = Config()


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
    if value is None:
        return ()
    try:
        names = next(csv.reader([value], skipinitialspace=True))
    except csv.Error as exc:
        raise click.BadParameter(f"expected names and commas, got {value!r}; put such names in double quotes") from exc
    # A blank at an end, which a class may have, is given in quotes.
    return tuple(name if '"' in value else name.strip() for name in names) or ("",)


def _scores(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str:
    """Tell the word from the file; each may be given once."""
    words, names = ([value for value in values if (value in SCORES) == is_word] for is_word in (True, False))
    if len(words) > 1 or len(names) > 1:
        twice = ", ".join(words if len(words) > 1 else names)
        raise click.BadParameter(f"expected one of {', '.join(SCORES)}, and one file, got {twice}; leave one out")
    context.params["scores_file"] = names[0] if names else None
    return words[0] if words else _DEFAULTS.scores


class _Option(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heading = heading


class _Command(click.Command):
    """A command whose help has headings, and whose usage errors are one line."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        by_heading: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                by_heading.setdefault(getattr(parameter, "heading", "Other"), []).append(record)
        for heading, records in by_heading.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        """Parse the command line; if it cannot be parsed, end with one line that says why, and status 2."""
        try:
            return super().make_context(*args, **settings)
        except click.UsageError as exc:
            # As in commands.py, which `ray submit` leaves behind.
            click.echo(f"error: {usage_line(exc)}", err=True)
            sys.exit(2)


_data_option = partial(click.option, cls=_Option, heading="Data")
_model_option = partial(click.option, cls=_Option, heading="Model of your own")
_training_option = partial(click.option, cls=_Option, heading="Training")
_cluster_option = partial(click.option, cls=_Option, heading="Cluster")
_results_option = partial(click.option, cls=_Option, heading="Results")


@click.command(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 bad usage, 130 and 143 interrupted.",
)
@_data_option("--data", default=_DEFAULTS.data, help="digits, mnist_sample, or a folder, file, glob or URI.")
@_data_option(
    "--classes", callback=_names, help='Use only these classes, as 3,7 or cat,"salt, pepper".  [default: all]'
)
@_data_option("--exclude-classes", callback=_names, help="Use all classes but these.")
@_data_option("--label-column", default=None, help="Column of the classes in Parquet files.  [default: the usual ones]")
@_data_option("--image-column", default=None, help="Column of the images in Parquet files.  [default: the usual ones]")
@_data_option("--train-split", default=_DEFAULTS.train_split, help="Folder of the training images.")
@_data_option(
    "--valid-split", default=_DEFAULTS.valid_split, help="Folder of the validation images; also val, validation, test."
)
@_data_option("--valid-fraction", type=float, help="Share to hold out of a dataset without splits, as 0.2.")
@_data_option(
    "--incomplete-classes",
    type=click.Choice(INCOMPLETE_CLASSES),
    default=_DEFAULTS.incomplete_classes,
    help="Classes without images in one split: fail, or go on without them.",
)
@_data_option("--size", default=_DEFAULTS.size, help="Height and width in pixels, as 28x28, or auto.")
@_data_option("--mode", type=click.Choice(MODES), default=_DEFAULTS.mode, help="Grey or colour.")
@_data_option("--draft/--no-draft", default=_DEFAULTS.draft, help="Decode very large JPEG files at a reduced scale.")
@_data_option("--cache", default=None, help="Folder or URI that keeps decoded images for the next run.")
@_data_option("--cache-gib", type=float, help="Size limit of the cache; the least recently used entries are removed.")
@_model_option(
    "--model", default=None, help="File or URI of a program that torch.export saved; it is run, so take your own only."
)
@_model_option(
    "--model-output", type=click.Choice(OUTPUTS), default=_DEFAULTS.model_output, help="A number a class, or features."
)
@_model_option(
    "--model-classes", default=None, help="File with a name a line for its logits.  [default: the dataset's]"
)
@_model_option(
    "--model-size", default=_DEFAULTS.model_size, help="Height and width that it takes, as 224x224, or auto."
)
@_model_option("--model-mean", default=_DEFAULTS.model_mean, help="Taken off pixels from 0 to 1; three, or imagenet.")
@_model_option("--model-std", default=_DEFAULTS.model_std, help="What the rest is divided by; three, or imagenet.")
@_model_option("--model-resize", type=click.Choice(RESIZES), default=_DEFAULTS.model_resize, help="How images fit it.")
@_model_option("--model-crop-pct", type=float, help="Share of the sides that it sees.  [default: 1, or 0.875 of crop]")
@_model_option(
    "--model-interpolation",
    type=click.Choice(INTERPOLATIONS),
    default=_DEFAULTS.model_interpolation,
    help="Filter of the resizing.",
)
@_model_option("--model-batch-size", type=int, help="Images of a batch.  [default: that of the export, or 32]")
@_model_option(
    "--feature-dtype",
    type=click.Choice(FEATURE_DTYPES),
    default=_DEFAULTS.feature_dtype,
    help="What features are kept as.",
)
@_training_option("--epochs", type=int, default=_DEFAULTS.epochs, help="Passes of SGD; 0 leaves the linear model out.")
@_training_option(
    "--neighbors", default="auto", callback=_number_or_auto, help="Nearest training images of each image; 0 for none."
)
@_training_option(
    "--neighbors-of",
    type=click.Choice(NEIGHBORS_OF),
    default=_DEFAULTS.neighbors_of,
    help="Whose neighbors: valid, or all.",
)
@_training_option(
    "--scores",
    multiple=True,
    default=[_DEFAULTS.scores],
    callback=_scores,
    help="auto, top or all: what is kept of an image. Or a Parquet or CSV file, as ./top, of predictions made "
    "elsewhere: evaluated too. Given twice, both.",
)
@_training_option("--learning-rate", default="auto", callback=_real_or_auto, help="Step size of SGD.")
@_training_option("--batch-size", type=int, default=_DEFAULTS.batch_size, help="Images of a step, over all lanes.")
@_training_option("--lanes", type=int, default=_DEFAULTS.lanes, help="Parts of a step's gradient; the most actors.")
@_training_option("--seed", type=int, default=_DEFAULTS.seed, help="Seed of the images' order.")
@_training_option("--target-accuracy", type=float, help="Stop at this validation accuracy, as 0.98.")
@_training_option("--patience", type=int, help="Stop after so many epochs without a better validation accuracy.")
@_training_option("--max-seconds", type=float, help="Stop training at the end of the epoch that passes this time.")
@_cluster_option("--address", default=None, help="Ray cluster to join.  [default: the one found, else a local one]")
@_cluster_option("--min-nodes", type=int, default=_DEFAULTS.min_nodes, help="Nodes with CPUs to wait for.")
@_cluster_option(
    "--wait-seconds", type=float, default=_DEFAULTS.wait_seconds, help="Limit of the wait for the cluster."
)
@_cluster_option("--actors", default="auto", callback=_number_or_auto, help="Computing processes.")
@_cluster_option("--device", type=click.Choice(DEVICES), default=_DEFAULTS.device, help="Device of the actors.")
@_cluster_option("--gpus-per-actor", type=float, default=_DEFAULTS.gpus_per_actor, help="Share of a GPU per actor.")
@_cluster_option("--shard-images", default="auto", callback=_number_or_auto, help="Images of a shard, at most.")
@_cluster_option(
    "--read-concurrency", default="auto", callback=_number_or_auto, help="Files that a process reads at a time."
)
@_cluster_option("--scratch", default=None, help="Folder for images that memory cannot hold.  [default: TMPDIR]")
@_results_option("--out", default=None, help="Folder or URI for the results.  [default: results/<UTC time>]")
@_results_option("--overwrite", is_flag=True, help="Replace the results in --out.")
@_results_option("--resume", is_flag=True, help="Go on from the last saved epoch of an unfinished run in --out.")
@_results_option("--report/--no-report", default=_DEFAULTS.report, help="Write a page with pictures, report.html.")
@_results_option("--example", default=None, help="Key of the image that the page shows as numbers.")
@_results_option("--json", "is_json", is_flag=True, help="Print what run.json holds, as one JSON object.")
@click.version_option(__version__, prog_name="image-baseline", message="%(prog)s %(version)s")
def main(is_json: bool, **options: Any) -> None:
    """Evaluate simple classifiers on a labelled image dataset, in parallel on Ray.

    Prints accuracies; writes all figures and one row per image as Parquet files.
    """
    _prepare_streams()
    signals = Signals()
    screen = Screen(signals)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[screen])
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.captureWarnings(True)
    # NumPy's own threads are not used here, and their start costs a tenth of a second in each process.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        if options["resume"] and options["out"] is None:
            raise OptionError("--resume: expected --out beside it, got none; name the folder of the unfinished run")
        # Those that are left out are None, which is no value of some of them.
        config = Config(**{name: given for name, given in options.items() if given is not None})
        # Imported here, after the signal handlers are set: while Ray loads, a Ctrl-C would end in a traceback.
        from pipeline.driver import job
        from pipeline.driver.imports import leave_pandas_out

        leave_pandas_out()
        try:
            # Ray prints the messages of its node manager on standard output, which is for the summary alone.
            printed: Any = Printed(screen, sys.stderr)
            with _output_kept(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                run = job.evaluate(config, screen.show, screen.show_download)
        finally:
            screen.clear()
    except OptionError as exc:
        screen.write(f"error: {exc}")
        sys.exit(2)
    except EvaluationError as exc:
        screen.write(f"error: {exc}")
        sys.exit(1)
    except Interrupted:
        screen.write_interrupted(_left_undone(screen.last, config))
        # Ray is left already; an orderly end can abort in a thread of compiled code, of Ray or of the listing.
        os._exit(EXIT_CODES[signals.received])
    gc.freeze()  # a last collection at exit takes a tenth of a second
    try:
        _print_run(run, is_json=is_json)
    except OSError as exc:
        screen.write(
            f"error: standard output: expected it to take the summary, got {exc.strerror}; the results are complete "
            f"in {run['out']}"
        )
        # At exit, Python would try once more to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextlib.contextmanager
def _output_kept() -> Iterator[None]:
    """Keep standard output for the summary: what processes that are started here write there goes to standard error."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        with contextlib.suppress(OSError):  # standard error is closed
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _prepare_streams() -> None:
    """Make standard output and error take any text: where they are closed, and where their encoding lacks a letter."""
    # A file that is opened later would get the number of a closed stream, and what is written to it.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123,SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_run(run: Mapping[str, Any], *, is_json: bool) -> None:
    if is_json:
        click.echo(json.dumps(run))
    elif is_terminal(sys.stdout):
        print_summary(run, sys.stdout)
    else:
        click.echo(summary(run))


def _left_undone(last: Progress | None, config: Config) -> str:
    if last is None or last.phase == "start":
        return "nothing was evaluated"
    out = without_secrets(config.out)
    if last.phase == "report":
        return f"the results in {out} are complete; make the page with python jobs/report.py {out}"
    is_trained = last.phase in ("neighbors", "score", "duplicates") and config.epochs > 0
    has_epochs = config.resume or is_trained or (last.epoch or 0) > 1
    again = f"go on with {_command_to_resume(config)}" if has_epochs else "run again"
    return f"{progress_line(last)}; {out} is unfinished, {again}"


def _command_to_resume(config: Config) -> str:
    words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
    if not any(word.split("=")[0] == "--out" for word in words):
        words += ["--out", config.out]
    return without_secrets(shlex.join([sys.executable, *words, "--resume"]))


if __name__ == "__main__":
    main()
