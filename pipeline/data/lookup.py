r"""Single images by the keys that result tables name them by.

Input: displayed keys. Output: for each key the bytes of its file, or a fault. Invariant: every key is answered once,
whatever is wrong with its file, its archive or the storage.

A displayed key is not always the file's name: bytes that are no UTF-8 are spelled `\xNN` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import pyarrow as pa

from pipeline.config import Config
from pipeline.data import files
from pipeline.data.files import Location, ReadFault
from pipeline.data.formats import reader_of
from pipeline.data.formats.index import Archive
from pipeline.errors import DataError

# No byte below 0x80 is spelled so, as it is UTF-8.
_SPELLED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


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
