"""What a decoded shard was made from, as the name of its entry in a cache.

Input: a dataset, a target and a shard's rows of the listing. Output: a digest. Invariant: when the images of the
shard, or what becomes of them, may be others, so is the digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import PIL
import pyarrow as pa
from PIL import features

from pipeline.data.columns import one_chunk
from pipeline.data.files import DIGITS, Location, Stamps
from pipeline.decoding.images import DECODE_VERSION
from pipeline.errors import without_secrets
from pipeline.target import Target

_LIBRARIES = ("jpg", "libjpeg_turbo", "jpg_2000", "zlib", "libtiff", "webp", "avif")


def name_entry(location: Location, target: Target, rows: pa.Table) -> str:
    """Name the entry of a shard of class folders; do so before its files are read, that a later change be seen.

    Args:
        location: The dataset.
        target: What every image becomes.
        rows: The shard's rows of the listing.
    """
    keys, labels = one_chunk(rows["key"]), one_chunk(rows["label"])
    return entry_key(location, target, keys, labels, file_stamps(location, rows))


def file_stamps(location: Location, rows: pa.Table) -> Stamps:
    """Tell when the files of a listing last changed.

    Of an object store the listing knows it. Local files are looked at: they tell the time of their last change of any
    kind, ctime, which copying and unpacking programs cannot set back as they do mtime.

    Returns:
        Sizes in bytes and times in nanoseconds, int64 [N] each; -1 for files that are not there, and as the
        time of images of the package, which is that of its installation.
    """
    match location.kind:
        case "folder":
            root = os.fsencode(location.root) + b"/"
            return _local_stamps(root + key for key in rows["key"].to_pylist())
        case "package":  # whose time is that of its installation, another on every node
            return np.full(len(rows), DIGITS.stat().st_size), np.full(len(rows), -1)
        case "uri":
            return rows["size"].to_numpy(), rows["time_ns"].to_numpy()


def entry_key(
    location: Location,
    target: Target,
    keys: pa.BinaryArray,
    labels: pa.Int32Array,
    stamps: Stamps,
) -> str:
    """Digest all that a shard's outcome depends on.

    That is: the version of decoding, of Pillow and of its libraries; the target; the dataset's root, since other
    datasets may have files of the same names, sizes and times; and of each file the key, class, size and time.

    Args:
        location: The dataset's root.
        target: What every image becomes.
        keys: Of N images.
        labels: Their classes, which are in the entry as well.
        stamps: As `file_stamps` returns them.

    Returns:
        64 hexadecimal digits.
    """
    root = without_secrets(location.root)  # the images are the same with another secret
    head = [DECODE_VERSION, _decoders(), location.kind, root, asdict(target), len(keys)]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    texts = keys.to_pylist()
    lengths = np.array([len(text) for text in texts], "<i8")
    for part in (lengths, labels.to_numpy().astype("<i4"), *(stamp.astype("<i8") for stamp in stamps)):
        digest.update(part.tobytes())
    digest.update(b"".join(texts))
    return digest.hexdigest()


@functools.cache
def _decoders() -> dict[str, str | None]:
    """The versions of Pillow and of what it was built with, None for what it lacks."""
    return {"pillow": PIL.__version__, **{name: features.version(name) for name in _LIBRARIES}}


def _local_stamps(paths: Iterable[bytes]) -> Stamps:
    # One loop of plain lists: nine tenths of its time are the system's own.
    sizes, times_ns = [], []
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - names are bytes
        except OSError:  # read, and named as a fault, later
            sizes.append(-1)
            times_ns.append(-1)
        else:
            sizes.append(status.st_size)
            times_ns.append(status.st_ctime_ns)
    return np.array(sizes, np.int64), np.array(times_ns, np.int64)
