"""What a dataset holds: its splits, its classes and, sorted, the keys of its images.

What enters: a location and the options. What leaves: a `Listing`, two Arrow tables of keys and labels. Always: both
splits have the same classes, at least two, each with an image, and the same files give the same listing.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import DataError
from pipeline.files import IMAGE_ENDINGS, Location, display, ending, is_image_name, list_files, list_folder
from pipeline.splits import Split, is_held_out, people_order, valid_names

_LISTING = pa.schema([("key", pa.binary()), ("label", pa.int32())])


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


def list_dataset(location: Location, config: Config) -> Listing:
    """List every image of both splits, sorted, with the classes as people sort them.

    Raises:
        DataError: If splits, classes or images are missing, or the two splits' classes differ.
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
    return Listing(
        location,
        tuple(display(name) for name in classes),
        _to_table(classes, train),
        _to_table(classes, valid),
        valid_split,
        dict(sorted(ignored.items())),
    )


def _find_valid_split(location: Location, folders: list[bytes], config: Config) -> str:
    names = valid_names(config)
    for name in names:
        if os.fsencode(name) in folders:
            return name
    raise DataError(
        f"{location.root}: expected a folder {' or '.join(f'{name}/' for name in names)} beside "
        f"{config.train_split}/, got {_enumerate([display(name) for name in folders])}; name it with --valid-split"
    )


def _list_classes(location: Location, prefix: bytes, config: Config, ignored: Counter[str]) -> dict[bytes, list[bytes]]:
    """List the image keys of every class folder below `prefix`, sorted, leaving out classes not asked for."""
    folders = [name for name in list_folder(location, prefix, ignored) if not name.startswith(b".")]
    wanted = [os.fsencode(name) for name in config.classes]
    if missing := [name for name in wanted if name not in folders]:
        raise DataError(
            f"--classes: expected folders of {location.root}/{display(prefix)}, got "
            f"{_enumerate([display(name) for name in missing])}, which is not there; "
            f"there are {_enumerate([display(name) for name in sorted(folders, key=people_order)])}"
        )
    listed = {}
    for name in wanted or folders:
        keys = []
        for key in list_files(location, prefix + name + b"/"):
            if is_image_name(key):
                keys.append(key)
            else:
                ignored[ending(key)] += 1
        listed[name] = sorted(keys)
    return listed


def _hold_out(
    listed: dict[bytes, list[bytes]], fraction: float
) -> tuple[dict[bytes, list[bytes]], dict[bytes, list[bytes]]]:
    """Cut each class in two."""
    valid = {name: [key for key in keys if is_held_out(key, fraction)] for name, keys in listed.items()}
    train = {name: [key for key in keys if not is_held_out(key, fraction)] for name, keys in listed.items()}
    return train, valid


def _check_classes(
    location: Location,
    train: dict[bytes, list[bytes]],
    valid: dict[bytes, list[bytes]],
    where: dict[str, str],
) -> list[bytes]:
    root = display(os.fsencode(location.root))
    if not any(train.values()) and not any(valid.values()):
        raise DataError(
            f"{root}: expected image files in class folders, got none; "
            f"files count as images by their ending ({display(b' '.join(sorted(IMAGE_ENDINGS)))})"
        )
    classes = sorted(train.keys() | valid.keys(), key=people_order)
    for name in classes:
        for split, listed in (("train", train), ("valid", valid)):
            if not listed.get(name):
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


def _to_table(classes: list[bytes], listed: dict[bytes, list[bytes]]) -> pa.Table:
    keys = pa.concat_arrays([pa.array(listed[name], pa.binary()) for name in classes])
    labels = pa.concat_arrays(
        [pa.repeat(pa.scalar(label, pa.int32()), len(listed[name])) for label, name in enumerate(classes)]
    )
    return pa.table([keys, labels], schema=_LISTING)


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
