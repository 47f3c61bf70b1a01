"""Which classes may stay, and on which side of a share held out each image falls.

Input: the images of each class as a folder or archives gave them, and the options. Output: the classes that both splits
have, and the two sides. Invariant: what is asked for and not there, or there on one side only, is named all at once.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.data.columns import one_chunk
from pipeline.data.files import IMAGE_ENDINGS, Location, display, enumerate_names, is_image_name
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.splits import Split, are_held_out, hashes_of, natural_sort_key
from pipeline.errors import DataError, counted, quoted


def check_classes(
    location: Location,
    train: Mapping[bytes, Any],
    valid: Mapping[bytes, Any],
    where: Mapping[str, str],
    config: Config,
    ignored: Mapping[str, int],
) -> tuple[list[bytes], list[bytes]]:
    """Check classes by what there is of each, keys or a number, and sort them.

    Returns:
        Those with images in both splits, and those without, if the options say that these are to be left out.

    Raises:
        DataError: If there are no images, fewer than two classes, or classes with images in one split only.
    """
    root = display(os.fsencode(location.root))
    is_there = [_count(each) > 0 for listed in (train, valid) for each in listed.values()]
    if not any(is_there):
        beside = sum(number for name, number in ignored.items() if is_image_name(b"x" + name.encode()))
        found = f"{counted(beside, 'image')} beside them" if beside else "none"
        raise DataError(
            f"{root}: expected image files in class folders, got {found}; give every class a folder of its own; "
            f"files count as images by their ending ({display(b' '.join(sorted(IMAGE_ENDINGS)))})"
        )
    classes = sorted(train.keys() | valid.keys(), key=natural_sort_key)
    lacking = {
        where[split]: [name for name in classes if not _count(listed.get(name, 0))]
        for split, listed in (("train", train), ("valid", valid))
    }
    is_lacking = {name for names in lacking.values() for name in names}
    incomplete = [name for name in classes if name in is_lacking]
    if incomplete and config.incomplete_classes != "drop":
        faults = [
            f"of {enumerate_names([display(name) for name in names])} in {split}"
            for split, names in lacking.items()
            if names
        ]
        raise DataError(
            f"{root}: expected images of every class in both splits, got none {' and none '.join(faults)}; add images, "
            "or go on without these classes with --incomplete-classes drop"
            + _difference([display(name) for name in incomplete])
        )
    complete = [name for name in classes if name not in is_lacking]
    if len(complete) < 2:
        found = f"only {quoted(display(complete[0]))}" if complete else "none"
        raise DataError(
            f"{root}: expected at least two classes with images in both splits, got {found}; "
            "a classifier needs something to tell apart"
        )
    return complete, incomplete


def check_asked(option: str, names: Collection[str], known: Collection[str], where: str) -> None:
    """See that the classes that an option names are there.

    Raises:
        DataError: If one is not, with the names of all that are.
    """
    if missing := [display(os.fsencode(name)) for name in names if display(os.fsencode(name)) not in known]:
        shown = enumerate_names(sorted(known, key=lambda name: natural_sort_key(name.encode())))
        raise DataError(
            f"{option}: expected classes of {where}, got {enumerate_names(missing)}, which is not there; "
            f"there are {shown}{_difference([*missing, *known])}"
        )


def hold_out(listed: dict[bytes, pa.Table], fraction: float) -> tuple[dict[bytes, pa.Table], dict[bytes, pa.Table]]:
    """Cut each class in two; of two images or more, at least one comes to each side."""
    train, valid = {}, {}
    for name, rows in listed.items():
        hashes = hashes_of((key.as_py() for key in rows["key"]), len(rows))
        is_valid = are_held_out(hashes, fraction)
        if len(rows) > 1 and not is_valid.any():
            is_valid[hashes.argmin()] = True
        elif len(rows) > 1 and is_valid.all():
            is_valid[hashes.argmax()] = False
        train[name], valid[name] = _filter(rows, ~is_valid), _filter(rows, is_valid)
    return train, valid


def spread_over_splits(archives: Sequence[Archive], scans: Sequence[Scan]) -> dict[int, Archive]:
    """Find classes that a share held out left wholly on one side, and the image of each that is to change sides.

    It is the one with the lowest hash, or of those held out with the highest, as in class folders.

    Returns:
        By number, the archives that are to be scanned again, with what is to be moved.
    """
    totals: dict[Split, Counter[str]] = {"train": Counter(), "valid": Counter()}
    extremes: dict[str, tuple[int, int]] = {}
    for scan in scans:
        for split, counts in scan.num_images.items():
            totals[split].update(counts)
        for name, (lowest, highest) in scan.extremes.items():
            known = extremes.get(name, (lowest, highest))
            extremes[name] = min(lowest, known[0]), max(highest, known[1])
    moved = {}
    for name, (lowest, highest) in extremes.items():
        num_train, num_valid = totals["train"][name], totals["valid"][name]
        if num_train + num_valid > 1 and not (num_train and num_valid):
            moved[name] = lowest if num_train else highest
    again = {}
    for number, (archive, scan) in enumerate(zip(archives, scans, strict=True)):
        own = tuple((name, found) for name, found in moved.items() if found in scan.extremes.get(name, ()))
        if own:
            again[number] = replace(archive, moved=own)
    return again


def look_alike(names: Iterable[str]) -> str:
    """Name two names that look the same: by Unicode's form, by blanks at an end, or by a byte order mark."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name).strip(" \t\ufeff\u200b"), name)
        if other != name:
            return f"{other!a} and {name!a} look alike and differ in Unicode form, blanks or a mark"
    return ""


def _difference(names: Iterable[str]) -> str:
    found = look_alike(names)
    return f"; {found}" if found else ""


def _filter(rows: pa.Table, is_kept: npt.NDArray[np.bool_]) -> pa.Table:
    # Column by column: a table's own filter adds bitmaps, which would be another digest of the same listing.
    return pa.table({name: one_chunk(rows[name]).filter(pa.array(is_kept)) for name in rows.column_names})


def _count(images: Any) -> int:
    return images if isinstance(images, int) else len(images)
