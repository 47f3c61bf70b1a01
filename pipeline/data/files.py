"""Where images are: the names below a location and the bytes of each file.

Input: `--data`, a name, a folder or a URI. Output: keys, and for keys the bytes of their files. Invariant: what is
listed is later read or named in a `ReadFault`, and never opened before that.

A key is a path below the dataset's root, kept as the bytes that the file system gave: file names need not be UTF-8.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data import storage
from pipeline.data.formats import format_of
from pipeline.errors import DataError

# Sizes in bytes and times of the last change in nanoseconds, [N] each; -1 for what is not known.
Stamps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
# Formats that Pillow recognises by their first bytes; a file of another ending is counted and left alone.
IMAGE_ENDINGS = tuple(
    b".png .apng .jpg .jpeg .jpe .jfif .gif .bmp .dib .ppm .pgm .pbm .pnm .pfm .tif .tiff .webp .jp2 .j2k .jpx "
    b".avif".split()
)
_GLOB = re.compile(r"[*{]")
DIGITS = Path(__file__).with_name("digits.parquet")
MAX_FILE_BYTES = 2**30
# Errors that belong to one file. Any other (no memory, too many open files, no network) would make good images look
# bad, and fails the job instead.
_FILE_ERRNOS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EIO, errno.ENOTDIR,
     errno.ENAMETOOLONG, errno.ESTALE, errno.ENODEV)
)  # fmt: skip


@dataclass(frozen=True)
class Location:
    """A dataset's root: a local folder, a URI of `pyarrow.fs`, or `digits` in the package.

    A folder or URI may also be that of one archive, or have archives below it, those that `pattern` names where there
    is one. `digits` has a kind of its own because no ordinary form of it serves every cluster: nodes have the package,
    but not a folder that the driver unpacks; as an archive its images would have other keys; and as a folder in the
    package it would be 1,797 files of 120 bytes.
    """

    kind: Literal["folder", "uri", "package"]
    root: str
    pattern: str = ""

    def __reduce__(self) -> tuple[type[Location], tuple[str, str, str]]:
        # Without what it has opened, which belongs to one process.
        return Location, (self.kind, self.root, self.pattern)

    @cached_property
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The file system, and the root's path on it; connects at first use in each process."""
        if self.kind == "folder":
            return pafs.LocalFileSystem(), self.root
        return storage.open_uri("--data", self.root, DataError)


@dataclass(frozen=True)
class ReadFault:
    """Why one file's bytes could not be had: one of `REASONS` of `decoding.images`, and the system's words."""

    reason: Literal["unreadable", "not_a_file", "too_large"]
    error: str


def locate(data: str, on_download: Callable[[int, int], None] | None = None) -> Location:
    """Find where `--data` points to, fetching a dataset known by name if it is not there yet.

    Args:
        data: `digits`, `mnist_sample`, a local folder, or a URI such as `s3://bucket/folder`.
        on_download: Called with the bytes done and the bytes in all while fetching.

    Raises:
        DownloadError: If a dataset known by name cannot be had.
        DataError: If there is no such folder.
    """
    if data == "digits":
        return Location("package", data)
    if data == "mnist_sample":
        # Here, because its HTTP and tar libraries would load in every decoding process.
        from pipeline.data import download

        return Location("folder", str(download.fetch(download.cache_folder(), on_download)))
    data = storage.plain_path(data)
    # A path that is there is meant, even if it reads as a pattern.
    is_there = os.path.exists(os.path.expanduser(data))  # noqa: PTH110, PTH111 - of what can be no path, too
    root, pattern = (data, "") if is_there else split_glob(data)
    if storage.is_uri(root):
        return Location("uri", storage.trimmed("--data", root, DataError), pattern)
    try:
        folder = Path(root).expanduser()
        if folder.is_dir() or (folder.is_file() and format_of(folder.name)):
            return Location("folder", str(folder.resolve()), pattern)
        found = "a file" if folder.exists() else "nothing"
    except RuntimeError:
        found = "no such user"
    except OSError as exc:
        found = exc.strerror or "nothing"
    raise DataError(
        f"--data: expected a folder at {data}, got {found}; give a folder with train and valid, or with class folders "
        "and --valid-fraction, or archives"
    )


def split_glob(data: str) -> tuple[str, str]:
    """Part a path or URI at the first component that is a pattern.

    Patterns are `*` (anything but a slash), `**` (any folders), `{a,b}` and `{000..146}` (one of these, as WebDataset
    writes ranges of shards). A question mark is none: it begins the options of a URI, which stay with the root.

    Returns:
        The root, and the pattern below it; an empty pattern if there is none.
    """
    base, mark, query = data.partition("?") if "://" in data else (data, "", "")
    found = _GLOB.search(base)
    if found is None:
        return data, ""
    cut = base.rfind("/", 0, found.start()) + 1
    return (base[:cut] or ".") + mark + query, base[cut:]


def read_images(location: Location, keys: pa.BinaryArray) -> Iterator[bytes | ReadFault]:
    """Read the files of `keys`, in that order.

    Raises:
        DataError: If the storage itself fails, so that no more file of it can be told good or bad.
    """
    match location.kind:
        case "folder":
            if not os.path.isdir(location.root):  # noqa: PTH112 - on a node that came later; not every file's fault
                raise DataError(
                    f"{location.root}: expected the dataset's folder on every node, got none on "
                    f"{socket.gethostname()}; give a URI, or a folder that all nodes share"
                )
            root = os.fsencode(location.root) + b"/"
            return (_read_local(root + key) for key in keys.to_pylist())
        case "package":
            return (_read_digits()[key] for key in keys.to_pylist())
        case "uri":
            filesystem, root_path = location.filesystem
            return (_read_remote(filesystem, f"{root_path}/{display(key)}") for key in keys.to_pylist())


def file_sizes(location: Location, names: Sequence[bytes]) -> list[int]:
    """Return the sizes in bytes of files below a local root, or of the root where that is one; -1 if not there."""
    root = os.fsencode(location.root)
    sizes = []
    for name in names:
        try:
            sizes.append(os.stat(root if name == b"." else root + b"/" + name).st_size)  # noqa: PTH116 - bytes
        except OSError:
            sizes.append(-1)
    return sizes


def list_folder(location: Location, prefix: bytes, ignored: Counter[str]) -> list[bytes]:
    """Return the folders right below `prefix`, sorted, and count the files there: none belongs to a class."""
    match location.kind:
        case "folder":
            with _one_line_faults(location), os.scandir(os.fsencode(location.root) + b"/" + prefix) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        case "package":
            below = (key.removeprefix(prefix) for key in _read_digits() if key.startswith(prefix))
            found = [(name, True) for name in {path.split(b"/")[0] for path in below}]
        case "uri":
            found = [
                (info.base_name.encode(), info.type == pafs.FileType.Directory)
                for info in _list_remote(location, prefix, recursive=False)
            ]
    ignored.update(ending(name) for name, is_folder in found if not is_folder)
    return sorted(name for name, is_folder in found if is_folder)


def list_files(location: Location, prefix: bytes, *, with_stamps: bool) -> tuple[list[bytes], Stamps | None]:
    """Return the keys of all files below `prefix`, at any depth, in no order; and, of an object store, their stamps.

    Other storage would have to be asked file by file.
    """
    match location.kind:
        case "folder":
            with _one_line_faults(location):
                root = os.fsencode(location.root) + b"/"
                folders = prefix.split(b"/")[:-1]
                above = frozenset(_identity(root + b"/".join(folders[:depth])) for depth in range(len(folders)))
                keys: list[bytes] = []
                _walk(root, prefix, above, keys)
                return keys, None
        case "package":
            return [key for key in _read_digits() if key.startswith(prefix)], None
        case "uri":
            root_length = len(location.filesystem[1].rstrip("/")) + 1
            infos = _list_remote(location, prefix, recursive=True)
            files = [(info.path[root_length:].encode(), info) for info in infos if info.type == pafs.FileType.File]
            files = [(key, info) for key, info in files if not _is_in_hidden(key, prefix)]
            keys = [key for key, _ in files]
            if not with_stamps:
                return keys, None
            sizes = np.array([info.size for _, info in files], np.int64)
            times_ns = np.array([-1 if info.mtime_ns is None else info.mtime_ns for _, info in files], np.int64)
            return keys, (sizes, times_ns)


def display(name: bytes) -> str:
    r"""Spell a name as text; bytes that are no UTF-8 become `\xNN`, so that every name can be stored and shown."""
    return name.decode("utf-8", "backslashreplace")


def is_image_name(key: bytes) -> bool:
    """Say by its ending whether a file counts as an image."""
    name = key[key.rfind(b"/") + 1 :]
    # A leading dot marks what a file manager keeps for itself, ._7.png beside 7.png among them.
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(b".")


def ending(key: bytes) -> str:
    """Name the kind of a file that is no image, to count it by."""
    name = key[key.rfind(b"/") + 1 :]
    if name.startswith(b"._"):  # as many as there are images, where a Mac has been
        return "._*"
    return display(name if name.startswith(b".") else name[name.rfind(b".") :].lower() if b"." in name else b"none")


def _read_local(path: bytes) -> bytes | ReadFault:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer that never comes.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return ReadFault("not_a_file", "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                return ReadFault("too_large", f"{status.st_size} bytes, more than {MAX_FILE_BYTES}")
            data = os.read(descriptor, status.st_size + 1)
            if len(data) != status.st_size:  # a short read, or a file that is being written
                while chunk := os.read(descriptor, 1 << 20):
                    data += chunk
            return data
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno not in _FILE_ERRNOS:
            raise DataError(f"{display(path)}: expected to read it, got {exc.strerror}; run again") from exc
        return ReadFault("unreadable", exc.strerror or type(exc).__name__)


def _read_remote(filesystem: pafs.FileSystem, path: str) -> bytes | ReadFault:
    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            data: bytes = stream.read()
            return data

    try:
        return storage.with_retries(read, path)
    except (FileNotFoundError, PermissionError) as exc:
        return ReadFault("unreadable", os.strerror(exc.errno) if exc.errno else type(exc).__name__)
    except OSError as exc:
        raise DataError(f"{path}: expected to read it, got {exc}; check the connection and run again") from exc


@contextmanager
def _one_line_faults(location: Location) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        where = display(exc.filename) if isinstance(exc.filename, bytes) else location.root
        raise DataError(f"{where}: expected to list it, got {exc.strerror}; check the folder's rights") from exc


def _walk(root: bytes, prefix: bytes, parents: frozenset[tuple[int, int]], keys: list[bytes]) -> None:
    # Links to folders are followed, as others' image folders do; a link to one of its own parents is not.
    identity = _identity(root + prefix)
    if identity in parents:
        return
    folders = []
    with os.scandir(root + prefix) as entries:
        for entry in entries:  # a call less for each of a million files is a tenth of a second
            try:
                is_folder = entry.is_dir()
            except OSError:
                # A link that leads nowhere is one bad image; behind a closed folder there may be any number of them.
                if not is_image_name(entry.name):
                    raise
                is_folder = False
            if is_folder:
                folders.append(entry.name)
            else:
                keys.append(prefix + entry.name)
    for name in folders:
        if not name.startswith(b"."):
            _walk(root, prefix + name + b"/", parents | {identity}, keys)


def _is_in_hidden(key: bytes, prefix: bytes) -> bool:
    return any(part.startswith(b".") for part in key[len(prefix) :].split(b"/")[:-1])


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - names are bytes
    return status.st_dev, status.st_ino


def _list_remote(location: Location, prefix: bytes, *, recursive: bool) -> list[pafs.FileInfo]:
    filesystem, root_path = location.filesystem
    path = f"{root_path}/{display(prefix)}".rstrip("/")
    try:
        selector = pafs.FileSelector(path, recursive=recursive)
        found: list[pafs.FileInfo] = storage.with_retries(lambda: filesystem.get_file_info(selector), path)
    except FileNotFoundError as exc:
        raise DataError(f"--data: expected a folder at {location.root}, got nothing; check the name") from exc
    except OSError as exc:
        raise DataError(f"--data: expected to list {path}, got {exc}; check name and access") from exc
    return found


@functools.cache
def _read_digits() -> dict[bytes, bytes]:
    """Read the images of `digits`, by key."""
    import pyarrow.parquet as pq  # here, because it would load in every decoding process

    table = pq.read_table(DIGITS)
    keys = (key.encode() for key in table["key"].to_pylist())
    return dict(zip(keys, table["image"].to_pylist(), strict=True))
