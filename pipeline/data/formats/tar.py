"""Tar files of images: what is inside, and the bytes of the images.

Input: an uncompressed tar, as WebDataset writes it (`0001.png` beside `0001.cls` or `0001.json`) or packed from class
folders (`train/3/1.png`). Output: a `Scan` with an index of byte ranges; and for rows of the index, the bytes.
Invariant: nothing is unpacked, a member's name is never a path, and what is listed lies within the file.
"""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.data.files import ReadFault, display, ending, is_image_name
from pipeline.data.formats.index import (
    LEFT_OUT,
    NO_SPLIT,
    TRAIN,
    VALID,
    Archive,
    Index,
    Scan,
    ScannedImages,
    make_index,
    read_spans,
    reading,
)
from pipeline.data.formats.tar_headers import TarFile, walk
from pipeline.data.splits import natural_sort_key, valid_names
from pipeline.data.storage import MAX_FILE_BYTES, Store
from pipeline.errors import DataError

_JSON_LABELS = ("label", "class", "cls")
_SIDE_ENDINGS = (b".cls", b".json", b".txt")
# What is read at once. A remote store answers in some 30 ms what it then sends at some 100 MB/s on a connection: pixels
# between two headers are read through, up to 4 MiB, instead of a request for each header, and so are what lies between
# two images that are wanted. A local file is faster in parts that fit a cache.
_LOCAL_WINDOW_BYTES, _REMOTE_WINDOW_BYTES = 2**16, 2**22
_LOCAL_RUN_BYTES, _REMOTE_RUN_BYTES = 2**20, 2**22
_WINDOWS_AHEAD = 4
_CHUNK_ROWS = 2**16


_OTHER_SPLIT = LEFT_OUT + 1


@dataclass
class _Members:
    """The images of a tar in its order, by columns, while it is walked."""

    prefix: bytes
    chunks: list[pa.BinaryArray] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("i"))  # from side files; -1 for none
    folders: array[int] = field(default_factory=lambda: array("i"))
    folder_ids: dict[bytes, int] = field(default_factory=dict)
    label_ids: dict[bytes, int] = field(default_factory=dict)
    # By name without ending, the side files that do not stand next to their image: a label, and their endings.
    orphans: dict[bytes, tuple[int, list[bytes]]] = field(default_factory=dict)

    def add(self, name: bytes, folder: bytes, offset: int, size: int, label: int) -> int:
        """Add an image and return its row."""
        self.keys.append(self.prefix + name)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.labels.append(label)
        self.folders.append(self.folder_ids.setdefault(folder, len(self.folder_ids)))
        if len(self.keys) == _CHUNK_ROWS:  # so that names are Python objects for a moment only
            self.chunks.append(pa.array(self.keys, pa.binary()))
            self.keys.clear()
        return len(self.labels) - 1

    def read_label(self, suffix: bytes, payload: bytes) -> int:
        """Number the class that a side file names; -1 if it names none."""
        name = _class_in_json(payload) if suffix == b".json" else payload.strip() if suffix == b".cls" else b""
        if not name or b"\n" in name:
            return -1
        return self.label_ids.setdefault(name, len(self.label_ids))


def scan(store: Store, archive: Archive, config: Config) -> tuple[Scan, Index]:
    """List the images of a tar with their classes and splits.

    If one image has its class beside it, all must: `.cls` holds it as text, `.json` under `label`, `class` or `cls`
    (WebDataset's conventions, https://github.com/webdataset/webdataset; here a name ends before its last dot). Else the
    class is the folder right below the split's, or without splits the image's own folder.

    Returns:
        The counts, and by split the index: `key`, `label`, `offset` and `size` of each image in the tar's order.

    Raises:
        DataError: If the file is no tar, is damaged or cut off, has a member twice or an image without a class, or
            cannot be read.
    """
    ignored: Counter[str] = Counter()
    window_bytes, num_ahead = (_LOCAL_WINDOW_BYTES, 0) if store.is_local else (_REMOTE_WINDOW_BYTES, _WINDOWS_AHEAD)
    with reading(archive.path), TarFile(store, archive, window_bytes, num_ahead) as file:
        found = walk(file, _SIDE_ENDINGS[:2], ignored)
        members = _collect(found, os.fsencode(archive.name) + b"/", ignored)
    keys = pa.chunked_array([*members.chunks, pa.array(members.keys, pa.binary())])
    _check_unique(archive, keys)
    sides, classes, split_names = _read_folders(archive, list(members.folder_ids), config)
    folders = np.asarray(members.folders, np.int32)
    labels = _match_orphans(members, keys, ignored)
    if (labels >= 0).any():
        sides = sides[folders]
        sides[_belong_to_others(keys, labels)] = LEFT_OUT
        names = list(members.label_ids)
        _check_labelled(archive, keys, (labels < 0) & (sides < LEFT_OUT))
    else:
        names = list(dict.fromkeys(name for name in classes if name))
        ids = {name: label for label, name in enumerate(names)}
        labels = np.asarray([ids[name] if name else -1 for name in classes], np.int32)[folders]
        if len(labels):
            _check_labelled(archive, keys, (labels < 0) if (labels < 0).all() else np.zeros(1, np.bool_))
        sides = np.where((labels < 0) & (sides[folders] != _OTHER_SPLIT), LEFT_OUT, sides[folders])
    # As in a folder: an image beside the class folders is of no class, one of another split is not looked at.
    ignored.update(ending(key) for key in keys.filter(pa.array(sides == LEFT_OUT)).to_pylist())
    order = sorted(range(len(names)), key=lambda label: natural_sort_key(names[label]))
    ranks = np.argsort(np.asarray([*order, len(order)])).astype(np.int32)  # the last one stands for -1
    rows = ScannedImages(
        keys=keys,
        labels=ranks[labels],
        offsets=np.asarray(members.offsets, np.int64),
        sizes=np.asarray(members.sizes, np.int64),
        sides=sides.astype(np.int8),
        class_names=tuple(display(names[label]) for label in order),
        group_starts=np.zeros(1, np.int64),
    )
    return make_index(archive, rows, config, split_names, ignored)


def read_rows(store: Store, archive: Archive, rows: pa.Table, concurrency: int) -> Iterator[bytes | ReadFault]:
    """Read images by their byte ranges, neighbours in one request.

    Args:
        store: Where the tar is.
        archive: The tar.
        rows: Some rows of its index, in order.
        concurrency: Requests at a time.

    Yields:
        The bytes of each image, or why they are not read.

    Raises:
        DataError: If the tar cannot be read, or is not the one any more that was scanned.
    """
    offsets, sizes = rows["offset"].to_pylist(), rows["size"].to_pylist()
    max_bytes, max_between = (
        (_LOCAL_RUN_BYTES, _LOCAL_WINDOW_BYTES) if store.is_local else (_REMOTE_RUN_BYTES, _REMOTE_WINDOW_BYTES)
    )
    runs = _runs(offsets, sizes, max_bytes, max_between)
    spans = [(offsets[first], offsets[last] + sizes[last]) for first, last in runs]
    is_read = [stop - start <= MAX_FILE_BYTES for start, stop in spans]
    with reading(archive.path):
        blocks = read_spans(store, archive, list(itertools.compress(spans, is_read)), concurrency)
        for (first, last), (start, stop), is_whole in zip(runs, spans, is_read, strict=True):
            if not is_whole:
                yield ReadFault("too_large", f"{stop - start} bytes, more than {MAX_FILE_BYTES}")
                continue
            block = next(blocks)
            for offset, size in zip(offsets[first : last + 1], sizes[first : last + 1], strict=True):
                yield block[offset - start : offset - start + size]


def _runs(offsets: list[int], sizes: list[int], max_bytes: int, max_between: int) -> list[tuple[int, int]]:
    """Part images into runs that are read at once: the first and the last of each. A larger image is one by itself."""
    runs = []
    first = 0
    for last, offset in enumerate(offsets):
        is_end = last + 1 == len(offsets)
        if not is_end:
            between = offsets[last + 1] - offset - sizes[last]
            end = offsets[last + 1] + sizes[last + 1]
        if is_end or not 0 <= between <= max_between or end - offsets[first] > max_bytes:
            runs.append((first, last))
            first = last + 1
    return runs


def _collect(found: Iterable[tuple[bytes, int, int, bytes]], prefix: bytes, ignored: Counter[str]) -> _Members:
    """Sort members into images, side files and others; what one image has stands together in a tar of WebDataset's."""
    members = _Members(prefix)
    stem, row, label = b"", -1, -1
    suffixes: list[bytes] = []
    for name, offset, size, payload in found:
        slash, dot = name.rfind(b"/"), name.rfind(b".")
        suffix = name[dot:].lower() if dot > slash else b""
        is_image = is_image_name(name)
        if not is_image and suffix not in _SIDE_ENDINGS:
            ignored[ending(name)] += 1
            continue
        if name[:dot] != stem:
            _keep_orphan(members, stem, row, label, suffixes)
            stem, row, label, suffixes = name[:dot], -1, -1, []
        if is_image:
            # A second image of the name gets no label: which of them it belongs to, nothing says.
            row = members.add(name, name[: max(slash, 0)], offset, size, label if row < 0 else -1)
            continue
        suffixes.append(suffix)
        found_label = members.read_label(suffix, payload)
        if found_label >= 0 and (label < 0 or suffix == b".cls"):
            label = found_label
            if row >= 0:
                members.labels[row] = label
    _keep_orphan(members, stem, row, label, suffixes)
    return members


def _keep_orphan(members: _Members, stem: bytes, row: int, label: int, suffixes: list[bytes]) -> None:
    if row < 0 and suffixes:
        earlier, others = members.orphans.get(stem, (-1, []))
        is_better = label >= 0 and (earlier < 0 or b".cls" in suffixes)
        members.orphans[stem] = (label if is_better else earlier, others + suffixes)


def _match_orphans(members: _Members, keys: pa.ChunkedArray, ignored: Counter[str]) -> npt.NDArray[np.int32]:
    """Give images the labels of side files that stand elsewhere in the tar, and count those of no image."""
    labels = np.array(members.labels, np.int32)
    if members.orphans:
        bare = np.flatnonzero(labels < 0)
        for row, key in zip(bare.tolist(), keys.take(pa.array(bare)).to_pylist(), strict=True):
            stem = key[len(members.prefix) : key.rfind(b".")]
            labels[row], _ = members.orphans.pop(stem, (-1, []))
        for stem, (_, suffixes) in members.orphans.items():
            ignored.update(ending(stem + suffix) for suffix in suffixes)
    return labels


def _belong_to_others(keys: pa.ChunkedArray, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Find images without a class that are a part of a sample that has one, as `1.seg.png` beside `1.jpg` and `1.cls`.

    In WebDataset a sample's name ends before its first dot.
    """

    def sample(key: bytes) -> bytes:
        slash = key.rfind(b"/") + 1
        return key[:slash] + key[slash:].partition(b".")[0]

    bare = np.flatnonzero(labels < 0)
    if not len(bare):
        return bare
    samples = {sample(key) for key in keys.filter(pa.array(labels >= 0)).to_pylist()}
    names = keys.take(pa.array(bare)).to_pylist()
    # Of two images that differ in their last ending alone, which one is meant nothing says.
    return bare[[sample(key) in samples and sample(key) != key[: key.rfind(b".")] for key in names]]


def _read_folders(
    archive: Archive, folders: list[bytes], config: Config
) -> tuple[npt.NDArray[np.int8], list[bytes | None], tuple[str, ...]]:
    """Tell the side and the class that each folder stands for."""
    train, valids = os.fsencode(config.train_split), [os.fsencode(name) for name in valid_names(config)]
    split_names, classes = [], []
    for folder in folders:
        parts = folder.split(b"/") if folder else []
        depth = next((depth for depth, part in enumerate(parts) if part == train or part in valids), -1)
        split_names.append(parts[depth] if depth >= 0 else None)
        below = parts[depth + 1 : depth + 2] if depth >= 0 else parts[-1:]
        classes.append(below[0] if below else None)
    used = [train] * (train in split_names) + [name for name in valids if name in split_names][:1]
    if archive.split is not None:
        sides = [TRAIN if archive.split == "train" else VALID] * len(folders)
        return np.asarray(sides, np.int8), classes, ()
    if config.valid_fraction is not None and len(used) > 1:
        raise DataError(
            f"--valid-fraction: expected a dataset without splits, got folders {display(used[0])} and "
            f"{display(used[1])} in {archive.path}; leave the option out"
        )
    codes: dict[bytes | None, int] = {
        train: TRAIN,
        **dict.fromkeys(valids, _OTHER_SPLIT),
        None: LEFT_OUT if used else NO_SPLIT,
    }
    codes |= {name: VALID for name in used if name != train}
    if config.valid_fraction is not None:
        codes |= dict.fromkeys(used, NO_SPLIT)
    sides = [codes[name] for name in split_names]
    return np.asarray(sides, np.int8), classes, tuple(display(name) for name in used)


def _check_unique(archive: Archive, keys: pa.ChunkedArray) -> None:
    # As WebDataset does; which of the two is meant, nothing says.
    if pc.count_distinct(keys).as_py() != len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise DataError(f"{archive.path}: expected every member once, got {display(twice)} again; write the tar again")


def _check_labelled(archive: Archive, keys: pa.ChunkedArray, is_missing: npt.NDArray[np.bool_]) -> None:
    if is_missing.any():
        key = display(keys[int(np.argmax(is_missing))].as_py())
        raise DataError(
            f"{archive.path}: expected the class of {key} in a .cls of one line, or a .json with "
            f"{' or '.join(_JSON_LABELS)}, beside it and of its name, or, where no image has one, in the name of its "
            "folder, got none; write the tar with the classes"
        )


def _class_in_json(payload: bytes) -> bytes:
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(record, dict):
        return b""
    value = next((record[name] for name in _JSON_LABELS if name in record), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return b"%d" % value
    return value.strip().encode("utf-8", "surrogatepass") if isinstance(value, str) else b""
