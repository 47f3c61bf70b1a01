"""The page of a finished run: what `report_pieces` finds and makes, put together here.

Input: results that are complete, and where the images are. Output: `report.html` beside the tables. Invariant: whatever
became of the images, the page is made; what cannot be shown is named.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import ray

from pipeline.config import Config
from pipeline.data.formats.index import Archive
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.data.lookup import Images, locate_again
from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import Picture
from pipeline.driver.connect import connected
from pipeline.driver.report_pieces import (
    Call,
    Made,
    Pixels,
    Request,
    by_processes,
    find_mistakes,
    picture_files,
    picture_members,
)
from pipeline.driver.waiting import Ref, get_result, wait_some
from pipeline.errors import DataError, EvaluationError, OptionError, counted
from pipeline.results import mistakes, pages, report, writing
from pipeline.results.draft import Draft, open_draft
from pipeline.results.finished import FinishedRun, open_run
from pipeline.target import Target

logger = logging.getLogger(__name__)

# Files that one task makes pictures of: few enough that they spread over CPUs.
_TASK_KEYS = 48
_TASKS = {function: ray.remote(function) for function in (find_mistakes, picture_files, picture_members)}
_DoAll: TypeAlias = Callable[[Sequence[Call], str], Iterable[tuple[int, Any]]]


def images_of(listing: Listing, config: Config) -> Images:
    """Say where the images of a run under way are."""
    indexes: dict[Archive, tuple[Ref, ...]] = {}
    for rows in (listing.train, listing.valid):
        if isinstance(rows, ArchiveListing):
            for each in rows.files:
                indexes[each.archive] = (*indexes.get(each.archive, ()), each.index)
    return Images(listing.location, tuple(indexes.items()), config)


def write_report(
    finished: FinishedRun,
    images: Images,
    on_tick: Callable[[], bool] = lambda: False,
    example: str | None = None,
    noted: Sequence[Ref] = (),
) -> str:
    """Make the page of a finished run, and return its path or URI.

    Args:
        finished: The run.
        images: Where the images are.
        on_tick: Called several times a second; what it raises ends the work.
        example: The image that is shown as numbers; None for the worst mistake.
        noted: References to what `mistakes.note` found in each prediction file; without, all of them are read.

    Raises:
        EvaluationError: If results cannot be read, or the page not be written.
    """
    return _write(finished, *_collect(finished, images, partial(_by_tasks, on_tick=on_tick), example, noted))


def _write(finished: FinishedRun, draft: Draft, pictures: Mapping[str, Picture | Fault], pixels: Pixels) -> str:
    output = finished.output
    content = report.render(draft, pictures, pixels)
    writing.write_file(output, writing.REPORT_FILE, lambda stream: stream.write(content))
    if missing := sum(isinstance(found, Fault) for found in pictures.values()):
        logger.info(
            "%s: without pictures of %d of %s, which it names",
            writing.REPORT_FILE,
            missing,
            counted(len(pictures), "image"),
        )
    return f"{output.root}/{writing.REPORT_FILE}"


def _collect(
    finished: FinishedRun, images: Images, do_all: _DoAll, example: str | None, noted: Sequence[Ref] = ()
) -> tuple[Draft, dict[str, Picture | Fault], Pixels]:
    """Find what the page shows, and have its pictures made."""
    output = finished.output
    draft = open_draft(finished, example)
    known = noted or [None] * len(finished.parts)
    calls: list[Call] = [
        (find_mistakes, (output, name, draft.wanted, own)) for name, own in zip(finished.parts, known, strict=True)
    ]
    found: list[Any] = [None] * len(calls)
    for place, answer in do_all(calls, "the worst mistakes"):
        if isinstance(answer, EvaluationError):
            raise answer
        found[place] = answer
    draft.found = mistakes.merge(found)
    keys = report.picture_keys(draft)
    target = Target(**finished.run["target"])
    request = Request(pages.picture_bytes(keys.total()), draft.example_key, target)
    return draft, *_fetch(images, list(keys), request, do_all)


def remake(out: str, data: str | None = None, example: str | None = None, address: str | None = None) -> str:
    """Make the page of a finished run anew, and return its path or URI.

    Tasks of a cluster do the work where one is named, else processes of this machine: to start Ray takes longer.

    Args:
        out: The folder or URI of the results.
        data: Where the images are now; None for where they were.
        example: As `write_report` takes it; None for that of the run.
        address: Of a Ray cluster; None for that of `RAY_ADDRESS`, if any.

    Raises:
        DataError: If `data` has less than half of the images that are shown.
        OptionError: If there is no image `example` where others are.
        EvaluationError: If there is no finished run, or the page cannot be written.
    """
    finished = open_run(out)
    images = locate_again(finished.run, data)
    named = example or finished.run["options"].get("example")
    with ExitStack() as stack:
        do_all: _DoAll = by_processes
        if ray.is_initialized() or (address or os.environ.get("RAY_ADDRESS") or "local") != "local":
            stack.enter_context(connected(address))
            do_all = partial(_by_tasks, on_tick=lambda: False)
        draft, pictures, pixels = _collect(finished, images, do_all, named)
    _check_pictures(draft, pictures, data, example)
    return _write(finished, draft, pictures, pixels)


def _check_pictures(
    draft: Draft, pictures: Mapping[str, Picture | Fault], data: str | None, example: str | None
) -> None:
    """Keep the page that is there if the place that is named has few of its images, or not the one that is asked for.

    Without a place, images may be gone, and a page that names them is all that can be had.
    """
    faults = {key: found for key, found in pictures.items() if isinstance(found, Fault)}
    if data is not None and len(faults) > len(pictures) / 2:  # other datasets may share some names
        key, fault = next(iter(faults.items()))
        found = len(pictures) - len(faults) or "none"
        raise DataError(
            f"--data {data}: expected the images of {draft.output.root}, got {found} of "
            f"{counted(len(pictures), 'image')} that its page shows ({key}: {fault.error}); the page is as it was; say "
            "where they are"
        )
    is_known = example in draft.found.by_key or len(faults) == len(pictures)
    if example in faults and not is_known:
        other = next(key for key in pictures if key not in faults)
        raise OptionError(
            f"--example {example}: expected the key of an image, got {faults[example].error}; give one as {other}"
        )


def _fetch(images: Images, keys: Sequence[str], request: Request, do_all: _DoAll) -> Made:
    """Have pictures made, and one image decoded; every key has an answer."""
    calls: list[Call] = []
    named: list[list[str]] = []
    for place, names in images.assign(keys):
        if place is not None:
            archive, indexes = place
            source = images.location, archive, images.config
            calls.append((picture_members, (source, names, request, indexes is not None, *(indexes or ()))))
            named.append(names)
            continue
        for start in range(0, len(names), _TASK_KEYS):
            named.append(names[start : start + _TASK_KEYS])
            calls.append((picture_files, (images.location, named[-1], request)))
    pictures: dict[str, Picture | Fault] = {}
    pixels = None
    for number, answer in do_all(calls, "making pictures"):
        if isinstance(answer, EvaluationError):  # as of a file that crashes its decoder: no reason to end a job
            answer = dict.fromkeys(named[number], Fault("unreadable", str(answer))), None
        made, decoded = answer
        pictures.update(made)
        pixels = decoded if decoded is not None else pixels
    missing = Fault("unreadable", "no file of this name")
    return {key: pictures.get(key, missing) for key in keys}, pixels


def _by_tasks(calls: Sequence[Call], what: str, on_tick: Callable[[], bool]) -> Iterator[tuple[int, Any]]:
    """Have calls done by tasks of Ray; yields as `by_processes` does."""
    waiting = {_TASKS[function].remote(*values): place for place, (function, values) in enumerate(calls)}
    while waiting:
        for done in wait_some(list(waiting), what, on_tick):
            place = waiting.pop(done)
            try:
                yield place, get_result(done, what)
            except EvaluationError as exc:
                yield place, exc
