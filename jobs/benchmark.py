"""The benchmark: this program and its alternatives, on the same work, in turn, in one call.

Input: the name of a workload and, for most, a folder of `train/<class>/` and `valid/<class>/`. Output: a table on
standard output, and every run and every figure as Parquet. Invariant: each run is a new process, and times are compared
only where the answers are equal.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

import benchmarks.data as datasets
from benchmarks.cases import DEFAULTS, KNOWN, MADE_IMAGES, Case, Options, make_cases
from benchmarks.model import LOOPS
from benchmarks.peers import PEERS
from benchmarks.request import Answer, evaluate_answer
from benchmarks.search import SEARCHES
from benchmarks.store import stored
from benchmarks.table import Figure, Run, compare_sizes, format_table, summarise, write_runs
from benchmarks.watch import INTERRUPTS, watch
from commands import OneLineCommand

_EVALUATES = ("evaluate", "evaluate_first", "evaluate_again", "evaluate_local", "evaluate_free")
# Decoded in full and resized by Pillow, images are equal bit for bit, and so are the answers.
_SAME_CHECKSUM = 1e-5
# With a decoder at a reduced scale, or another resizer: the share of `valid` whose prediction may differ, and the
# difference of the mean pixel (0 to 1).
_LOOSE_CORRECT, _LOOSE_CHECKSUM = 0.02, 0.01
_LOOSE = {
    "photos": frozenset(("evaluate", "ray_data_map_batches", "daft")),
    "store_photos": frozenset(("evaluate", "evaluate_local")),
    "model": frozenset(LOOPS),
    # Sums in another order; scikit-learn trains another model.
    "sgd": frozenset(("torch_loop", "torch_loop_threads", "sklearn_sgd")),
    # Distances in float32, and ties as they come.
    "neighbors": frozenset(("faiss_flat", "faiss_as_installed", "sklearn_brute")),
    "scaling": frozenset(("torch_loop_threads",)),
}
_LAST_LINES = 8
# The phase of `evaluate` that a workload is about, where it is not decoding.
_PHASES = {"classes": "score"}


def missing_package(name: str, daft_python: str) -> str | None:
    """Name the package that a command needs and that is not installed, in an error message; None if all are there."""
    needs = {"ray_data": "pandas", "sklearn": "sklearn", "daft": "daft", "faiss": "faiss"}
    for start, module in needs.items():
        is_here = daft_python != sys.executable if module == "daft" else False
        if name.startswith(start) and not is_here and importlib.util.find_spec(module) is None:
            how = "an environment of its own, --daft-python" if module == "daft" else "the extra `bench`"
            return f"{name}: expected {module}, got no such package; it comes with {how}"
    return None


def measure(name: str, index: int, case: Case, options: Options) -> tuple[Run, Answer]:
    """Run a command once, as a process of its own.

    Raises:
        click.ClickException: If it fails; the message ends with the last lines of its standard error.
    """
    jobs = Path(__file__).resolve().parent
    num_requests = None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = None
        if case.bucket and name not in ("evaluate_local", "limit"):
            (Path(folder) / "buckets").mkdir()
            (Path(folder) / "buckets" / "images").symlink_to(case.bucket)
            server = stack.enter_context(stored(Path(folder) / "buckets", case.latency_ms))
            endpoint = f"http://127.0.0.1:{server.port}"
            case = replace(
                case,
                options=("--data", f"s3://images?{server.query}&anonymous=true", *case.options[2:]),
                request={**case.request, "endpoint": endpoint, "bucket": "images"},
            )
        out, err, results = Path(folder, "out"), Path(folder, "err"), Path(folder, "results")
        python = sys.executable
        if name.startswith(
            "daft"
        ):  # an absolute path, since the working folder is another; not that of a link's target
            python = str(Path(shutil.which(options.daft_python) or options.daft_python).absolute())
        if name in _EVALUATES:
            more = case.more if name == "evaluate_free" else ()
            command = [python, str(jobs / "evaluate.py"), *case.options, *more, "--json", "--out", str(results)]
        else:
            tables: dict[str, Mapping[str, object]] = {
                "benchmarks.peers": PEERS, "benchmarks.search": SEARCHES, "benchmarks.model": LOOPS,
            }  # fmt: skip
            module = next((module for module, table in tables.items() if name in table), "benchmarks.parts")
            command = [python, "-m", module, name, json.dumps(case.request)]
        if name == "evaluate_first":
            shutil.rmtree(options.work / "cache", ignore_errors=True)
        watched = watch(command, out, err, jobs)
        if watched.exit_code:
            last = "\n".join(err.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise click.ClickException(
                f"{name}: expected exit status 0, got {watched.exit_code}; see its standard error:\n{last}"
            )
        found = json.loads(out.read_text().splitlines()[-1])
        answer = (
            evaluate_answer(found, results, _PHASES.get(case.workload, "decode"))
            if name in _EVALUATES
            else Answer(**found)
        )
        stack.close()
        num_requests = sum(server.num_requests.values()) if server else None
    row = {key: value for key, value in {**asdict(watched), **asdict(answer)}.items() if key in Run.__annotations__}
    return Run(case=case.title, command=name, run=index, num_requests=num_requests, **row), answer


def check_answers(answers: Mapping[str, Answer], loose: frozenset[str] = frozenset()) -> None:
    """Compare every command's answer with that of the first one that classifies, if possible one that is not loose.

    The number of images must be equal; the number of correct predictions too, and the checksum to 1e-5. For `loose`
    commands the correct predictions may differ by 2 % of the validation images, and the checksum by 0.01.

    Raises:
        click.ClickException: If two differ: their times cannot be compared.
    """
    whole = [name for name, answer in answers.items() if answer.num_correct is not None] or list(answers)
    first = next((name for name in whole if name not in loose), whole[0])
    expected = answers[first]
    for name, answer in answers.items():
        is_loose = bool({name, first} & loose)
        max_correct = _LOOSE_CORRECT * (expected.num_valid or 0) if is_loose else 0
        max_checksum = _LOOSE_CHECKSUM if is_loose else _SAME_CHECKSUM
        is_equal = answer.num_images == expected.num_images
        if answer.num_correct is not None and expected.num_correct is not None:
            is_equal &= answer.num_valid == expected.num_valid
            is_equal &= abs(answer.num_correct - expected.num_correct) <= max_correct
        if answer.checksum is not None and expected.checksum is not None:
            is_equal &= abs(answer.checksum - expected.checksum) <= max_checksum
        if not is_equal:
            raise click.ClickException(
                f"{name}: expected {_answer_text(expected)} as {first} found, got {_answer_text(answer)}; "
                "times are compared for equal answers only"
            )


def _answer_text(answer: Answer) -> str:
    words = f"{answer.num_images:,} images"
    if answer.num_correct is not None:
        words += f", {answer.num_correct:,} of {answer.num_valid:,} correct"
    return words if answer.checksum is None else f"{words}, checksum {answer.checksum:.7g}"


def run_rounds(options: Options, cases: Sequence[Case], num_runs: int, num_warm_ups: int, runs: list[Run]) -> None:
    """Run all commands of all cases, round by round; finished runs are added to `runs`, except the warm-ups.

    Raises:
        click.ClickException: If a command fails or gives another answer.
    """
    for index in range(1 - num_warm_ups, num_runs + 1):
        for case in cases:
            answers: dict[str, Answer] = {}
            for name in case.commands:
                run, answers[name] = measure(name, index, case, options)
                which = f"round {index} of {num_runs}" if index > 0 else "warm-up"
                click.echo(f"{which}: {case.title}: {name} {run.wall_s:.2f} s", err=True)
                runs += [run] if index > 0 else []
            check_answers(answers, _LOOSE.get(case.workload, frozenset()))


def figures_of(runs: Sequence[Run], cases: Sequence[Case]) -> list[Figure]:
    """Summarise the runs; where there are several sizes, compare each with the one before as well."""
    figures = summarise(runs, {case.title: case.base for case in cases})
    if cases[0].workload in MADE_IMAGES:
        for small, large in pairwise(cases):
            figures += compare_sizes(runs, small.title, large.title)
    return figures


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    words = value.split(",") if value else []
    if not all(word.strip().isdigit() and int(word) for word in words):
        raise click.BadParameter(f"expected whole numbers, got {value}; separate them by commas, as 250000,1000000")
    return tuple(int(word) for word in words)


def choose(workload: str, only: str | None, daft_python: str) -> tuple[str, ...]:
    """Choose the commands: those named by --only, or the defaults whose packages are installed.

    Raises:
        click.UsageError: If a name is not known, or its package is not installed.
    """
    known = KNOWN[workload]
    names = tuple(dict.fromkeys(name.strip() for name in only.split(","))) if only else DEFAULTS[workload]
    for name in names:
        if name not in known:
            raise click.UsageError(f"--only: expected some of {', '.join(known)}, got {name}; separate them by commas")
    lacks = {name: words for name in names if (words := missing_package(name, daft_python))}
    if only and lacks:
        raise click.UsageError(next(iter(lacks.values())))
    for words in lacks.values():
        click.echo(f"left out: {words}", err=True)
    return tuple(name for name in names if name not in lacks)


@click.command(cls=OneLineCommand, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--workload", type=click.Choice(tuple(DEFAULTS)), default="mnist", help="What is done.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of train, valid; most workloads need one.")
@click.option(
    "--images",
    "num_images",
    callback=_numbers,
    help="For many, photos, classes, store.  [default: 250000,1000000; 2000; 20000; all]",
)
@click.option("--form", type=click.Choice(("folder", *datasets.FORMS)), default="folder", help="What evaluate reads.")
@click.option("--latency-ms", "latencies_ms", callback=_numbers, default="30", help="Of the workloads of a store.")
@click.option("--shards", "num_shards", type=click.IntRange(min=8), default=4000, help="For driver.")
@click.option("--runs", "num_runs", type=click.IntRange(min=1), default=5, help="Rounds after those that warm up.")
@click.option("--warm-ups", "num_warm_ups", type=click.IntRange(min=0), default=1, help="Rounds that do not count.")
@click.option("--only", help="Some of the workload's commands, by commas.  [default: the usual ones]")
@click.option(
    "--work", type=click.Path(file_okay=False, path_type=Path), help="Keep what is datasets.  [default: removed]"
)
@click.option("--daft-python", default=sys.executable, help="Python of an environment with Daft.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark.parquet", help="All runs.")
def main(num_runs: int, num_warm_ups: int, only: str | None, work: Path | None, out: Path, **given: Any) -> None:
    """Compare the times of this program and its peers.

    Exit status: 0 done, 1 a command failed or gave another answer, 2 bad usage.
    """
    for signum in INTERRUPTS:
        signal.signal(signum, signal.default_int_handler)
    names = choose(given["workload"], only, given["daft_python"])
    if given["form"] != "folder":
        names = tuple(name for name in names if name in _EVALUATES)
    runs: list[Run] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(names=names, work=(work or Path(folder)).resolve(), **given)
            cases = make_cases(options)
            run_rounds(options, cases, num_runs, num_warm_ups, runs)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {len(runs)} runs were done, none is written", err=True)
        sys.exit(130)
    figures = figures_of(runs, cases)
    write_runs(out, runs, figures)
    click.echo(format_table(figures, {case.title: case.base for case in cases}))


if __name__ == "__main__":
    main()
