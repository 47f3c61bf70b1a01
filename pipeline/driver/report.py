"""The page of a finished run: rows of predictions found and pictures made by tasks, put together here.

Input: results that are complete, and where the images are. Output: `report.html` beside the tables. Invariant: whatever
became of the images, the page is made; what cannot be shown is named.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline.config import Config
from pipeline.data import archives, files, lookup, uris
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats.index import Archive
from pipeline.data.listing import ArchiveListing, Listing
from pipeline.decoding.images import Fault, decode_image
from pipeline.decoding.thumbnails import Picture, make_picture
from pipeline.driver.connect import connected
from pipeline.driver.imports import leave_pandas_out
from pipeline.driver.waiting import Ref, get_result, wait_all, wait_some
from pipeline.errors import EvaluationError, OutputError
from pipeline.plan import Target
from pipeline.results import mistakes, report, writing
from pipeline.results.draft import open_draft
from pipeline.results.finished import prediction_parts, read_batches, read_run
from pipeline.results.mistakes import Found, Wanted
from pipeline.results.writing import Output

logger = logging.getLogger(__name__)

# Files that one task makes pictures of: few enough that they spread over CPUs.
_TASK_KEYS = 48


@dataclass(frozen=True)
class Images:
    """Where a run's images are.

    Attributes:
        location: The dataset.
        found: Its archives, each with references to the indexes of its splits, or None to have it scanned; none of
            class folders.
        config: The options of the run.
    """

    location: Location
    found: tuple[tuple[Archive, tuple[Ref, ...] | None], ...]
    config: Config


def images_of(listing: Listing, config: Config) -> Images:
    """Say where the images of a run under way are."""
    indexes: dict[Archive, tuple[Ref, ...]] = {}
    for rows in (listing.train, listing.valid):
        if isinstance(rows, ArchiveListing):
            for each in rows.files:
                indexes[each.archive] = (*indexes.get(each.archive, ()), each.index)
    return Images(listing.location, tuple(indexes.items()), config)


def write_report(
    output: Output,
    images: Images,
    on_tick: Callable[[], bool] = lambda: False,
    example: str | None = None,
) -> str:
    """Make the page of a finished run, and return its path or URI.

    Args:
        output: Where the results are.
        images: Where the images are.
        on_tick: Called several times a second; what it raises ends the work.
        example: The image that is shown as numbers; None for the worst mistake.

    Raises:
        EvaluationError: If results cannot be read, or the page not be written.
    """
    run = read_run(output)  # as it will be read when the page is made anew
    draft = open_draft(output, run, example)
    refs = [
        _find_mistakes.remote(output, name, part, draft.wanted) for part, name in enumerate(prediction_parts(output))
    ]
    draft.found = mistakes.merge(wait_all(refs, "the worst mistakes", on_tick))
    keys = report.picture_keys(draft)
    target = Target(**run["target"])
    request = _Request(report.picture_bytes(keys), draft.example_key, target)
    pictures, pixels = _fetch(images, list(keys), request, on_tick)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    content = report.render(draft, pictures, pixels, made).encode()
    writing.write_file(output, writing.REPORT_FILE, lambda stream: stream.write(content))
    if missing := sum(isinstance(found, Fault) for found in pictures.values()):
        logger.info("%s: %d of %d pictures are not there, and named", writing.REPORT_FILE, missing, len(pictures))
    return f"{output.root}/{writing.REPORT_FILE}"


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
        EvaluationError: If there is no finished run, or the page cannot be written.
    """
    output = Output(uris.absolute_root("OUT", out, OutputError))
    run = read_run(output)
    with connected(address):
        images = _locate_again(run, data)
        return write_report(output, images, on_tick, example or run["options"].get("example"))


def _locate_again(run: Mapping[str, Any], data: str | None) -> Images:
    """Find the images of a finished run where they were, or where they are now; what is gone is met when it is read."""
    names = {each.name for each in fields(Config)}
    config = replace(
        Config(**{name: value for name, value in run["options"].items() if name in names and name != "resume"}),
        data=data or run["options"]["data"],
    )
    root: str = run["dataset"]["root"]
    if data is not None:
        location = files.locate(data)
    elif root == "digits":
        location = Location("package", root)
    else:
        pattern = "" if files.split_glob(root)[1] else files.split_glob(config.data)[1]
        location = Location("uri" if uris.is_uri(root) else "folder", root, pattern)
    if location.kind == "package":
        return Images(location, (), config)
    try:
        store, path = location.store
        found = archives.find_archives(store, path, location.pattern, config, Counter())
    except (EvaluationError, OSError) as exc:
        logger.warning("%s; the images that are not there are named on the page", exc)
        found = []
    return Images(location, tuple((archive, None) for archive in found), config)


@dataclass(frozen=True)
class _Request:
    """What is to be made of files: pictures of so many bytes, and of one of them the pixels at the run's size."""

    max_bytes: int
    example: str | None
    target: Target


def _fetch(
    images: Images, keys: Sequence[str], request: _Request, on_tick: Callable[[], bool]
) -> tuple[dict[str, Picture | Fault], npt.NDArray[np.uint8] | None]:
    """Have pictures made, and one image decoded; every key has an answer."""
    waiting: dict[Ref, list[str]] = {}
    left = dict.fromkeys(keys)
    for archive, indexes in images.found:
        own = [key for key in left if key.startswith(f"{archive.name}/")]
        if own:
            refs = indexes or ()
            source = images.location, archive, images.config
            waiting[_picture_members.remote(source, own, request, indexes is not None, *refs)] = own
            left = dict.fromkeys(key for key in left if key not in set(own))
    rest = list(left) if not images.found else []
    for start in range(0, len(rest), _TASK_KEYS):
        own = rest[start : start + _TASK_KEYS]
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
def _find_mistakes(output: Output, name: str, part: int, wanted: Wanted) -> Found:
    leave_pandas_out()
    return mistakes.find(read_batches(output, name, mistakes.columns_of(wanted)), part, wanted)


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
) -> tuple[dict[str, Picture | Fault], npt.NDArray[np.uint8] | None]:
    pictures, pixels, target = {}, None, request.target
    for key, data in images:
        pictures[key] = make_picture(data, request.max_bytes)
        if key == request.example:
            decoded = decode_image(data, target)
            if not isinstance(decoded, Fault):
                pixels = np.frombuffer(decoded[0], np.uint8).reshape(target.height, target.width, target.channels)
    return pictures, pixels
