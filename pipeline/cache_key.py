"""What a decoded shard was made from, as the name of its entry in a cache.

What enters: a dataset, a target and the keys of a shard. What leaves: a digest. Always: when the images of the shard,
or what becomes of them, may be others, so is the digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
from PIL import features

from pipeline.decode import DECODE_VERSION, Target
from pipeline.errors import DataError
from pipeline.files import Location, display

_LIBRARIES = ("jpg", "libjpeg_turbo", "jpg_2000", "zlib", "libtiff", "webp", "avif")


def file_stamps(location: Location, keys: pa.BinaryArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Look up when the files of `keys` last changed; do so before they are read, that a later change be seen.

    Local files tell the time of their last change of any kind, ctime, which copying and unpacking programs cannot set
    back as they do mtime.

    Returns:
        Sizes in bytes and times in nanoseconds, int64 [N] each; -1 for files that are not there.

    Raises:
        DataError: If the storage itself fails.
    """
    match location.kind:
        case "folder":
            root = os.fsencode(location.root) + b"/"
            stamps = [_stamp(root + key) for key in keys.to_pylist()]
        case "uri":
            stamps = _remote_stamps(location, keys)
        case _:  # all images are in one file
            stamps = [_stamp(os.fsencode(location.root))] * len(keys)
    sizes_times_N2 = np.array(stamps, np.int64).reshape(-1, 2)
    return sizes_times_N2[:, 0].copy(), sizes_times_N2[:, 1].copy()


def entry_key(
    location: Location,
    target: Target,
    keys: pa.BinaryArray,
    labels: pa.Int32Array,
    stamps: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
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
    head = [DECODE_VERSION, _decoders(), location.kind, location.root, asdict(target), len(keys)]
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


def _stamp(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 - names are bytes
    except OSError:
        return -1, -1  # read and named as a fault later
    return status.st_size, status.st_ctime_ns


def _remote_stamps(location: Location, keys: pa.BinaryArray) -> list[tuple[int, int]]:
    filesystem, root_path = location.filesystem
    try:
        infos = filesystem.get_file_info([f"{root_path}/{display(key)}" for key in keys.to_pylist()])
    except OSError as exc:
        raise DataError(
            f"{location.root}: expected to look up files, got {exc}; check the connection and run again"
        ) from exc
    # A folder has no size, and what is not there has neither.
    return [(-1 if info.size is None else info.size, info.mtime_ns or -1) for info in infos]
