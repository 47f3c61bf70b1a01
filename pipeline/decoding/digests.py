"""Which images have the same pixels: digests of a shard's images, and of many shards' digests the groups.

Input: decoded shards. Output: the rows of images that share their pixels with another, group by group. Invariant: the
same images give the same groups, however many buckets they are found in; grouping takes 20 bytes an image and arrays
of that order, and no step of Python an image.

N images, M of them in groups, S runs. A row counts through both splits: the validation listing follows the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.cuts import Shard
from pipeline.data.columns import one_chunk
from pipeline.decoding.images import Decoded

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Digests:
    """Digests of images that lie in runs of the listing, such as shards.

    Attributes:
        starts: int64 [S], the row from which those of a run are counted.
        sizes: int64 [S], how many images of each run are here.
        words: uint64 [N, 2], the digests.
        offsets: uint32 [N], each image's row, counted from its run's start; the images of a run follow each other.
    """

    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    words: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint32]


def digest_shard(shard: Shard, decoded: Decoded, num_train: int) -> Digests:
    """Digest the pixels of each image of a shard, as they were decoded.

    BLAKE2b with 128 bits: among 10^12 images two different ones share a digest with a probability of 10^-15.

    Args:
        shard: The shard.
        decoded: What became of its images.
        num_train: Listed training images.
    """
    images = one_chunk(decoded.table["image"]).storage
    num_values = images.type.list_size
    # Not flattened, which loads pyarrow.compute.
    values = images.values.slice(images.offset * num_values, len(images) * num_values)
    pixels = memoryview(values.to_numpy())
    make, ends = hashlib.blake2b, range(num_values, len(pixels) + 1, num_values)
    found = b"".join([make(pixels[end - num_values : end], digest_size=DIGEST_BYTES).digest() for end in ends])
    skipped = [row for row, _ in decoded.faults]
    start = shard.start + (num_train if shard.split == "valid" else 0)
    return Digests(
        starts=np.array([start]),
        sizes=np.array([len(images)]),
        words=np.frombuffer(found, np.uint64).reshape(-1, 2),
        offsets=np.delete(np.arange(shard.num_images, dtype=np.uint32), skipped),
    )


def split_digests(pieces: Sequence[Digests], num_buckets: int) -> list[Digests]:
    """Part digests by their first bits, so that equal ones come to one bucket.

    Args:
        pieces: Digests of any images, in any order.
        num_buckets: At most 2^32.
    """
    whole = _join(pieces)
    buckets_N = (whole.words[:, 0] >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)
    runs_N = np.repeat(np.arange(len(whole.starts)), whole.sizes)
    order_N = np.argsort(buckets_N, kind="stable")
    bounds = np.searchsorted(buckets_N[order_N], np.arange(num_buckets + 1, dtype=np.uint64))
    parts = [order_N[low:high] for low, high in pairwise(bounds.tolist())]
    num_runs = len(whole.starts)
    return [
        Digests(whole.starts, np.bincount(runs_N[part], minlength=num_runs), whole.words[part], whole.offsets[part])
        for part in parts
    ]


def group_digests(pieces: Sequence[Digests]) -> npt.NDArray[np.int64]:
    """Find the images that share their digest with another.

    Args:
        pieces: Digests of any images, in any order.

    Returns:
        int64 [2, M]: the row of the first image of the group, by which groups are sorted, and the row of each image,
        sorted within its group.
    """
    whole = _join(pieces)
    # Half of a digest tells nearly all apart, and one word is sorted in a fraction of the time of two.
    order_N = np.argsort(whole.words[:, 0])
    sorted_N = whole.words[order_N, 0]
    is_same = sorted_N[1:] == sorted_N[:-1]
    is_alike_N = np.zeros(len(order_N), bool)
    is_alike_N[1:] |= is_same
    is_alike_N[:-1] |= is_same
    alike = order_N[is_alike_N]
    runs = np.searchsorted(np.cumsum(whole.sizes), alike, side="right")
    rows, words = whole.starts[runs] + whole.offsets[alike], whole.words[alike]
    order = np.lexsort((rows, words[:, 1], words[:, 0]))
    rows, words = rows[order], words[order]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (words[1:] != words[:-1]).any(axis=1)
    begins = np.flatnonzero(is_first)
    sizes = np.diff(begins, append=len(rows))
    firsts, is_kept = np.repeat(rows[begins], sizes), np.repeat(sizes > 1, sizes)
    firsts_M, rows_M = firsts[is_kept], rows[is_kept]
    order_M = np.lexsort((rows_M, firsts_M))
    return np.stack([firsts_M[order_M], rows_M[order_M]])


def _join(pieces: Sequence[Digests]) -> Digests:
    return Digests(
        *(
            np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("starts", "sizes", "words", "offsets")
        )
    )
