"""The cases of each workload: which commands do which work on which data.

Input: the options of the benchmark. Output: a `Case` for each piece of work, its datasets made. Invariant: the commands
of a case do the same work.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

import benchmarks.data as datasets
from benchmarks.model import LOOPS, export_models
from benchmarks.peers import PEERS
from benchmarks.search import SEARCHES

_ON_IMAGES = ("evaluate", *(name for name in PEERS if name != "client"))
_ON_STORE = ("evaluate", "evaluate_local", "client", "ray_data_read_images", "daft_decode", "limit")
# The commands of each workload without --only.
DEFAULTS = {
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
KNOWN = {**DEFAULTS, "many": _ON_IMAGES}
_BASES = {
    "sgd": "actor",
    "scaling": "torch_loop_threads",
    "neighbors": "search",
    "cache": "evaluate_again",
    "driver": "driver",
}
MADE_IMAGES = {"many": (250_000, 1_000_000), "photos": (2000,)}
_CLASS_IMAGES = 20_000
_PHOTO_SIDE = 64
_BATCH_SIZES = {256: ("actor", "torch_loop", "torch_loop_threads", "sklearn_sgd"), 4096: ("actor", "actors_2")}
# Classes, values of an image, images of a step, and epochs, so that each is timed for about a second or more.
_SCALES = ((1000, 12_288, 64, 1), (1000, 12_288, 512, 2), (100, 3072, 256, 5), (10, 784, 256, 20), (10, 784, 64, 10))
# Nearest means and nothing else.
_DECODES = ("--epochs", "0", "--neighbors", "0")
_TRAINS = ("--epochs", "10", "--neighbors", "0", "--no-report")


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
        for number in options.num_images or MADE_IMAGES["photos"]:
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
            for number in options.num_images or MADE_IMAGES["many"]
        ]
    return [_image_case(options, source)]


def _class_cases(options: Options) -> list[Case]:
    number = next(iter(options.num_images or (_CLASS_IMAGES,)))
    data = datasets.make_once(options.work / f"classes-{number}", partial(datasets.make_classes, num_images=number))
    title = f"classes, {number:,} images of 1,000 classes"
    return [Case(title, options.workload, options.names, {}, ("--data", str(data), *_TRAINS))]


def _model_cases(options: Options) -> list[Case]:
    """Make two cases on photographs: a model of ResNet-18's size, and one that costs nothing beside none at all."""
    number = next(iter(options.num_images or MADE_IMAGES["photos"]))
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
        number = next(iter(options.num_images or MADE_IMAGES["photos"]))
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
