"""The formats of archives, files of many images, as one table.

Input: a file of one of the table's endings. Output: its index, and for rows of the index the bytes of images.
Invariant: a kind that is not in the table is an error, and never read as another.

A format is added by a file beside this one, with the two functions of `Reader`, and a record in `FORMATS`. Class
folders are no archives: `listing` lists them, and `files` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.config import Config
    from pipeline.data.files import ReadFault
    from pipeline.data.formats.index import Archive, Index, Scan
    from pipeline.data.storage import Store


class Reader(Protocol):
    """What the module of a format offers."""

    def scan(self, store: Store, archive: Archive, config: Config) -> tuple[Scan, Index]:
        """List an archive's images with their classes and splits."""

    def read_rows(
        self, store: Store, archive: Archive, rows: pa.Table, concurrency: int
    ) -> Iterator[bytes | ReadFault]:
        """Read the images of some rows of its index, in their order."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: What an `Archive` of it is called.
        ending: Of its files' names, in lower case.
        load: Imports and returns its reader: few datasets need one, and every decoding process would pay for all.
    """

    name: str
    ending: str
    load: Callable[[], Reader]


def _tar() -> Reader:
    from pipeline.data.formats import tar

    return tar


def _parquet() -> Reader:
    from pipeline.data.formats import parquet

    return parquet


FORMATS = (
    Format("tar", ".tar", _tar),
    Format("parquet", ".parquet", _parquet),
)
ENDINGS = tuple(each.ending for each in FORMATS)


def format_of(path: str) -> Format | None:
    """Find a file's format by its ending; None if it is no archive."""
    ending = path[path.rfind(".") :].lower()
    return next((each for each in FORMATS if each.ending == ending), None)


def reader_of(archive: Archive) -> Reader:
    """Return the reader of an archive.

    Raises:
        DataError: If its kind is not in the table, as on a node with another version of this program.
    """
    for each in FORMATS:
        if each.name == archive.kind:
            return each.load()
    known = ", ".join(each.name for each in FORMATS)
    raise DataError(
        f"{archive.path}: expected an archive of a known kind ({known}), got {archive.kind}; install the same version "
        "of this program on every node"
    )
