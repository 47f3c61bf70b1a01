"""Digests and groups of synthetic images, beside what NumPy's `unique` finds."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from builders import encode

from pipeline.cuts import Shard
from pipeline.data.files import ReadFault
from pipeline.decoding.digests import Digests, digest_shard, group_digests, split_digests
from pipeline.decoding.images import decode_images
from pipeline.target import Target

NUM_TRAIN = 70


def naive_groups(images, rows):
    """Return the first row of the group and the row of every image that is there more than once."""
    _, inverse, counts = np.unique(images, axis=0, return_inverse=True, return_counts=True)
    members = [np.sort(rows[inverse.ravel() == number]) for number in np.flatnonzero(counts > 1)]
    return [(group[0], row) for group in sorted(members, key=lambda group: group[0]) for row in group]


def digest_all(images, shard_images, broken=frozenset()):
    """Decode images shard by shard, the first of them to train on; return the digests of each shard."""
    pieces = []
    bounds = [*range(0, NUM_TRAIN, shard_images), *range(NUM_TRAIN, len(images), shard_images), len(images)]
    for start, stop in pairwise(bounds):
        split, skip = ("valid", NUM_TRAIN) if start >= NUM_TRAIN else ("train", 0)
        shard = Shard(len(pieces), split, start - skip, stop - skip, 0, start - skip)
        files = [ReadFault("empty", "x") if row in broken else encode(images[row]) for row in range(start, stop)]
        keys, labels = pa.array([b"key"] * len(files), pa.binary()), pa.array([0] * len(files), pa.int32())
        decoded = decode_images(keys, labels, files, Target(*images.shape[1:3], "L" if images.ndim == 3 else "RGB"))
        pieces.append(digest_shard(shard, decoded, NUM_TRAIN))
    return pieces


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 3)])
@pytest.mark.parametrize("broken", [frozenset(), frozenset({0, 5, 6, 69, 70, 99})])
@pytest.mark.parametrize("shard_images", [1, 9, 70])
def test_groups_are_those_of_numpy_with_and_without_skipped_images(shape, broken, shard_images):
    images = np.random.default_rng(3).integers(0, 4, (100, *shape), np.uint8)  # 16 or 64 different ones
    rows = np.array([row for row in range(100) if row not in broken])
    groups_2M = group_digests(digest_all(images, shard_images, broken))
    assert list(zip(*groups_2M, strict=True)) == naive_groups(images[rows].reshape(len(rows), -1), rows)


@pytest.mark.parametrize("num_buckets", [1, 2, 7, 1000])
def test_buckets_part_the_groups_and_none_is_cut(num_buckets):
    pieces = digest_all(np.random.default_rng(3).integers(0, 3, (100, 1, 3), np.uint8), 9)
    blocks = [split_digests(pieces[:5], num_buckets), split_digests(pieces[5:], num_buckets)]
    found = [group_digests(parts) for parts in zip(*blocks, strict=True)]
    assert sum(groups_2M.size > 0 for groups_2M in found) > min(num_buckets - 1, 4)
    merged = np.concatenate(found, axis=1)
    expected = group_digests(pieces)
    np.testing.assert_array_equal(merged[:, np.lexsort(merged[::-1])], expected)


def test_half_a_digest_in_common_is_not_a_group():
    words = np.array([[7, 1], [7, 2], [7, 1], [8, 1], [7, 2], [9, 9]], np.uint64)
    piece = Digests(np.array([10]), np.array([6]), words, np.arange(6, dtype=np.uint32))
    assert group_digests([piece]).tolist() == [[10, 10, 11, 11], [10, 12, 11, 14]]


def test_rows_beyond_32_bits_are_kept():
    starts, words = np.array([5, 2**33]), np.array([[1, 1], [1, 1]], np.uint64)
    piece = Digests(starts, np.array([1, 1]), words, np.array([0, 2**32 - 1], np.uint32))
    assert group_digests(split_digests([piece], 2)).tolist() == [[5, 5], [5, 2**33 + 2**32 - 1]]


def test_twenty_bytes_an_image_where_they_are_grouped():
    [piece] = split_digests(digest_all(np.zeros((100, 2, 2), np.uint8), 50), 1)
    assert (piece.words.nbytes + piece.offsets.nbytes) / len(piece.words) == 20


def test_no_images_are_no_groups():
    images = np.zeros((NUM_TRAIN + 2, 2, 2), np.uint8)
    pieces = digest_all(images, 200, broken=frozenset(range(NUM_TRAIN + 2)))
    assert group_digests(pieces).shape == (2, 0)
