"""The page of a finished run: rows of predictions found and pictures made by tasks, put together here.

Input: results that are complete, and where the images are. Output: `report.html` beside the tables. Invariant: whatever
became of the images, the page is made; what cannot be shown is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline.config import Config
from pipeline.data import lookup
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats.index import Archive
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.data.lookup import Images, locate_again
from pipeline.decoding.images import Fault, decode_image
from pipeline.decoding.thumbnails import Picture, make_picture
from pipeline.driver.connect import connected
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.waiting import Ref, get_result, wait_all, wait_some
from pipeline.errors import DataError, EvaluationError, OptionError, counted
from pipeline.plan import Target
from pipeline.results import mistakes, pages, report, writing
from pipeline.results.draft import Draft, open_draft
from pipeline.results.finished import FinishedRun, open_run, read_batches
from pipeline.results.mistakes import Found, Noted, Wanted
from pipeline.results.writing import Output

logger = logging.getLogger(__name__)

# Files that one task makes pictures of: few enough that they spread over CPUs.
_TASK_KEYS = 48
# Of the image that is shown as numbers, uint8 [H, W, C]; None if it cannot be decoded any more.
_Pixels: TypeAlias = npt.NDArray[np.uint8] | None


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
    return _write(finished, *_collect(finished, images, on_tick, example, noted))


def _write(finished: FinishedRun, draft: Draft, pictures: Mapping[str, Picture | Fault], pixels: _Pixels) -> str:
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
    finished: FinishedRun, images: Images, on_tick: Callable[[], bool], example: str | None, noted: Sequence[Ref] = ()
) -> tuple[Draft, dict[str, Picture | Fault], _Pixels]:
    """Find what the page shows, and have its pictures made."""
    output = finished.output
    draft = open_draft(finished, example)
    refs = [
        _find_mistakes.remote(output, name, draft.wanted, known)
        for name, known in zip(finished.parts, noted or [None] * len(finished.parts), strict=True)
    ]
    draft.found = mistakes.merge(wait_all(refs, "the worst mistakes", on_tick))
    keys = report.picture_keys(draft)
    target = Target(**finished.run["target"])
    request = _Request(pages.picture_bytes(keys.total()), draft.example_key, target)
    return draft, *_fetch(images, list(keys), request, on_tick)


def remake(
    out: str, data: str | None = None, example: str | None = None, address: str | None = None,
    on_tick: Callable[[], bool] = lambda: False,
) -> str:  # fmt: skip
    """Make the page of a finished run anew, and return its path or URI.

    Args:
        out: The folder or URI of the results.
        data: Where the images are now; None for where they were.
        example: As `write_report` takes it; None for that of the run.
        address: Of a Ray cluster, as for a run.
        on_tick: As `write_report` takes it.

    Raises:
        DataError: If `data` has none of the images.
        OptionError: If there is no image `example` where others are.
        EvaluationError: If there is no finished run, or the page cannot be written.
    """
    finished = open_run(out)
    with connected(address):
        images = locate_again(finished.run, data)
        named = example or finished.run["options"].get("example")
        draft, pictures, pixels = _collect(finished, images, on_tick, named)
        _check_pictures(draft, pictures, data, example)
        return _write(finished, draft, pictures, pixels)


def _check_pictures(
    draft: Draft, pictures: Mapping[str, Picture | Fault], data: str | None, example: str | None
) -> None:
    """Keep the page that is there if the place that is named has no image of it, or not the one that is asked for.

    Without a place, images may be gone, and a page that names them is all that can be had.
    """
    faults = {key: found for key, found in pictures.items() if isinstance(found, Fault)}
    if data is not None and faults and len(faults) == len(pictures):
        key, fault = next(iter(faults.items()))
        raise DataError(
            f"--data {data}: expected the images of {draft.output.root}, got none of {counted(len(faults), 'image')} "
            f"that its page shows ({key}: {fault.error}); the page is as it was; say where they are"
        )
    is_known = example in draft.found.by_key or len(faults) == len(pictures)
    if example in faults and not is_known:
        other = next(key for key in pictures if key not in faults)
        raise OptionError(
            f"--example {example}: expected the key of an image, got {faults[example].error}; give one as {other}"
        )


@dataclass(frozen=True)
class _Request:
    """What is to be made of files: pictures of so many bytes, and of one of them the pixels at the run's size."""

    max_bytes: int
    example: str | None
    target: Target


def _fetch(
    images: Images, keys: Sequence[str], request: _Request, on_tick: Callable[[], bool]
) -> tuple[dict[str, Picture | Fault], _Pixels]:
    """Have pictures made, and one image decoded; every key has an answer."""
    waiting: dict[Ref, list[str]] = {}
    for place, names in images.assign(keys):
        if place is not None:
            archive, indexes = place
            source = images.location, archive, images.config
            waiting[_picture_members.remote(source, names, request, indexes is not None, *(indexes or ()))] = names
            continue
        for start in range(0, len(names), _TASK_KEYS):
            own = names[start : start + _TASK_KEYS]
            waiting[_picture_files.remote(images.location, own, request)] = own
    pictures: dict[str, Picture | Fault] = {}
    pixels = None
    while waiting:
        for done in wait_some(list(waiting), "pictures", on_tick):
            own = waiting.pop(done)
            try:
                made, decoded = get_result(done, "making pictures")
                pictures.update(made)
                pixels = decoded if decoded is not None else pixels
            except EvaluationError as exc:  # a file that crashes its decoder; the page is no reason to end a job
                pictures.update(dict.fromkeys(own, Fault("unreadable", str(exc))))
    missing = Fault("unreadable", "no file of this name")
    return {key: pictures.get(key, missing) for key in keys}, pixels


@ray.remote
def _find_mistakes(output: Output, name: str, wanted: Wanted, noted: dict[str, Noted] | None) -> Found:
    leave_pandas_out()
    if noted is None:
        noted = mistakes.note(read_batches(output, name), wanted.classes)
    light = read_batches(output, name, mistakes.light_columns(wanted))
    return Found(mistakes.narrow(noted, wanted), *mistakes.look_up(light, wanted))


@ray.remote
def _picture_files(location: Location, keys: list[str], request: _Request) -> Any:
    leave_pandas_out()
    return _make_pictures(lookup.read_files(location, keys), request)


@ray.remote
def _picture_members(
    source: tuple[Location, Archive, Config], keys: list[str], request: _Request, is_indexed: bool, *indexes: pa.Table
) -> Any:
    leave_pandas_out()
    tables = indexes if is_indexed else None
    location, archive, config = source
    return _make_pictures(lookup.read_members(location, archive, tables, keys, config), request)


def _make_pictures(
    images: Iterable[tuple[str, bytes | ReadFault]], request: _Request
) -> tuple[dict[str, Picture | Fault], _Pixels]:
    pictures, pixels, target = {}, None, request.target
    for key, data in images:
        pictures[key] = make_picture(data, request.max_bytes)
        if key == request.example:
            decoded = decode_image(data, target)
            if not isinstance(decoded, Fault):
                pixels = np.frombuffer(decoded[0], np.uint8).reshape(target.height, target.width, target.channels)
    return pictures, pixels
