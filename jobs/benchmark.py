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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

import benchmarks.data as datasets
from benchmarks.model import LOOPS, export_models
from benchmarks.peers import PEERS
from benchmarks.request import Answer, evaluate_answer
from benchmarks.search import SEARCHES
from benchmarks.store import stored
from benchmarks.table import Figure, Run, compare_sizes, format_table, summarise, write_runs
from benchmarks.watch import INTERRUPTS, watch
from commands import OneLineCommand

_EVALUATES = ("evaluate", "evaluate_first", "evaluate_again", "evaluate_local", "evaluate_free")
_ON_IMAGES = ("evaluate", *(name for name in PEERS if name != "client"))
_ON_STORE = ("evaluate", "evaluate_local", "client", "ray_data_read_images", "daft_decode", "limit")
# The commands of each workload without --only.
_DEFAULTS = {
    "mnist": _ON_IMAGES,
    "many": ("evaluate", "dataloader", "limit"),
    "photos": _ON_IMAGES,
    "sgd": ("actor", "actors_2", "torch_loop", "torch_loop_threads", "sklearn_sgd"),
    "neighbors": tuple(SEARCHES),
    "scaling": ("actor", "actors_2", "torch_loop_threads"),
    "classes": ("evaluate",),
    "cache": ("evaluate_first", "evaluate_again"),
    "driver": ("driver",),
    "model": ("evaluate", "evaluate_free", *LOOPS),
    "store": _ON_STORE,
    "store_photos": _ON_STORE,
}
# The commands that --only can name.
_KNOWN = {**_DEFAULTS, "many": _ON_IMAGES}
_BASES = {
    "sgd": "actor",
    "scaling": "torch_loop_threads",
    "neighbors": "search",
    "cache": "evaluate_again",
    "driver": "driver",
}
_MADE_IMAGES = {"many": (250_000, 1_000_000), "photos": (2000,)}
_CLASS_IMAGES = 20_000
_PHOTO_SIDE = 64
_BATCH_SIZES = {256: ("actor", "torch_loop", "torch_loop_threads", "sklearn_sgd"), 4096: ("actor", "actors_2")}
# Classes, values of an image, images of a step, and epochs, so that each is timed for about a second or more.
_SCALES = ((1000, 12_288, 64, 1), (1000, 12_288, 512, 2), (100, 3072, 256, 5), (10, 784, 256, 20), (10, 784, 64, 10))
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
    "neighbors": frozenset(("faiss_flat", "sklearn_brute")),
    "scaling": frozenset(("torch_loop_threads",)),
}
_LAST_LINES = 8
# Nearest means and nothing else.
_DECODES = ("--epochs", "0", "--neighbors", "0")
_TRAINS = ("--epochs", "10", "--neighbors", "0", "--no-report")
# The phase of `evaluate` that a workload is about, where it is not decoding.
_PHASES = {"classes": "score"}


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several commands.

    Attributes:
        title: Its name in the table.
        workload: The workload that it belongs to.
        commands: The names of the commands.
        request: The request to peers and parts.
        options: Options for `evaluate.py`.
        more: Further ones for `evaluate_free`.
        bucket: The folder that is served as a bucket.
        latency_ms: Of each of its answers.
    """

    title: str
    workload: str
    commands: tuple[str, ...]
    request: dict[str, Any]
    options: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    bucket: Path | None = None
    latency_ms: int = 0

    @property
    def base(self) -> str:
        """The command by whose times the times of the others are divided."""
        return _BASES.get(self.workload, "evaluate")


@dataclass(frozen=True)
class Options:
    """The options that say what is run."""

    workload: str
    names: tuple[str, ...]
    data: Path | None
    work: Path
    num_images: tuple[int, ...]
    form: str
    num_shards: int
    latencies_ms: tuple[int, ...] = ()
    daft_python: str = field(default=sys.executable)


def make_cases(options: Options) -> list[Case]:
    """Make the datasets of the workload below `options.work`, where they do not exist, and return the cases."""
    workload, work = options.workload, options.work
    if workload == "driver":
        title = f"driver, {options.num_shards:,} shards without decoding"
        return [Case(title, workload, options.names, {"num_shards": options.num_shards})]
    if workload == "scaling":
        return [_scaling_case(options, *shape) for shape in _SCALES]
    if workload.startswith("store"):
        return _store_cases(options)
    if make := {"classes": _class_cases, "model": _model_cases}.get(workload):
        return make(options)
    if workload == "photos":
        cases = []
        for number in options.num_images or _MADE_IMAGES["photos"]:
            data = datasets.make_once(work / f"photos-{number}", partial(datasets.make_photographs, num_images=number))
            cases.append(_image_case(options, data, (_PHOTO_SIDE, _PHOTO_SIDE)))
        return cases
    source = _expect_data(options)
    if workload == "sgd":
        arrays = datasets.make_once(work / "arrays", partial(datasets.write_arrays, source))
        return [
            Case(
                f"sgd, batch {batch_size:,}",
                workload,
                tuple(name for name in names if name in options.names),
                {"arrays": str(arrays), "batch_size": batch_size},
            )
            for batch_size, names in _BATCH_SIZES.items()
        ]
    if workload == "neighbors":
        arrays = datasets.make_once(work / "arrays", partial(datasets.write_arrays, source))
        return [Case("neighbors", workload, options.names, {"arrays": str(arrays)})]
    if workload == "many":
        return [
            _image_case(
                options,
                datasets.make_once(work / f"many-{number}", partial(datasets.link_images, source, num_images=number)),
            )
            for number in options.num_images or _MADE_IMAGES["many"]
        ]
    return [_image_case(options, source)]


def _class_cases(options: Options) -> list[Case]:
    number = next(iter(options.num_images or (_CLASS_IMAGES,)))
    data = datasets.make_once(options.work / f"classes-{number}", partial(datasets.make_classes, num_images=number))
    title = f"classes, {number:,} images of 1,000 classes"
    return [Case(title, options.workload, options.names, {}, ("--data", str(data), *_TRAINS))]


def _model_cases(options: Options) -> list[Case]:
    """Make two cases on photographs: a model of ResNet-18's size, and one that costs nothing beside none at all."""
    number = next(iter(options.num_images or _MADE_IMAGES["photos"]))
    data = datasets.make_once(options.work / f"photos-{number}", partial(datasets.make_photographs, num_images=number))
    models = datasets.make_once(options.work / "models", partial(export_models, num_classes=4))
    case = _image_case(options, data, (_PHOTO_SIDE, _PHOTO_SIDE))
    own = ("--model", str(models / "resnet18.pt2"), "--model-output", "embedding")
    free = ("--model", str(models / "free.pt2"))
    pairs = (("evaluate", *LOOPS), ("evaluate", "evaluate_free"))
    resnet, none = (tuple(name for name in names if name in options.names) for names in pairs)
    cases = [
        replace(case, title=f"{case.title}, ResNet-18", commands=resnet, options=(*case.options, *own)),
        replace(case, title=f"{case.title}, free or none", commands=none, more=free),
    ]
    return [each for each in cases if each.commands and (len(each.commands) > 1 or len(options.names) == 1)]


def _scaling_case(options: Options, num_classes: int, num_values: int, batch_size: int, num_epochs: int) -> Case:
    make = partial(datasets.make_noise, num_classes=num_classes, num_values=num_values)
    arrays = datasets.make_once(options.work / f"noise-{num_classes}-{num_values}", make)
    title = f"{num_classes:,} classes of {num_values:,} values, batch {batch_size}"
    request = {"arrays": str(arrays), "batch_size": batch_size, "num_epochs": num_epochs, "num_threads": 2}
    return Case(title, options.workload, options.names, request)


def _store_cases(options: Options) -> list[Case]:
    """Make a case for each latency, of photographs, or of the given images or as many links to them as asked for."""
    size = None
    if options.workload == "store_photos":
        number = next(iter(options.num_images or _MADE_IMAGES["photos"]))
        data = datasets.make_once(
            options.work / f"photos-{number}", partial(datasets.make_photographs, num_images=number)
        )
        size = (_PHOTO_SIDE, _PHOTO_SIDE)
    else:
        data = _expect_data(options)
        for number in options.num_images:
            data = datasets.make_once(
                options.work / f"many-{number}", partial(datasets.link_images, data, num_images=number)
            )
    case = _image_case(options, data, size)
    return [
        replace(case, title=f"{case.title}, {latency_ms} ms", bucket=Path(case.options[1]), latency_ms=latency_ms)
        for latency_ms in options.latencies_ms
    ]


def _image_case(options: Options, data: Path, size: tuple[int, int] | None = None) -> Case:
    """Make the case of a folder of images, or of the same images in another form."""
    request = asdict(datasets.images_request(data, size))
    title = f"{options.workload}, {datasets.count_images(data):,} images"
    if options.form != "folder":
        title += f", {options.form}"
        data = datasets.make_once(
            options.work / f"{data.name}-{options.form}", partial(datasets.FORMS[options.form], data)
        )
    shape = ("--size", f"{size[0]}x{size[1]}", "--mode", request["mode"]) if size else ()
    cache = ("--cache", str(options.work / "cache")) if options.workload == "cache" else ()
    return Case(title, options.workload, options.names, request, ("--data", str(data), *_DECODES, *shape, *cache))


def _expect_data(options: Options) -> Path:
    if options.data is None:
        raise click.UsageError(f"--data: expected a folder for --workload {options.workload}, got none; give one")
    for split in datasets.SPLITS:
        if not (options.data / split).is_dir():
            raise click.UsageError(f"--data: expected train and valid in {options.data}, got no {split}; give another")
    return options.data.resolve()


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
    if cases[0].workload in _MADE_IMAGES:
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
    known = _KNOWN[workload]
    names = tuple(dict.fromkeys(name.strip() for name in only.split(","))) if only else _DEFAULTS[workload]
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
@click.option("--workload", type=click.Choice(tuple(_DEFAULTS)), default="mnist", help="What is done.")
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
