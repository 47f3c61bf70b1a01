"""What a dataset holds: its splits, its classes and the images of each, in one order.

Input: a location and the options; for archives, what was found inside. Output: a `Listing`. Invariant: both splits
have the same classes, at least two, each with an image, and the same files give the same listing.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.data.columns import one_chunk
from pipeline.data.files import (
    IMAGE_ENDINGS,
    Location,
    Stamps,
    display,
    ending,
    is_image_name,
    list_files,
    list_folder,
)
from pipeline.data.formats import ENDINGS
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.splits import Split, is_held_out, natural_sort_key, valid_names
from pipeline.errors import DataError

_LABEL = pa.field("label", pa.int32())
# Classes of object storage that are listed at a time, each page by page.
_CONCURRENT_LISTINGS = 16


@dataclass(frozen=True)
class ArchiveImages:
    """One split's images in one archive: counts and a reference, nothing per image.

    Attributes:
        archive: The file.
        index: A reference to its rows of this split, a table of `formats.index.INDEX`, which stays where it was made.
        labels: The class of the listing that each class of the file is, as a number; -1 for one that is left out.
        row_groups: Rows at which it is best cut, from 0 to their number.
    """

    archive: Archive
    index: Any
    labels: tuple[int, ...]
    row_groups: tuple[int, ...]


@dataclass(frozen=True)
class ArchiveListing:
    """One split's images in archives, in their order."""

    files: tuple[ArchiveImages, ...]

    def __len__(self) -> int:
        return sum(rows.row_groups[-1] for rows in self.files)


@dataclass(frozen=True)
class Listing:
    """What a dataset holds, before any image is opened.

    `train` and `valid` are tables of `key` (binary) and `label` (int32, an index into `classes`), sorted by class and
    key, and of object storage of `size` in bytes and, where a cache is to know it, `time_ns` of the last change (int64,
    -1 if not known); or, of a dataset in archives, the archives. `num_ignored` counts the files that are no images by
    their ending.
    """

    location: Location
    classes: tuple[str, ...]
    train: pa.Table | ArchiveListing
    valid: pa.Table | ArchiveListing
    valid_split: str
    num_ignored: dict[str, int]

    def split(self, name: Split) -> pa.Table | ArchiveListing:
        """The images of one split."""
        return self.train if name == "train" else self.valid

    def row_groups(self, name: Split) -> list[tuple[int, ...]]:
        """For each file of a split, the rows at which it is best cut; class folders count as one file."""
        rows = self.split(name)
        return [file.row_groups for file in rows.files] if isinstance(rows, ArchiveListing) else [(0, len(rows))]

    @property
    def num_images(self) -> int:
        """Images of both splits."""
        return len(self.train) + len(self.valid)

    @property
    def sha256(self) -> str:
        """A digest of all keys and labels, or archives, in order: equal listings have equal ones, cached or not."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for rows in (self.train, self.valid):
            if isinstance(rows, ArchiveListing):
                digest.update(repr([(file.archive, file.labels, file.row_groups) for file in rows.files]).encode())
                continue
            for chunk in (chunk for name in ("key", "label") for chunk in rows[name].chunks):
                for buffer in chunk.buffers():
                    if buffer is not None:
                        digest.update(buffer)
        return digest.hexdigest()


def list_dataset(location: Location, config: Config) -> Listing:
    """List every image of both splits, sorted, with the classes in natural sort order.

    Raises:
        DataError: If splits, classes or images are missing, the splits' classes differ, or archives lie between them.
    """
    ignored: Counter[str] = Counter()
    folders = list_folder(location, b"", ignored)
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
        ignored.clear()  # the root is listed again, as the folder of the classes
        train, valid = _hold_out(_list_classes(location, b"", config, ignored), config.valid_fraction)
        where = {"train": "the training share", "valid": "the held-out share"}
    classes = _check_classes(location, train, valid, where)
    if archived := sorted(ignored.keys() & set(ENDINGS)):
        raise DataError(
            f"{location.root}: expected either class folders of images or archives, got images and "
            f"{ignored[archived[0]]} {archived[0]} beside them; move one of them elsewhere, or name the archives by a "
            f"glob such as **/*{archived[0]}"
        )
    return Listing(
        location,
        tuple(display(name) for name in classes),
        _to_table(classes, train),
        _to_table(classes, valid),
        valid_split,
        dict(sorted(ignored.items())),
    )


def list_archives(
    location: Location,
    found: Sequence[tuple[Archive, Scan, Mapping[Split, Any]]],
    num_ignored: Counter[str],
    config: Config,
) -> Listing:
    """Put together what scans found in the archives of a dataset, in their order.

    Args:
        location: The dataset.
        found: Each archive with its scan and, by split, the reference to its index.
        num_ignored: Files beside the archives, by ending.
        config: The options.

    Raises:
        DataError: If classes or images are missing, the two splits' classes differ, or splits go by several names.
    """
    counts: dict[Split, Counter[bytes]] = {"train": Counter(), "valid": Counter()}
    ignored = Counter(num_ignored)
    valid_split = _check_split_names(found, config)
    for _, scan, _ in found:
        ignored.update(scan.num_ignored)
        for split, num_images in scan.num_images.items():
            counts[split].update({name.encode(): number for name, number in num_images.items()})
    names = {display(name) for split in counts.values() for name in split}
    if missing := [name for name in config.classes if name not in names]:
        raise DataError(
            f"--classes: expected classes of {location.root}, got {_enumerate(missing)}, which is not there; look at "
            "the names in its files"
        )
    where = {split: f"the {split} split" for split in ("train", "valid")}
    classes = tuple(display(name) for name in _check_classes(location, counts["train"], counts["valid"], where))
    numbers = {name: number for number, name in enumerate(classes)}

    def rows(split: Split) -> ArchiveListing:
        return ArchiveListing(
            tuple(
                ArchiveImages(
                    archive,
                    index[split],
                    tuple(numbers.get(name, -1) for name in scan.class_names),
                    scan.row_groups[split],
                )
                for archive, scan, index in found
                if scan.row_groups[split][-1]
            )
        )

    return Listing(location, classes, rows("train"), rows("valid"), valid_split, dict(sorted(ignored.items())))


def _check_split_names(found: Sequence[tuple[Archive, Scan, Any]], config: Config) -> str:
    """Return what all archives call the validation split; each alone was found to have at most one of each split."""
    named: dict[str, str] = {}
    for archive, scan, _ in found:
        for name in [archive.split_name] if archive.split_name else scan.split_names:
            named.setdefault(name, archive.path)
    valid = [name for name in valid_names(config) if name in named]
    if config.valid_fraction is not None and len(named) > 1:
        (one, path), (other, other_path), *_ = named.items()
        raise DataError(
            f"--valid-fraction: expected a dataset without splits, got folders {one} in {path} and {other} in "
            f"{other_path}; leave the option out, or choose files by a glob"
        )
    if len(valid) > 1:
        raise DataError(
            f"--valid-split: expected one name for the split in all files, got {valid[0]} in {named[valid[0]]} and "
            f"{valid[1]} in {named[valid[1]]}; name the one that is meant, or choose files by a glob"
        )
    return valid[0] if valid else config.valid_split


def _find_valid_split(location: Location, folders: list[bytes], config: Config) -> str:
    names = valid_names(config)
    for name in names:
        if os.fsencode(name) in folders:
            return name
    raise DataError(
        f"{location.root}: expected a folder {' or '.join(f'{name}/' for name in names)} beside "
        f"{config.train_split}/, got {_enumerate([display(name) for name in folders])}; name it with --valid-split"
    )


def _list_classes(location: Location, prefix: bytes, config: Config, ignored: Counter[str]) -> dict[bytes, pa.Table]:
    """List the images of every class folder below `prefix`, sorted by key, leaving out classes not asked for."""
    folders = [name for name in list_folder(location, prefix, ignored) if not name.startswith(b".")]
    wanted = [os.fsencode(name) for name in config.classes]
    if missing := [name for name in wanted if name not in folders]:
        raise DataError(
            f"--classes: expected folders of {location.root}/{display(prefix)}, got "
            f"{_enumerate([display(name) for name in missing])}, which is not there; "
            f"there are {_enumerate([display(name) for name in sorted(folders, key=natural_sort_key)])}"
        )
    names = wanted or folders
    listed = {}
    # On a disk, threads would only wait for one another.
    pool = ThreadPoolExecutor(_CONCURRENT_LISTINGS if location.kind == "uri" else 1)
    with pool:
        found = pool.map(lambda name: list_files(location, prefix + name + b"/"), names)
        for name, (files, stamps) in zip(names, found, strict=True):
            listed[name] = _list_class(files, stamps, ignored, is_cached=config.cache is not None)
    return listed


def _list_class(files: list[bytes], stamps: Stamps | None, ignored: Counter[str], *, is_cached: bool) -> pa.Table:
    """Make the table of one class's images, sorted by key."""
    keys = sorted(filter(is_image_name, files))
    if len(keys) < len(files):
        ignored.update(ending(file) for file in files if not is_image_name(file))
    # At once: as Python objects the keys of all classes would take several times as much.
    columns = {"key": pa.array(keys, pa.binary())}
    if stamps is not None:
        row_of = {key: row for row, key in enumerate(files)}
        order = [row_of[key] for key in keys]
        columns["size"] = pa.array(stamps[0][order])
        if is_cached:
            columns["time_ns"] = pa.array(stamps[1][order])
    return pa.table(columns)


def _hold_out(listed: dict[bytes, pa.Table], fraction: float) -> tuple[dict[bytes, pa.Table], dict[bytes, pa.Table]]:
    """Cut each class in two."""
    train, valid = {}, {}
    for name, rows in listed.items():
        is_valid = np.array([is_held_out(key.as_py(), fraction) for key in rows["key"]], np.bool_)
        train[name], valid[name] = _filter(rows, ~is_valid), _filter(rows, is_valid)
    return train, valid


def _filter(rows: pa.Table, is_kept: npt.NDArray[np.bool_]) -> pa.Table:
    # Column by column: a table's own filter adds bitmaps, which would be another digest of the same listing.
    return pa.table({name: one_chunk(rows[name]).filter(pa.array(is_kept)) for name in rows.column_names})


def _check_classes(
    location: Location,
    train: Mapping[bytes, Any],
    valid: Mapping[bytes, Any],
    where: Mapping[str, str],
) -> list[bytes]:
    """Check classes by what there is of each, keys or a number, and sort them."""
    root = display(os.fsencode(location.root))
    is_there = [_count(each) > 0 for listed in (train, valid) for each in listed.values()]
    if not any(is_there):
        raise DataError(
            f"{root}: expected image files in class folders, got none; "
            f"files count as images by their ending ({display(b' '.join(sorted(IMAGE_ENDINGS)))})"
        )
    classes = sorted(train.keys() | valid.keys(), key=natural_sort_key)
    for name in classes:
        for split, listed in (("train", train), ("valid", valid)):
            if not _count(listed.get(name, 0)):
                found = "no image there" if name in listed else "no such folder"
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


def _count(images: Any) -> int:
    return images if isinstance(images, int) else len(images)


def _to_table(classes: list[bytes], listed: dict[bytes, pa.Table]) -> pa.Table:
    # A chunk a class, so that nothing is copied.
    labels = [pa.repeat(pa.scalar(label, pa.int32()), len(listed[name])) for label, name in enumerate(classes)]
    return pa.concat_tables([listed[name] for name in classes]).add_column(1, _LABEL, pa.chunked_array(labels))


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
