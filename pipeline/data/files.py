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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data import uris
from pipeline.data.ahead import DEFAULT_CONCURRENCY, Admit, read_many
from pipeline.data.formats import ENDINGS, format_of
from pipeline.data.storage import MAX_FILE_BYTES, LocalStore, NotAFileError, Store, TooLargeError, open_root, reason
from pipeline.errors import DataError, printable, quoted

# Sizes in bytes and times of the last change in nanoseconds, [N] each; -1 for what is not known.
Stamps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
# Formats that Pillow recognises by their first bytes; a file of another ending is counted and left alone.
IMAGE_ENDINGS = tuple(
    b".png .apng .jpg .jpeg .jpe .jfif .gif .bmp .dib .ppm .pgm .pbm .pnm .pfm .tif .tiff .webp .jp2 .j2k .jpx "
    b".avif".split()
)
# Folders that systems keep for themselves, beside those with a leading dot: of macOS and its archives, Windows,
# Synology, QNAP, Linux and Python. In lower case.
_SYSTEM_FOLDERS = frozenset(
    (b"__macosx", b"network trash folder", b"temporary items", b"$recycle.bin", b"recycler", b"found.000",
     b"system volume information", b"@eadir", b"@tmp", b"@sharebin", b"@sharesnap", b"#recycle", b"#snapshot",
     b"@recycle", b"@recently-snapshot", b"lost+found", b"__pycache__")
)  # fmt: skip
_GLOB = re.compile(r"[*{]")
DIGITS = Path(__file__).with_name("digits.parquet")
# Of a file's beginning, in which its header is looked for.
HEAD_BYTES = 2**16
# Errors that belong to one file. Any other (no memory, too many open files, no network) would make good images look
# bad, and fails the job instead.
_FILE_ERRNOS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EIO, errno.ENOTDIR,
     errno.ENAMETOOLONG, errno.ESTALE, errno.ENODEV)
)  # fmt: skip


@dataclass(frozen=True)
class Location:
    """A dataset's root: a local folder, a URI of object storage, or `digits` in the package.

    A folder or URI may also be that of one archive, or have archives below it, those that `pattern` names where there
    is one. `digits` has a kind of its own because no ordinary form of it serves every cluster: nodes have the package,
    but not a folder that the driver unpacks; as an archive its images would have other keys; and as a folder in the
    package it would be 1,797 files of 120 bytes. `concurrency` is how many of its files a process reads at a time
    where reading has to wait.
    """

    kind: Literal["folder", "uri", "package"]
    root: str
    pattern: str = ""
    concurrency: int = DEFAULT_CONCURRENCY

    def __reduce__(self) -> tuple[type[Location], tuple[str, str, str, int]]:
        # Without what it has opened, which belongs to one process.
        return Location, (self.kind, self.root, self.pattern, self.concurrency)

    @cached_property
    def store(self) -> tuple[Store, str]:
        """The store, and the root's path on it; connects at first use in each process."""
        return (LocalStore(), self.root) if self.kind == "folder" else open_root("--data", self.root, DataError)


@dataclass(frozen=True)
class ReadFault:
    """Why one file's bytes could not be had: one of `REASONS` of `decoding.images`, and the system's words."""

    reason: Literal["unreadable", "not_a_file", "too_large"]
    error: str


def locate(
    data: str, on_download: Callable[[int, int], None] | None = None, concurrency: int = DEFAULT_CONCURRENCY
) -> Location:
    """Find where `--data` points to, fetching a dataset known by name if it is not there yet.

    Args:
        data: `digits`, `mnist_sample`, a local folder, or a URI such as `s3://bucket/folder`.
        on_download: Called with the bytes done and the bytes in all while fetching.
        concurrency: Files that each process reads at a time, where reading has to wait.

    Raises:
        DownloadError: If a dataset known by name cannot be had.
        DataError: If there is no such folder.
    """
    if data == "digits":
        return Location("package", data)
    if data == "mnist_sample":
        # Here, because its HTTP and tar libraries would load in every decoding process.
        from pipeline.data import download

        return Location("folder", str(download.fetch(download.cache_folder(), on_download)), "", concurrency)
    data = uris.plain_path(data)
    # A path that is there is meant, even if it reads as a pattern.
    is_there = os.path.exists(os.path.expanduser(data))  # noqa: PTH110, PTH111 - of what can be no path, too
    root, pattern = (data, "") if is_there else split_glob(data)
    if uris.is_uri(root):
        return Location("uri", uris.trimmed("--data", root, DataError), pattern, concurrency)
    try:
        folder = Path(root).expanduser()
        if folder.is_dir():
            return Location("folder", str(folder.resolve()), pattern, concurrency)
        if folder.is_file() and format_of(folder.name):
            # Not resolved: what a link leads to may have a name of another kind, as in the caches of hubs.
            return Location("folder", os.path.abspath(folder), pattern, concurrency)  # noqa: PTH100 - keeps links
        found = f"a file that is no uncompressed {' or '.join(ENDINGS)}" if folder.exists() else "nothing"
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


def read_images(
    location: Location, keys: pa.BinaryArray, sizes_N: npt.NDArray[np.int64] | None = None
) -> Iterator[bytes | ReadFault]:
    """Read the files of N keys, in that order, and others ahead of them where reading has to wait.

    Args:
        location: The dataset.
        keys: Of the files.
        sizes_N: Their sizes in bytes, where the listing has them.

    Raises:
        DataError: If the storage itself fails, so that no more file of it can be told good or bad.
    """
    if location.kind == "package":
        missing = ReadFault("unreadable", "no such image in the package")
        return (_read_digits().get(key, missing) for key in keys.to_pylist())
    store, paths = _paths(location, keys)
    if sizes_N is None:
        answers = read_many(store.read, paths, location.concurrency, is_local=store.is_local)
    else:
        items = zip(paths, sizes_N.tolist(), strict=True)
        answers = read_many(partial(_read_sized, store), items, location.concurrency, is_local=store.is_local)
    return map(_bytes_or_fault, paths, answers)


def read_heads(location: Location, keys: pa.BinaryArray) -> Iterator[bytes | ReadFault]:
    """Read the first `HEAD_BYTES` of files, all at once; of the package's images, all."""
    if location.kind == "package":
        return read_images(location, keys)
    store, paths = _paths(location, keys)
    answers = read_many(partial(_read_head, store), paths, location.concurrency, is_local=store.is_local)
    return map(_bytes_or_fault, paths, answers)


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
            store, root = location.store
            path = f"{root}/{display(prefix)}".rstrip("/")
            with _one_line_faults(location):
                found = [(entry.name.encode(), entry.is_folder) for entry in store.entries(path, recursive=False)]
            if not found and not prefix:
                raise DataError(f"--data: expected a folder at {location.root}, got nothing; check the name")
    ignored.update(ending(name) for name, is_folder in found if not is_folder)
    return sorted(name for name, is_folder in found if is_folder)


def list_files(location: Location, prefix: bytes, ignored: Counter[str]) -> tuple[list[bytes], Stamps | None]:
    """Return the keys of all files below `prefix`, at any depth, in no order; and, of an object store, their stamps.

    Other storage would have to be asked file by file. Folders of systems are left out and counted.
    """
    match location.kind:
        case "folder":
            with _one_line_faults(location):
                root = os.fsencode(location.root) + b"/"
                folders = prefix.split(b"/")[:-1]
                above = frozenset(_identity(root + b"/".join(folders[:depth])) for depth in range(len(folders)))
                keys: list[bytes] = []
                _walk(root, prefix, above, keys, ignored)
                return keys, None
        case "package":
            return [key for key in _read_digits() if key.startswith(prefix)], None
        case "uri":
            store, root_path = location.store
            keys, sizes, times_ns = [], [], []
            with _one_line_faults(location):
                for path, size, mtime_ns, _ in store.entries(f"{root_path}/{display(prefix)[:-1]}", recursive=True):
                    key = path[len(root_path) + 1 :].encode()
                    if folder := system_folder_in(key[len(prefix) :]):
                        ignored[f"{display(folder)}/"] += 1
                    else:
                        keys.append(key)
                        sizes.append(size)
                        times_ns.append(-1 if mtime_ns is None else mtime_ns)
            return keys, (np.array(sizes, np.int64), np.array(times_ns, np.int64))


def display(name: bytes) -> str:
    r"""Spell a name as text; bytes that are no UTF-8 become `\xNN`, so that every name can be stored and shown."""
    return name.decode("utf-8", "backslashreplace")


def enumerate_names(names: Sequence[str]) -> str:
    """Name up to ten, in quotes where that tells them apart, and count the others."""
    return _enumerate([quoted(name) for name in names[:10]], len(names))


def name_ignored(num_ignored: Mapping[str, int]) -> str:
    """Say how many files were ignored of which endings, the most frequent first."""
    counts = sorted(num_ignored.items(), key=lambda item: (-item[1], item[0]))
    return _enumerate([f"{number:,} {name}" for name, number in counts[:10]], len(counts)) or "none"


def _enumerate(texts: Sequence[str], number: int) -> str:
    return ", ".join(map(printable, texts)) + (f" and {number - len(texts):,} more" if number > len(texts) else "")


def is_system_folder(name: bytes) -> bool:
    """Say whether a folder belongs to a system and not to a person, with what is in it."""
    return name.startswith(b".") or name.lower() in _SYSTEM_FOLDERS


def system_folder_in(path: bytes) -> bytes | None:
    """Find the first folder of a path that belongs to a system; its last part is no folder."""
    return next((part for part in path.split(b"/")[:-1] if is_system_folder(part)), None)


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


def _paths(location: Location, keys: pa.BinaryArray) -> tuple[Store, list[bytes]]:
    store, root = location.store
    if store.is_local and not os.path.isdir(root):  # noqa: PTH112 - on a node that came later; not every file's fault
        raise DataError(
            f"{location.root}: expected the dataset's folder on every node, got none on {socket.gethostname()}; give a "
            "URI, or a folder that all nodes share"
        )
    beginning = os.fsencode(root) + b"/"
    return store, [beginning + key for key in keys.to_pylist()]


def _read_sized(store: Store, item: tuple[bytes, int], admit: Admit) -> bytes:
    """Read a file of which the listing has told the size, so that there is room before it is asked for."""
    path, size = item
    admit(size)
    # Where all comes of a request for one byte more than that, it is the whole file, by a fifth less CPU than without.
    if 0 < size <= MAX_FILE_BYTES and len(data := store.read_range(os.fsdecode(path), 0, size + 1)) == size:
        return data
    return store.read(path, lambda _: None)


def _read_head(store: Store, path: bytes, admit: Admit) -> bytes:
    admit(HEAD_BYTES)
    return store.read_range(os.fsdecode(path), 0, HEAD_BYTES)


def _bytes_or_fault(path: bytes, exc: bytes | OSError) -> bytes | ReadFault:
    """Make a fault of what is wrong with one file.

    Raises:
        DataError: If it is the storage that fails.
    """
    if isinstance(exc, bytes):
        return exc
    match exc:
        case NotAFileError():
            return ReadFault("not_a_file", str(exc))
        case TooLargeError():
            return ReadFault("too_large", str(exc))
    if exc.errno not in _FILE_ERRNOS:
        raise DataError(
            f"{display(path)}: expected to read it, got {reason(exc)}; check the storage and run again"
        ) from exc
    return ReadFault("unreadable", reason(exc))


@contextmanager
def _one_line_faults(location: Location) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if location.kind == "uri":
            raise DataError(f"--data: expected to list {location.root}, got {exc}; check name and access") from exc
        where = display(exc.filename) if isinstance(exc.filename, bytes) else location.root
        raise DataError(f"{where}: expected to list it, got {exc.strerror}; check the folder's rights") from exc


def _walk(
    root: bytes, prefix: bytes, parents: frozenset[tuple[int, int]], keys: list[bytes], ignored: Counter[str]
) -> None:
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
        if is_system_folder(name):
            ignored[f"{display(name)}/"] += 1
        else:
            _walk(root, prefix + name + b"/", parents | {identity}, keys, ignored)


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - names are bytes
    return status.st_dev, status.st_ino


@functools.cache
def _read_digits() -> dict[bytes, bytes]:
    """Read the images of `digits`, by key."""
    import pyarrow.parquet as pq  # here, because it would load in every decoding process

    table = pq.read_table(DIGITS)
    keys = (key.encode() for key in table["key"].to_pylist())
    return dict(zip(keys, table["image"].to_pylist(), strict=True))
