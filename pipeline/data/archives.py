"""Datasets in tar or Parquet files: finding the files, and the index that a scan makes of each.

What enters: a file system of `pyarrow.fs` and a file, a folder or a glob on it. What leaves: `Archive` records in the
order in which people sort; and, from the rows that `tars` or `parquets` found in one of them, a `Scan` of counts and an
index of one row an image. Always: an index keeps the order of its file, so that reading goes forward, and a key is the
archive's name below the root, a slash, and what finds the image inside.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config import Config
from pipeline.data import storage
from pipeline.data.files import ending, is_image_name
from pipeline.data.splits import Split, is_held_out, natural_sort_key, split_in_path, valid_names
from pipeline.errors import DataError

# label: an index into the class names of the scan. offset: the first byte in a tar, the row in a Parquet file.
# size: bytes in a tar; 0 in a Parquet file, which does not say.
INDEX = pa.schema([("key", pa.binary()), ("label", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
# Sides of `ScannedImages`, before the options decide.
TRAIN, VALID, NO_SPLIT, LEFT_OUT = range(4)

Kind = Literal["tar", "parquet"]
Index: TypeAlias = dict[Split, pa.Table]

_KINDS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_TOKEN = re.compile(r"(\*\*/)|(\*\*)|(\*)|\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_MAX_DEPTH = 32
_MAX_RANGE = 100_000


@dataclass(frozen=True)
class Archive:
    """A file of many images.

    Attributes:
        kind: How it is read: by `tars` or by `parquets`.
        path: Its path on the file system.
        name: Its path below the dataset's root, with which the keys of its images begin.
        size_bytes: Its size as listed.
        mtime_ns: When it was changed, in nanoseconds of Unix time, where the file system says it.
        split: The split that all of its images belong to, where the name says it.
        split_name: How the name calls that split.
    """

    kind: Kind
    path: str
    name: str
    size_bytes: int
    mtime_ns: int | None
    split: Split | None
    split_name: str | None


@dataclass(frozen=True)
class Scan:
    """What one archive holds, without anything per image.

    Attributes:
        class_names: What a label of the index stands for. A Parquet file that lists its classes gives all of them.
        num_images: Images by split and class; classes without images are left out.
        row_groups: By split, the rows of the index where a row group begins, and at last their number. Cutting shards
            there lets no two of them decode the same row group. A tar is one group.
        split_names: The splits that the folders inside name, where the archive's own name does not.
        num_ignored: Members that are no images, by ending.
    """

    class_names: tuple[str, ...]
    num_images: dict[Split, dict[str, int]]
    row_groups: dict[Split, tuple[int, ...]]
    split_names: tuple[str, ...]
    num_ignored: dict[str, int]


@dataclass(frozen=True)
class ScannedImages:
    """All images of one archive in its order: what a scan has found before the options choose among them.

    Attributes:
        keys: Binary.
        labels: int32 (N,), indices into `class_names`.
        offsets: int64 (N,).
        sizes: int64 (N,).
        sides: int8 (N,), each `TRAIN`, `VALID`, `NO_SPLIT` or `LEFT_OUT`.
        class_names: K names.
        group_starts: int64 (G,), the first row of each row group.
    """

    keys: pa.ChunkedArray
    labels: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sides: npt.NDArray[np.int8]
    class_names: tuple[str, ...]
    group_starts: npt.NDArray[np.int64]


def find_archives(
    filesystem: pafs.FileSystem, root: str, pattern: str, config: Config, ignored: Counter[str]
) -> list[Archive]:
    """Find the archives of a dataset, sorted as people do, and choose those of the two splits.

    Args:
        filesystem: Where they are.
        root: The path of a folder, or of one file.
        pattern: What `files.split_glob` cut off, or nothing for all files in the folder at any depth.
        config: The options.
        ignored: Counts, by ending, the files that are neither archives nor images.

    Returns:
        The archives; none if the folder holds images or nothing, and is to be listed as class folders.

    Raises:
        DataError: If there is no such file or folder, or what is there is not one dataset of one kind.
    """
    root = root.rstrip("/") or "/"
    with reading(root):
        at_root = storage.with_retries(lambda: filesystem.get_file_info(root), root)
    if at_root.type == pafs.FileType.NotFound:
        raise DataError(f"--data: expected a file or folder at {root}, got nothing; check the name")
    is_folder = at_root.type == pafs.FileType.Directory and not pattern
    archives: list[Archive] = []
    image = compressed = None
    num_others: Counter[str] = Counter()
    is_file = at_root.type == pafs.FileType.File
    for name, info in [(at_root.base_name, at_root)] if is_file else _search(filesystem, root, pattern):
        kind = _KINDS.get(name[name.rfind(".") :].lower())
        if kind is not None:
            archives.append(_describe(kind, name, info or filesystem.get_file_info(f"{root}/{name}"), config))
        elif is_image_name(os.fsencode(name)):
            if is_folder and not archives:
                return []  # it is listed again, as class folders, which need not be walked to their end here
            image = image or name
        elif _COMPRESSED.search(name):
            compressed = compressed or name
        else:
            num_others[ending(os.fsencode(name))] += 1
    if not archives and not compressed and is_folder:
        return []
    _check_kinds(f"{root}/{pattern}".rstrip("/"), archives, image, compressed)
    ignored.update(num_others)
    return _choose_splits(
        root, sorted(archives, key=lambda archive: natural_sort_key(os.fsencode(archive.name))), config
    )


def make_index(
    archive: Archive, rows: ScannedImages, config: Config, split_names: tuple[str, ...], ignored: Counter[str]
) -> tuple[Scan, Index]:
    """Choose the images of both splits and of the classes asked for, and hold out where there are no splits.

    Args:
        archive: The file.
        rows: Its images.
        config: The options.
        split_names: The splits that folders inside name.
        ignored: Its other members, by ending.

    Raises:
        DataError: If the images belong to no split and none is to be held out.
    """
    sides = rows.sides
    if (sides == NO_SPLIT).any():
        if config.valid_fraction is None:
            raise DataError(
                f"{archive.path}: expected {config.train_split} and {' or '.join(valid_names(config))} as words of the "
                "files' paths, or as folders inside of a tar, got no two splits; name them with --train-split and "
                "--valid-split, or hold images out with --valid-fraction 0.2"
            )
        keys = (key for chunk in rows.keys.chunks for key in chunk.to_pylist())
        is_valid = np.fromiter((is_held_out(key, config.valid_fraction) for key in keys), np.bool_, len(rows.keys))
        sides = np.where(sides == NO_SPLIT, np.where(is_valid, VALID, TRAIN), sides)
    if config.classes:
        wanted = [label for label, name in enumerate(rows.class_names) if name in config.classes]
        sides = np.where(np.isin(rows.labels, wanted), sides, LEFT_OUT)
    table = pa.table([rows.keys, rows.labels, rows.offsets, rows.sizes], schema=INDEX)
    index: Index = {}
    num_images: dict[Split, dict[str, int]] = {}
    row_groups: dict[Split, tuple[int, ...]] = {}
    choices: tuple[tuple[Split, int], ...] = (("train", TRAIN), ("valid", VALID))
    for split, side in choices:
        chosen = sides == side
        index[split] = table if chosen.all() else table.filter(pa.array(chosen))
        counts = np.bincount(rows.labels[chosen], minlength=len(rows.class_names))
        num_images[split] = {rows.class_names[label]: int(counts[label]) for label in np.flatnonzero(counts)}
        starts = np.searchsorted(np.flatnonzero(chosen), rows.group_starts)
        row_groups[split] = tuple(sorted({0, *starts.tolist(), int(chosen.sum())}))
    return Scan(rows.class_names, num_images, row_groups, split_names, dict(sorted(ignored.items()))), index


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a file system or Arrow raises into one line that names the file."""
    try:
        yield
    except FileNotFoundError as exc:
        raise DataError(f"{path}: expected to read it, got no such file; check the name and run again") from exc
    # UnicodeError: Arrow takes paths as text alone.
    except (OSError, pa.ArrowException, UnicodeError) as exc:
        raise DataError(f"{path}: expected to read it, got {exc}; check the file and the connection") from exc


def open_file(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile:
    """Open a file to be read at any place."""
    return storage.with_retries(lambda: filesystem.open_input_file(path), path)


def is_local(filesystem: pafs.FileSystem) -> bool:
    """Say whether a small read costs microseconds, and not a request."""
    return bool(filesystem.type_name == "local")


def _search(filesystem: pafs.FileSystem, root: str, pattern: str) -> Iterator[tuple[str, pafs.FileInfo | None]]:
    """Yield names below the root, with what is known of them: the files of a folder before the folders in it."""
    expression = re.compile(_translate(pattern) if pattern else ".*", re.DOTALL)
    depth = pattern.count("/") if pattern and "**" not in pattern else _MAX_DEPTH
    waiting = [""]
    while waiting:
        above = waiting.pop()
        folders = []
        for name, is_folder, info in _list_folder(filesystem, f"{root}/{above}".rstrip("/") or "/"):
            if name.startswith("."):
                continue
            if not is_folder and expression.fullmatch(above + name):
                yield above + name, info
            elif is_folder and above.count("/") < depth:
                folders.append(f"{above}{name}/")
        waiting += sorted(folders, key=lambda folder: natural_sort_key(os.fsencode(folder)), reverse=True)


def _list_folder(filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[str, bool, pafs.FileInfo | None]]:
    with reading(path):
        if not is_local(filesystem):
            for info in storage.with_retries(lambda: filesystem.get_file_info(pafs.FileSelector(path)), path):
                yield info.base_name, info.type == pafs.FileType.Directory, info
            return
        # Arrow would look at every file of a class folder, before the first of them says what the folder is.
        here = f"{Path(path).resolve()}/"
        with os.scandir(path) as entries:
            for entry in entries:
                is_folder = entry.is_dir()
                # A link to one of its own parents would be walked again and again.
                if not (is_folder and entry.is_symlink() and here.startswith(f"{Path(entry.path).resolve()}/")):
                    yield entry.name, is_folder, None


def _translate(pattern: str) -> str:
    """Make a regular expression of a glob."""
    parts = []
    end = 0
    for token in _TOKEN.finditer(pattern):
        folders, anything, name, first, last, words = token.groups()
        parts.append(re.escape(pattern[end : token.start()]))
        end = token.end()
        if folders:
            parts.append("(?:[^/]+/)*")
        elif anything or name:
            parts.append(".*" if anything else "[^/]*")
        elif words is not None:
            parts.append(f"(?:{'|'.join(_translate(word) for word in words.split(','))})")
        else:
            if int(last) - int(first) >= _MAX_RANGE:
                raise DataError(
                    f"--data: expected a range of at most {_MAX_RANGE} numbers, got {token[0]}; use * instead"
                )
            numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
            parts.append(f"(?:{'|'.join(numbers)})")
    return "".join(parts) + re.escape(pattern[end:])


def _describe(kind: Kind, name: str, info: pafs.FileInfo, config: Config) -> Archive:
    if info.type != pafs.FileType.File:
        raise DataError(f"{info.path}: expected a {kind} file, got none that can be read; take it away")
    split_name = split_in_path(name, config)
    split: Split | None = None if split_name is None else "train" if split_name == config.train_split else "valid"
    return Archive(kind, info.path, name, info.size, info.mtime_ns, split, split_name)


def _check_kinds(where: str, archives: list[Archive], image: str | None, compressed: str | None) -> None:
    if archives and image is not None:
        raise DataError(
            f"{where}: expected either class folders of images or archives, got both {image} and {archives[0].name}; "
            "move one of them elsewhere, or name the archives by a glob such as **/*.tar"
        )
    if compressed is not None:
        raise DataError(
            f"{where}: expected tar files that can be read at any place, got {compressed}, which is compressed; "
            "unpack it, or write it again as .tar"
        )
    if not archives:
        raise DataError(f"{where}: expected .tar or .parquet files, got {image or 'none'}; check the name")
    by_kind = {archive.kind: archive.name for archive in archives}
    if len(by_kind) > 1:
        raise DataError(
            f"{where}: expected archives of one kind, got {by_kind['tar']} and {by_kind['parquet']}; "
            "name one kind by a glob such as **/*.tar"
        )


def _choose_splits(where: str, archives: list[Archive], config: Config) -> list[Archive]:
    """Leave out what belongs to neither split, and forget the names where they do not say both."""
    valid_name = next((name for name in valid_names(config) if any(name == each.split_name for each in archives)), None)
    unnamed = next((archive.name for archive in archives if archive.split is None), None)
    if valid_name is None or not any(archive.split == "train" for archive in archives):
        # Train alone is a dataset without splits, and the name of a tar may stand for the splits inside.
        return [replace(archive, split=None, split_name=None) for archive in archives]
    if unnamed is not None:
        raise DataError(
            f"{where}: expected {config.train_split} or {valid_name} as a word of every file's path, got {unnamed} "
            "beside files that have it; rename it, or choose files by a glob"
        )
    if config.valid_fraction is not None:
        raise DataError(
            f"--valid-fraction: expected a dataset without splits, got files of {config.train_split} and of "
            f"{valid_name} in {where}; leave the option out, or choose files by a glob"
        )
    return [archive for archive in archives if archive.split_name in (config.train_split, valid_name)]
