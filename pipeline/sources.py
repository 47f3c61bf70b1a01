"""Where images are: a location's splits, classes and files, and the bytes of each file.

What enters: `--data`, a name, a folder or a URI. What leaves: a `Listing` (two sorted Arrow tables of keys and
labels) and, for a shard's keys, the bytes of its images one after another.

A key is a path below the dataset's root, kept as the bytes that the file system gave: file names need not be
UTF-8. Always: a file that is listed is later read or named in a `ReadFault`, and never opened before that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.errors import DataError

# Formats that Pillow recognises by their first bytes; a file of another ending is counted and left alone.
IMAGE_ENDINGS = frozenset(
    b".png .apng .jpg .jpeg .jpe .jfif .gif .bmp .dib .ppm .pgm .pbm .pnm .pfm .tif .tiff .webp .jp2 .j2k .jpx "
    b".avif".split()
)
VALID_SPLITS = ("valid", "val", "validation", "test")
DIGITS = Path(__file__).with_name("digits.parquet")
# Errors that belong to one file. Any other (no memory, too many open files, no network) would make good images
# look bad, and fails the job instead.
_FILE_ERRNOS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EIO, errno.ENOTDIR,
     errno.ENAMETOOLONG, errno.ESTALE, errno.ENODEV)
)  # fmt: skip
_LISTING = pa.schema([("key", pa.binary()), ("label", pa.int32())])

Split = Literal["train", "valid"]


@dataclass(frozen=True)
class Location:
    """A dataset's root: a local folder, a URI of `pyarrow.fs`, or a Parquet file of `key` and `image` bytes."""

    kind: Literal["folder", "uri", "parquet"]
    root: str

    @cached_property
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The file system of a URI and the root's path on it; connects at first use in each process."""
        try:
            filesystem, path = pafs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError) as exc:
            raise DataError(f"--data: expected a URI that can be opened, got {self.root}; {exc}") from exc
        return filesystem, path

    @cached_property
    def table(self) -> pa.Table:
        """The whole of a Parquet dataset: `key` string, `image` binary."""
        return pq.read_table(self.root, columns=["key", "image"])


@dataclass(frozen=True)
class Listing:
    """What a dataset holds, before any image is opened.

    `train` and `valid` are tables of `key` (binary) and `label` (int32, an index into `classes`), sorted by
    class and key. `num_ignored` counts the files that are no images by their ending.
    """

    location: Location
    classes: tuple[str, ...]
    train: pa.Table
    valid: pa.Table
    valid_split: str
    num_ignored: dict[str, int]

    def split(self, name: Split) -> pa.Table:
        """The table of one split."""
        return self.train if name == "train" else self.valid

    @property
    def num_images(self) -> int:
        """Images of both splits."""
        return len(self.train) + len(self.valid)

    @property
    def sha256(self) -> str:
        """A digest of all keys and labels in order: two listings are equal when their digests are."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for column in (*self.train.columns, *self.valid.columns):
            for buffer in column.combine_chunks().buffers():
                if buffer is not None:
                    digest.update(buffer)
        return digest.hexdigest()


@dataclass(frozen=True)
class ReadFault:
    """Why one file's bytes could not be had: a reason of the fixed list in `decode`, and the system's words."""

    reason: Literal["unreadable", "not_a_file"]
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
        return Location("parquet", str(DIGITS))
    if data == "mnist_sample":
        # Here, because its HTTP and tar libraries would load in every decoding process.
        from pipeline import download

        return Location("folder", str(download.fetch(download.MNIST_SAMPLE, download.cache_folder(), on_download)))
    if data.startswith("file://"):
        data = unquote(urlsplit(data).path)
    elif "://" in data:
        return Location("uri", data.rstrip("/"))
    folder = Path(data).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"--data: expected a folder at {folder}, got {found}; give a folder of class folders")
    return Location("folder", str(folder.resolve()))


def list_dataset(location: Location, config: Config) -> Listing:
    """List every image of both splits, sorted, with the classes as people sort them.

    Raises:
        DataError: If splits, classes or images are missing, or the two splits' classes differ.
    """
    ignored: Counter[str] = Counter()
    folders = _list_folder(location, b"", ignored)
    train_name = os.fsencode(config.train_split)
    if train_name in folders:
        if config.valid_fraction is not None:
            raise DataError(
                f"--valid-fraction: expected a dataset without splits, got {config.train_split}/ in "
                f"{location.root}; leave the option out, or point --data at {config.train_split}/ itself"
            )
        valid_split = _find_valid_split(location, folders, config)
        train = _list_classes(location, train_name + b"/", config, ignored)
        valid = _list_classes(location, os.fsencode(valid_split) + b"/", config, ignored)
        where = {"train": f"{config.train_split}/", "valid": f"{valid_split}/"}
    else:
        if config.valid_fraction is None:
            raise DataError(
                f"{location.root}: expected a folder {config.train_split}/, got "
                f"{_enumerate([display(name) for name in folders]) or 'no folder at all'}; name it with "
                "--train-split, or hold images out of a dataset without splits with --valid-fraction 0.2"
            )
        valid_split = config.valid_split
        train, valid = _hold_out(_list_classes(location, b"", config, ignored), config.valid_fraction)
        where = {"train": "the training share", "valid": "the held-out share"}
    classes = _check_classes(location, train, valid, where)
    return Listing(
        location,
        tuple(display(name) for name in classes),
        _to_table(classes, train),
        _to_table(classes, valid),
        valid_split,
        dict(sorted(ignored.items())),
    )


def read_images(location: Location, keys: pa.BinaryArray) -> Iterator[bytes | ReadFault]:
    """Read the files of `keys`, in that order.

    Raises:
        DataError: If the storage itself fails, so that no more file of it can be told good or bad.
    """
    match location.kind:
        case "folder":
            root = os.fsencode(location.root) + b"/"
            return (_read_local(root + key) for key in keys.to_pylist())
        case "parquet":
            images = dict(zip(location.table["key"].to_pylist(), location.table["image"].to_pylist(), strict=True))
            return (images[key.decode()] for key in keys.to_pylist())
        case "uri":
            filesystem, root_path = location.filesystem
            return (_read_remote(filesystem, f"{root_path}/{display(key)}") for key in keys.to_pylist())


def display(name: bytes) -> str:
    r"""Spell a name as text; bytes that are no UTF-8 become `\xNN`, so that every name can be stored and shown."""
    return name.decode("utf-8", "backslashreplace")


def _read_local(path: bytes) -> bytes | ReadFault:
    # O_NONBLOCK: opening a FIFO would otherwise wait for a writer that never comes.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return ReadFault("not_a_file", "not a regular file")
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
    try:
        with filesystem.open_input_stream(path) as stream:
            data: bytes = stream.read()
            return data
    except (FileNotFoundError, PermissionError) as exc:
        return ReadFault("unreadable", os.strerror(exc.errno) if exc.errno else type(exc).__name__)
    except OSError as exc:
        raise DataError(f"{path}: expected to read it, got {exc}; check the connection and run again") from exc


def _find_valid_split(location: Location, folders: list[bytes], config: Config) -> str:
    # Only the default name stands for its synonyms: a name that was given is meant.
    names = VALID_SPLITS if config.valid_split == "valid" else (config.valid_split,)
    for name in names:
        if os.fsencode(name) in folders:
            return name
    raise DataError(
        f"{location.root}: expected a folder {' or '.join(f'{name}/' for name in names)} beside "
        f"{config.train_split}/, got {_enumerate([display(name) for name in folders])}; name it with --valid-split"
    )


def _list_classes(location: Location, prefix: bytes, config: Config, ignored: Counter[str]) -> dict[bytes, list[bytes]]:
    """List the image keys of every class folder below `prefix`, sorted, leaving out classes not asked for."""
    folders = [name for name in _list_folder(location, prefix, ignored) if not name.startswith(b".")]
    wanted = [os.fsencode(name) for name in config.classes]
    if missing := [name for name in wanted if name not in folders]:
        raise DataError(
            f"--classes: expected folders of {location.root}/{display(prefix)}, got "
            f"{_enumerate([display(name) for name in missing])}, which is not there; "
            f"there are {_enumerate([display(name) for name in sorted(folders, key=_people_order)])}"
        )
    listed = {}
    for name in wanted or folders:
        keys = []
        for key in _list_files(location, prefix + name + b"/"):
            if _is_image_name(key):
                keys.append(key)
            else:
                ignored[_ending(key)] += 1
        listed[name] = sorted(keys)
    return listed


def _hold_out(
    listed: dict[bytes, list[bytes]], fraction: float
) -> tuple[dict[bytes, list[bytes]], dict[bytes, list[bytes]]]:
    """Cut each class in two by a hash of the key, so that an image stays on its side when others come or go."""
    limit = int(fraction * 2**64)

    def is_held_out(key: bytes) -> bool:
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < limit

    valid = {name: [key for key in keys if is_held_out(key)] for name, keys in listed.items()}
    train = {name: [key for key in keys if not is_held_out(key)] for name, keys in listed.items()}
    return train, valid


def _check_classes(
    location: Location,
    train: dict[bytes, list[bytes]],
    valid: dict[bytes, list[bytes]],
    where: dict[str, str],
) -> list[bytes]:
    root = location.root
    if not any(train.values()) and not any(valid.values()):
        raise DataError(
            f"{root}: expected image files in class folders, got none; "
            f"files count as images by their ending ({display(b' '.join(sorted(IMAGE_ENDINGS)))})"
        )
    classes = sorted(train.keys() | valid.keys(), key=_people_order)
    for name in classes:
        for split, listed in (("train", train), ("valid", valid)):
            if not listed.get(name):
                found = "an empty folder" if name in listed else "no such folder"
                raise DataError(
                    f"{root}: expected images of class {display(name)} in {where[split]}, got {found}; "
                    "add images or leave the class out with --classes"
                )
    if len(classes) < 2:
        raise DataError(
            f"{root}: expected at least two classes, got only {display(classes[0])}; "
            "a classifier needs something to tell apart"
        )
    return classes


def _to_table(classes: list[bytes], listed: dict[bytes, list[bytes]]) -> pa.Table:
    keys = pa.concat_arrays([pa.array(listed[name], pa.binary()) for name in classes])
    labels = pa.concat_arrays(
        [pa.repeat(pa.scalar(label, pa.int32()), len(listed[name])) for label, name in enumerate(classes)]
    )
    return pa.table([keys, labels], schema=_LISTING)


def _list_folder(location: Location, prefix: bytes, ignored: Counter[str]) -> list[bytes]:
    """Return the folders right below `prefix`, sorted, and count the files there: none belongs to a class."""
    match location.kind:
        case "folder":
            with _one_line_faults(location), os.scandir(os.fsencode(location.root) + b"/" + prefix) as entries:
                found = [(entry.name, entry.is_dir()) for entry in entries]
        case "parquet":
            below = {key.removeprefix(prefix) for key in _parquet_keys(location) if key.startswith(prefix)}
            found = list({(name.split(b"/")[0], b"/" in name) for name in below})
        case "uri":
            found = [
                (os.fsencode(info.base_name), info.type == pafs.FileType.Directory)
                for info in _list_remote(location, prefix, recursive=False)
            ]
    ignored.update(_ending(name) for name, is_folder in found if not is_folder)
    return sorted(name for name, is_folder in found if is_folder)


def _list_files(location: Location, prefix: bytes) -> list[bytes]:
    """Return the keys of all files below `prefix`, at any depth, in no order."""
    match location.kind:
        case "folder":
            with _one_line_faults(location):
                return list(_walk(os.fsencode(location.root) + b"/", prefix, frozenset()))
        case "parquet":
            return [key for key in _parquet_keys(location) if key.startswith(prefix)]
        case "uri":
            root_length = len(location.filesystem[1].rstrip("/")) + 1
            infos = _list_remote(location, prefix, recursive=True)
            return [os.fsencode(info.path[root_length:]) for info in infos if info.type == pafs.FileType.File]


@contextmanager
def _one_line_faults(location: Location) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        where = display(exc.filename) if isinstance(exc.filename, bytes) else location.root
        raise DataError(f"{where}: expected to list it, got {exc.strerror}; check the folder's rights") from exc


def _walk(root: bytes, prefix: bytes, parents: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    # Links to folders are followed, as others' image folders do; a link to one of its own parents is not.
    status = os.stat(root + prefix)  # noqa: PTH116 - names are bytes
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    with os.scandir(root + prefix) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith(b"."):
                    yield from _walk(root, prefix + entry.name + b"/", parents | {identity})
            else:
                yield prefix + entry.name


def _list_remote(location: Location, prefix: bytes, *, recursive: bool) -> list[pafs.FileInfo]:
    filesystem, root_path = location.filesystem
    path = f"{root_path}/{display(prefix)}".rstrip("/")
    try:
        found: list[pafs.FileInfo] = filesystem.get_file_info(pafs.FileSelector(path, recursive=recursive))
    except FileNotFoundError as exc:
        raise DataError(f"--data: expected a folder at {location.root}, got nothing; check the name") from exc
    except OSError as exc:
        raise DataError(f"--data: expected to list {path}, got {exc}; check name and access") from exc
    return found


def _parquet_keys(location: Location) -> list[bytes]:
    return [key.encode() for key in location.table["key"].to_pylist()]


def _is_image_name(key: bytes) -> bool:
    name = key[key.rfind(b"/") + 1 :]
    # A leading dot marks what a file manager keeps for itself, ._7.png beside 7.png among them.
    return not name.startswith(b".") and name[name.rfind(b".") :].lower() in IMAGE_ENDINGS


def _ending(key: bytes) -> str:
    name = key[key.rfind(b"/") + 1 :]
    return display(name if name.startswith(b".") else name[name.rfind(b".") :].lower() if b"." in name else b"none")


def _people_order(name: bytes) -> tuple[list[bytes | int], bytes]:
    """Sort numbers inside names by value: class2 before class10."""
    # Splitting at digits puts text at even and numbers at odd places, so like is compared with like.
    parts = re.split(rb"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
