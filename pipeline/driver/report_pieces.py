"""What the page of a run is made of, piece by piece: by Ray's tasks, or without Ray by processes of this machine.

Input: prediction files, and names of images. Output: rows that are worth a look, and small pictures. Invariant: a
process that dies, as by a file that crashes its decoder, is an error of its pieces alone or of those that wait.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.data import lookup
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats.index import Archive
from pipeline.decoding.images import Fault, decode_image
from pipeline.decoding.thumbnails import Picture, make_picture
from pipeline.driver.imports import leave_pandas_out
from pipeline.errors import ActorLostError, EvaluationError
from pipeline.results import mistakes
from pipeline.results.finished import read_batches
from pipeline.results.mistakes import Found, Noted, Wanted
from pipeline.results.writing import Output
from pipeline.target import Target

# Of the image that is shown as numbers, uint8 [H, W, C]; None if it cannot be decoded any more.
Pixels: TypeAlias = npt.NDArray[np.uint8] | None
Made: TypeAlias = tuple[dict[str, Picture | Fault], Pixels]
# One of the functions below, and what it is called with.
Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Request:
    """What is to be made of files: pictures of so many bytes, and of one of them the pixels at the run's size."""

    max_bytes: int
    example: str | None
    target: Target


def by_processes(calls: Sequence[Call], what: str) -> Iterator[tuple[int, Any]]:
    """Have calls done by processes of this machine.

    Yields:
        As they are done: the place of a call, and its result or an `EvaluationError`.
    """
    if not calls:
        return
    workers = min(len(calls), os.cpu_count() or 1)
    # A fork of this process would have its threads' locks and not its threads. What is imported once serves all calls.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        places = {pool.submit(function, *values): place for place, (function, values) in enumerate(calls)}
        for done in as_completed(places):
            try:
                yield places[done], done.result()
            except BrokenProcessPool:
                yield places[done], ActorLostError(f"{what}: expected its process to live, got its death")
            except EvaluationError as exc:
                yield places[done], exc


def find_mistakes(output: Output, name: str, wanted: Wanted, noted: dict[str, Noted] | None) -> Found:
    """Find what the page shows of one prediction file, of which the worst mistakes may be known."""
    leave_pandas_out()
    if noted is None:
        noted = mistakes.note(read_batches(output, name), wanted.classes)
    light = read_batches(output, name, mistakes.light_columns(wanted))
    return Found(mistakes.narrow(noted, wanted), *mistakes.look_up(light, wanted))


def picture_files(location: Location, keys: list[str], request: Request) -> Made:
    """Make pictures of files of class folders."""
    leave_pandas_out()
    return _make_pictures(lookup.read_files(location, keys), request)


def picture_members(
    source: tuple[Location, Archive, Config], keys: list[str], request: Request, is_indexed: bool, *indexes: pa.Table
) -> Made:
    """Make pictures of images in an archive, by its indexes if it has been scanned."""
    leave_pandas_out()
    tables = indexes if is_indexed else None
    location, archive, config = source
    return _make_pictures(lookup.read_members(location, archive, tables, keys, config), request)


def _make_pictures(images: Iterable[tuple[str, bytes | ReadFault]], request: Request) -> Made:
    pictures, pixels, target = {}, None, request.target
    for key, data in images:
        pictures[key] = make_picture(data, request.max_bytes)
        if key == request.example:
            decoded = decode_image(data, target)
            if not isinstance(decoded, Fault):
                pixels = np.frombuffer(decoded[0], np.uint8).reshape(target.height, target.width, target.channels)
    return pictures, pixels
