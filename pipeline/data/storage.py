"""Where files are, as one kind of object: a local disk, or a bucket of S3, Google's or Azure's.

Input: a folder or a URI as a user gave it. Output: a `Store`, by which everything in this program reads, writes, lists
and deletes, with paths as its own names. Invariant: what goes wrong is an OSError of one line.
"""

from __future__ import annotations

import io
import os
import re
import socket
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from pipeline.data.ahead import Admit
from pipeline.data.clients import as_os_errors, connect
from pipeline.data.uris import is_uri, parse
from pipeline.errors import EvaluationError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_FILE_BYTES = 2**30
_BEHIND_END = re.compile(r"status code: 416|InvalidRange|Invalid range")
_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


class Entry(NamedTuple):
    """What a listing tells of a file or a folder: its path, its size in bytes and the time of its last change."""

    path: str
    size: int
    mtime_ns: int | None
    is_folder: bool = False

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path[self.path.rfind("/") + 1 :]


class NotAFileError(OSError):
    """What has the name of a file, and is a folder, a FIFO or a device."""


class TooLargeError(OSError):
    """A file of more than `MAX_FILE_BYTES`."""


class Store(Protocol):
    """A place for files. Every method raises OSError alone: FileNotFoundError for what is not there."""

    is_local: bool

    def find(self, path: str) -> Entry | None:
        """Look at one file or folder; None if there is neither."""

    def entries(self, path: str, *, recursive: bool) -> Iterator[Entry]:
        """List the files below a folder at any depth, or the files and folders right in it; none if it is not there."""

    def read(self, path: bytes, admit: Admit) -> bytes:
        """Read a whole file of an image, `MAX_FILE_BYTES` at most."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read the bytes from `start` up to `stop`, fewer where the file ends before."""

    def make_folder(self, path: str) -> None:
        """Make a folder, and those above it; a bucket needs none."""

    def write(self, path: str, write: Callable[[pa.NativeFile], object]) -> None:
        """Have `write` fill a file that appears under its name when it is complete, and else not at all."""

    def delete(self, path: str) -> None:
        """Delete a file, or see that it is not there."""


class LocalStore:
    """The disks of this machine, network file systems among them. Paths are full ones."""

    is_local = True

    def find(self, path: str) -> Entry | None:
        """Look at one file or folder; None if there is neither."""
        try:
            status = os.stat(path)  # noqa: PTH116 - once a file
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _local_entry(path, status) if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else None

    def entries(self, path: str, *, recursive: bool) -> Iterator[Entry]:
        """List the files below a folder at any depth, or the files and folders right in it; none if it is not there."""
        with suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                leads_somewhere = entry.is_file() or entry.is_dir()
                found = _local_entry(entry.path, entry.stat(follow_symlinks=leads_somewhere))
                if recursive and found.is_folder:
                    yield from self.entries(entry.path, recursive=True)
                else:
                    yield found

    def read(self, path: bytes, admit: Admit) -> bytes:
        """Read a whole file of an image, `MAX_FILE_BYTES` at most."""
        descriptor, num_bytes = _open_regular(path)
        try:
            if num_bytes > MAX_FILE_BYTES:
                raise _too_large(num_bytes)
            admit(num_bytes)
            data = os.read(descriptor, num_bytes + 1)
            if len(data) != num_bytes:  # a short read, or a file that is being written
                while chunk := os.read(descriptor, 1 << 20):
                    data += chunk
            return data
        finally:
            os.close(descriptor)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read the bytes from `start` up to `stop`, fewer where the file ends before."""
        descriptor, _ = _open_regular(path)
        try:
            return os.pread(descriptor, stop - start, start)
        finally:
            os.close(descriptor)

    def make_folder(self, path: str) -> None:
        """Make a folder, and those above it."""
        Path(path).mkdir(parents=True, exist_ok=True)

    def write(self, path: str, write: Callable[[pa.NativeFile], object]) -> None:
        """Have `write` fill a file that appears under its name when it is complete, and else not at all."""
        temporary = temporary_beside(path)
        try:
            with pa.OSFile(str(temporary), "wb") as stream:
                write(stream)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        """Delete a file, or see that it is not there."""
        Path(path).unlink(missing_ok=True)


class BucketStore:
    """A bucket. Paths begin with its name, as those of a URI do.

    Attributes:
        client: By which it is reached.
        bucket: Its name.
    """

    is_local = False

    def __init__(self, client: ObjectStore, bucket: str) -> None:
        self.client = client
        self.bucket = bucket

    def find(self, path: str) -> Entry | None:
        """Look at one object, or whether there are any below the path; None if nothing is there."""
        with as_os_errors(path):
            import obstore

            with suppress(FileNotFoundError):
                if key := self._key(path):
                    return self._entry(obstore.head(self.client, key))
            pages = obstore.list(self.client, self._key(path) or None, chunk_size=1)
            return Entry(path, -1, None, is_folder=True) if next(iter(pages), None) else None

    def entries(self, path: str, *, recursive: bool) -> Iterator[Entry]:
        """List the objects below a prefix, or the objects and common prefixes right in it, page by page."""
        with as_os_errors(path):
            import obstore

            if not recursive:
                found = obstore.list_with_delimiter(self.client, self._key(path) or None)
                folders = list(found["common_prefixes"])
                yield from (Entry(f"{self.bucket}/{key}", -1, None, is_folder=True) for key in folders)
                # An empty object of a folder's own name is how some programs mark it.
                markers = {self._key(path), *folders}
                yield from (
                    self._entry(about) for about in found["objects"] if about["size"] or about["path"] not in markers
                )
                return
            marker: Entry | None = None
            for page in obstore.list(self.client, self._key(path) or None, chunk_size=1000):
                for entry in map(self._entry, page):
                    if marker and not entry.path.startswith(f"{marker.path}/"):
                        yield marker
                    marker = None
                    if entry.size:
                        yield entry
                    elif entry.path != path:  # a folder's marker comes right before what is in it
                        marker = entry
            if marker:
                yield marker

    def read(self, path: bytes, admit: Admit) -> bytes:
        """Read a whole object by one request, `MAX_FILE_BYTES` at most."""
        with as_os_errors(path):
            import obstore

            found = obstore.get(self.client, self._key(path.decode()))
            if found.meta["size"] > MAX_FILE_BYTES:
                raise _too_large(found.meta["size"])
            admit(found.meta["size"])
            return found.bytes().to_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read the bytes from `start` up to `stop`, fewer where the object ends before."""
        import obstore

        # Not inside `as_os_errors`, which costs as much as the call itself.
        try:
            return obstore.get_range(self.client, self._key(path), start=start, end=stop).to_bytes()
        except Exception as exc:
            from obstore.exceptions import GenericError

            if isinstance(exc, GenericError) and _BEHIND_END.search(str(exc).partition("\n")[0]):
                return b""
            with as_os_errors(path):
                raise

    def make_folder(self, path: str) -> None:
        """Do nothing: where there is an object, there is what its name begins with."""

    def write(self, path: str, write: Callable[[pa.NativeFile], object]) -> None:
        """Have `write` fill an object that appears when it is complete."""
        content = pa.BufferOutputStream()
        write(content)
        with as_os_errors(path):
            import obstore

            obstore.put(self.client, self._key(path), memoryview(content.getvalue()).cast("B"))

    def delete(self, path: str) -> None:
        """Delete an object, or see that it is not there."""
        with as_os_errors(path), suppress(FileNotFoundError):
            import obstore

            obstore.delete(self.client, self._key(path))

    def _key(self, path: str) -> str:
        return path[len(self.bucket) + 1 :]

    def _entry(self, about: Any) -> Entry:
        mtime_ns = (about["last_modified"] - _EPOCH) // timedelta(microseconds=1) * 1000
        return Entry(f"{self.bucket}/{about['path']}", about["size"], mtime_ns)


class StoredFile(io.RawIOBase):
    """A file of a store as Python's own files are, for who reads only some of it.

    Args:
        store: Where it is.
        path: Its path there.
        size_bytes: Its size.
    """

    def __init__(self, store: Store, path: str, size_bytes: int) -> None:
        self.store, self.path, self.size_bytes = store, path, size_bytes
        self._at = 0

    def read_some(self, start: int, stop: int) -> memoryview | bytes:
        """Read at least a byte from `start` on, none behind `stop`."""
        return self.store.read_range(self.path, start, stop)

    def readinto(self, buffer: Any) -> int:
        """Read what comes next, up to the size of the buffer."""
        view = memoryview(buffer).cast("B")
        start, stop = self._at, min(self._at + len(view), self.size_bytes)
        while self._at < stop and (part := self.read_some(self._at, stop)):
            view[self._at - start : self._at - start + len(part)] = part
            self._at += len(part)
        return self._at - start

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self._at = offset + {0: 0, 1: self._at, 2: self.size_bytes}[whence]
        return self._at

    def tell(self) -> int:
        """Say which byte comes next."""
        return self._at

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True


def open_root(option: str, root: str, error_class: type[EvaluationError]) -> tuple[Store, str]:
    """Return the store of a root, and the root's path on it; of a bucket, nothing is asked yet but its region.

    Args:
        option: As `--out`, for the error.
        root: A full path, or a URI as `s3://bucket/folder?region=eu-west-1`.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if a URI cannot be opened, or a folder's name is not UTF-8.
    """
    if is_uri(root):
        return _connect(option, root, error_class)
    shown = os.fsencode(root).decode("utf-8", "backslashreplace")
    if shown != root:  # pyarrow's files take text alone
        raise error_class(f"{option}: expected a folder whose name is UTF-8, got {shown}; choose another")
    return LocalStore(), root


def _connect(option: str, text: str, error_class: type[EvaluationError]) -> tuple[Store, str]:
    uri = parse(option, text, error_class)
    try:
        client = connect(replace(uri, path=""))
    except OSError as exc:
        raise error_class(f"{option}: expected a URI that can be opened, got {text}; {exc}") from exc
    bucket = uri.place.partition("@")[0]
    return BucketStore(client, bucket), f"{bucket}/{uri.path}".rstrip("/")


def temporary_beside(path: str) -> Path:
    """Name the file that this process writes before it takes the name of `path`."""
    # Processes of two hosts that share the folder may have the same id.
    host = zlib.crc32(socket.gethostname().encode())
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}{host:08x}.tmp")


def reason(exc: OSError) -> str:
    """Say what went wrong in the system's words."""
    words = exc.strerror or str(exc)
    # Arrow has them behind its own.
    return words.rpartition("Detail: [errno ")[2].partition("] ")[2] or words


def _open_regular(path: str | bytes) -> tuple[int, int]:
    """Open a file to read it; return its descriptor and its size."""
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer that never comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise NotAFileError("not a regular file")
    return descriptor, status.st_size


def _local_entry(path: str, status: os.stat_result) -> Entry:
    is_folder = stat.S_ISDIR(status.st_mode)
    return Entry(path, -1 if is_folder else status.st_size, status.st_mtime_ns, is_folder)


def _too_large(num_bytes: int) -> TooLargeError:
    return TooLargeError(f"{num_bytes} bytes, more than {MAX_FILE_BYTES}")
