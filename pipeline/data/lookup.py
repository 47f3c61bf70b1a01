r"""Single images of a run by the keys that result tables name them by.

Input: a finished run's options, and displayed keys. Output: for each key the bytes of its file, or a fault.
Invariant: every key is answered once, whatever is wrong with its file, its archive or the storage.

A displayed key is not always the file's name: bytes that are no UTF-8 are spelled `\xNN` there.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.data import archives, files
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats import reader_of
from pipeline.data.formats.index import Archive
from pipeline.data.uris import is_uri
from pipeline.errors import DataError, EvaluationError, OptionError

if TYPE_CHECKING:
    from pipeline.data.listing import Listing

logger = logging.getLogger(__name__)

# No byte below 0x80 is spelled so, as it is UTF-8.
_SPELLED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


@dataclass(frozen=True)
class Images:
    """Where a run's images are.

    Attributes:
        location: The dataset.
        found: Its archives, each with the indexes of its splits, or what stands for them, or None to have it scanned;
            none of class folders.
        config: The options of the run.
    """

    location: Location
    found: tuple[tuple[Archive, tuple[Any, ...] | None], ...]
    config: Config

    def assign(self, keys: Iterable[str]) -> list[tuple[tuple[Archive, tuple[Any, ...] | None] | None, list[str]]]:
        """Part keys by the archive that they are in, one of `found`; None stands for class folders."""
        if not self.found:
            return [(None, list(keys))]
        left = dict.fromkeys(keys)
        parted: list[tuple[tuple[Archive, tuple[Any, ...] | None] | None, list[str]]] = []
        for each in self.found:
            own = [key for key in left if key.startswith(f"{each[0].name}/")]
            if own:
                parted.append((each, own))
                left = dict.fromkeys(key for key in left if key not in set(own))
        return parted


def locate_again(run: Mapping[str, Any], data: str | None = None) -> Images:
    """Find the images of a finished run where they were, or where they are now; what is gone is met when it is read.

    Args:
        run: What `run.json` holds.
        data: Where they are now, as `--data` takes it; None for where they were.
    """
    names = {each.name for each in fields(Config)}
    config = replace(
        Config(**{name: value for name, value in run["options"].items() if name in names and name != "resume"}),
        data=data or run["options"].get("data") or run["dataset"]["root"],
    )
    root: str = run["dataset"]["root"]
    if data is not None:
        location = files.locate(data)
    elif root == "digits":
        location = Location("package", root)
    else:
        pattern = "" if files.split_glob(root)[1] else files.split_glob(config.data)[1]
        location = Location("uri" if is_uri(root) else "folder", root, pattern)
    if location.kind == "package":
        return Images(location, (), config)
    try:
        store, path = location.store
        found = archives.find_archives(store, path, location.pattern, config, Counter())
    except (EvaluationError, OSError) as exc:
        logger.warning("%s; the images that are not there are named on the page", exc)
        found = []
    return Images(location, tuple((archive, None) for archive in found), config)


def check_example(listing: Listing, key: str) -> None:
    """Check that an image of class folders has this name; those of archives are not known by name yet.

    Raises:
        OptionError: If none has.
    """
    import pyarrow.compute as pc  # which takes longer to load than most jobs have use for

    tables = [rows for rows in (listing.train, listing.valid) if isinstance(rows, pa.Table)]
    names = pa.array(_spellings(key), pa.binary())
    if tables and not any(pc.any(pc.is_in(rows["key"], value_set=names)).as_py() for rows in tables):
        first = files.display(tables[-1]["key"][0].as_py())
        raise OptionError(f"--example {key}: expected the key of an image, got none of this name; give one as {first}")


def read_images(images: Images, keys: Iterable[str]) -> Iterator[tuple[str, bytes | ReadFault]]:
    """Read the images that some keys name, all of them in this process; of archives none that are in none."""
    for place, own in images.assign(keys):
        if place is None:
            yield from read_files(images.location, own)
        else:
            yield from read_members(images.location, *place, own, images.config)


def read_files(location: Location, keys: Sequence[str]) -> Iterator[tuple[str, bytes | ReadFault]]:
    """Read the files of class folders that some keys name."""
    try:
        names = pa.array([_spellings(key)[0] for key in keys], pa.binary())
        for key, data in zip(keys, files.read_images(location, names), strict=True):
            other = _spellings(key)[1:]
            if isinstance(data, ReadFault) and other:
                data = next(files.read_images(location, pa.array(other, pa.binary())))
            yield key, data
    except DataError as exc:
        yield from _rest(keys, exc)


def read_members(
    location: Location, archive: Archive, indexes: Iterable[pa.Table] | None, keys: Sequence[str], config: Config
) -> Iterator[tuple[str, bytes | ReadFault]]:
    """Read the images of an archive that some keys name.

    Args:
        location: The dataset.
        archive: The archive.
        indexes: Of its splits, tables of `formats.index.INDEX`; None to have it scanned.
        keys: The keys.
        config: The options with which it is scanned.
    """
    wanted = {spelling: key for key in keys for spelling in _spellings(key)}
    found: set[str] = set()
    try:
        if indexes is None:
            _, index = reader_of(archive).scan(location.store[0], archive, config)
            indexes = list(index.values())
        for table in indexes:
            names = chain.from_iterable(chunk.to_pylist() for chunk in table["key"].chunks)
            numbers = [number for number, name in enumerate(names) if name in wanted]
            if not numbers:
                continue
            rows = pa.concat_tables([table.slice(number, 1) for number in numbers])
            images = reader_of(archive).read_rows(location.store[0], archive, rows, location.concurrency)
            for name, data in zip(rows["key"].to_pylist(), images, strict=True):
                found.add(wanted[name])
                yield wanted[name], data
    except (DataError, OSError) as exc:
        yield from _rest([key for key in keys if key not in found], exc)
        return
    yield from _rest([key for key in keys if key not in found], FileNotFoundError("not in the archive any more"))


def _rest(keys: Sequence[str], exc: Exception) -> Iterator[tuple[str, ReadFault]]:
    return ((key, ReadFault("unreadable", str(exc))) for key in keys)


def _spellings(key: str) -> list[bytes]:
    """Return the names that a displayed key can stand for, the likelier one first."""
    literal = key.encode("utf-8", "surrogateescape")
    meant = _SPELLED_BYTE.sub(lambda found: bytes([int(found[1], 16)]), literal)
    return [meant] if meant == literal else [meant, literal]
