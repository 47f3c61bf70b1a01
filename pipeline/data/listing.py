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
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.data.classes import check_asked, check_classes, hold_out
from pipeline.data.files import (
    Location,
    Stamps,
    display,
    ending,
    enumerate_names,
    is_image_name,
    is_system_folder,
    list_files,
    list_folder,
)
from pipeline.data.formats import ENDINGS
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.splits import Split, valid_names
from pipeline.errors import DataError, counted

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
    their ending. `dropped` names the classes that were left out for want of images in one split.
    """

    location: Location
    classes: tuple[str, ...]
    train: pa.Table | ArchiveListing
    valid: pa.Table | ArchiveListing
    valid_split: str
    num_ignored: dict[str, int]
    dropped: tuple[str, ...] = ()

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
    found_names: set[str] = set()
    folders = list_folder(location, b"", ignored)
    train_name = os.fsencode(config.train_split)
    if train_name in folders:
        if config.valid_fraction is not None:
            raise DataError(
                f"--valid-fraction: expected a dataset without splits, got {config.train_split}/ in "
                f"{location.root}; leave the option out, or point --data at {config.train_split}/ itself"
            )
        valid_split = _find_valid_split(location, folders, config)
        train = _list_classes(location, train_name + b"/", config, ignored, found_names)
        valid = _list_classes(location, os.fsencode(valid_split) + b"/", config, ignored, found_names)
        where = {"train": f"{config.train_split}/", "valid": f"{valid_split}/"}
    else:
        _check_level(location, folders, ignored, config)
        valid_split = config.valid_split
        ignored.clear()  # the root is listed again, as the folder of the classes
        assert config.valid_fraction is not None
        train, valid = hold_out(_list_classes(location, b"", config, ignored, found_names), config.valid_fraction)
        where = {"train": "the training share", "valid": "the held-out share"}
    check_asked("--exclude-classes", config.exclude_classes, found_names, location.root)
    classes, dropped = check_classes(location, train, valid, where, config, ignored)
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
        tuple(display(name) for name in dropped),
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
    # Of classes that are left out nothing is counted, so all that are there are asked.
    known = {display(os.fsencode(name)) for _, scan, _ in found for name in scan.class_names}
    check_asked("--classes", config.classes, known, location.root)
    check_asked("--exclude-classes", config.exclude_classes, known, location.root)
    where = {split: f"the {split} split" for split in ("train", "valid")}
    complete, dropped = check_classes(location, counts["train"], counts["valid"], where, config, ignored)
    classes = tuple(display(name) for name in complete)
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

    return Listing(
        location,
        classes,
        rows("train"),
        rows("valid"),
        valid_split,
        dict(sorted(ignored.items())),
        tuple(display(name) for name in dropped),
    )


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


def _check_level(location: Location, folders: list[bytes], ignored: Counter[str], config: Config) -> None:
    """See that a folder without a training split is one of classes to hold images out of, not one above or below it."""
    inside = [display(name) for name in folders if not is_system_folder(name)]
    advice = _advise_level(location, inside, config)
    num_images = sum(number for name, number in ignored.items() if is_image_name(b"x" + name.encode()))
    if not inside and not num_images:
        advice = None
    if config.valid_fraction is not None and (len(inside) > 1 or advice is None):
        return
    found = enumerate_names(inside) or (
        f"{counted(num_images, 'image')} of one class" if num_images else "no folder at all"
    )
    if advice is None and len(inside) > 1:
        advice = "name it with --train-split, or hold images out of a dataset without splits with --valid-fraction 0.2"
    wanted = f"a folder {config.train_split}/" if config.valid_fraction is None else "at least two class folders"
    raise DataError(
        f"{location.root}: expected {wanted}, got {found}; "
        + (advice or "give a folder with train and valid, or one of at least two class folders with --valid-fraction")
    )


def _advise_level(location: Location, inside: list[str], config: Config) -> str | None:
    """Look for the dataset in the only folder inside, or above what is named as a split or lies in one."""
    base, mark, query = location.root.partition("?") if location.kind == "uri" else (location.root, "", "")
    nearby = [f"{base}/{name}" for name in inside if len(inside) == 1]
    above, _, last = base.rpartition("/")
    top, _, split = above.rpartition("/")
    splits = (config.train_split, *valid_names(config))
    nearby += [folder for folder, name in ((above, last), (top, split)) if folder and name in splits]
    for each in nearby:
        with suppress(DataError):  # it is not there, or not open to this user
            found = list_folder(replace(location, root=each + mark + query), b"", Counter())
            names = [display(name) for name in found]
            valid = next((name for name in valid_names(config) if name in names), None)
            if config.train_split in names and valid:
                return f"give {each + mark + query}, which has {config.train_split}/ and {valid}/"
    if inside or not above or above.endswith("/"):
        return None
    return f"give the folder of all classes, {above + mark + query} if it is that, with --valid-fraction 0.2"


def _find_valid_split(location: Location, folders: list[bytes], config: Config) -> str:
    names = valid_names(config)
    for name in names:
        if os.fsencode(name) in folders:
            return name
    raise DataError(
        f"{location.root}: expected a folder {' or '.join(f'{name}/' for name in names)} beside "
        f"{config.train_split}/, got {enumerate_names([display(name) for name in folders])}; name it with "
        f"--valid-split, or point --data at {config.train_split}/ itself and hold images out with --valid-fraction 0.2"
    )


def _list_classes(
    location: Location, prefix: bytes, config: Config, ignored: Counter[str], found_names: set[str]
) -> dict[bytes, pa.Table]:
    """List the images of every class folder below `prefix`, sorted by key, leaving out classes not asked for.

    The names of all are added to `found_names`.
    """
    found_folders = list_folder(location, prefix, ignored)
    folders = [name for name in found_folders if not is_system_folder(name)]
    ignored.update(f"{display(name)}/" for name in found_folders if is_system_folder(name))
    known = {display(name) for name in folders}
    check_asked("--classes", config.classes, known, f"{location.root}/{display(prefix)}")
    found_names |= known
    wanted = [os.fsencode(name) for name in config.classes] or folders
    names = [name for name in wanted if os.fsdecode(name) not in config.exclude_classes]
    listed = {}
    counters = [Counter[str]() for _ in names]
    with ThreadPoolExecutor(_CONCURRENT_LISTINGS) as pool:
        # On a disk, threads would only wait for one another.
        spread = pool.map if location.kind == "uri" else map
        found = spread(lambda name, counter: list_files(location, prefix + name + b"/", counter), names, counters)
        for name, counter, (files, stamps) in zip(names, counters, found, strict=True):
            ignored.update(counter)
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


def _to_table(classes: list[bytes], listed: dict[bytes, pa.Table]) -> pa.Table:
    # A chunk a class, so that nothing is copied.
    labels = [pa.repeat(pa.scalar(label, pa.int32()), len(listed[name])) for label, name in enumerate(classes)]
    return pa.concat_tables([listed[name] for name in classes]).add_column(1, _LABEL, pa.chunked_array(labels))
