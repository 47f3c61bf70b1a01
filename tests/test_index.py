"""The index of one archive, from the rows that a scan found."""

import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.data.formats.index import LEFT_OUT, NO_SPLIT, TRAIN, VALID, Archive, ScannedImages, make_index
from pipeline.data.splits import are_held_out, hashes_of
from pipeline.errors import DataError

ARCHIVE = Archive("tar", "/data/a.tar", "a.tar", 0, None, None, None)
HALF_HELD_OUT = Config(valid_fraction=0.5)


def scanned_images(sides, labels=None, group_starts=(0,)):
    num_rows = len(sides)
    return ScannedImages(
        keys=pa.chunked_array([pa.array([b"a.tar/%d" % row for row in range(num_rows)], pa.binary())]),
        labels=np.asarray(labels or [0] * num_rows, np.int32),
        offsets=np.arange(num_rows),
        sizes=np.ones(num_rows, np.int64),
        sides=np.asarray(sides, np.int8),
        class_names=("3", "7"),
        group_starts=np.asarray(group_starts),
    )


def index_of(rows, config=HALF_HELD_OUT):
    return make_index(ARCHIVE, rows, config, (), Counter())


def test_rows_go_to_their_side_in_order():
    scan, index = index_of(scanned_images([TRAIN, VALID, LEFT_OUT, TRAIN], [1, 0, 0, 1]), Config())
    assert index["train"].to_pydict() == {
        "key": [b"a.tar/0", b"a.tar/3"], "label": [1, 1], "offset": [0, 3], "size": [1, 1]
    }  # fmt: skip
    assert index["valid"]["offset"].to_pylist() == [1]
    assert scan.num_images == {"train": {"7": 2}, "valid": {"3": 1}}


def test_rows_without_a_split_are_held_out_by_their_keys():
    _, index = index_of(scanned_images([NO_SPLIT] * 100))
    keys = index["valid"]["key"].to_pylist()
    everything = [b"a.tar/%d" % row for row in range(100)]
    held_out = are_held_out(hashes_of(everything, 100), 0.5)
    assert keys == [key for key, is_valid in zip(everything, held_out, strict=True) if is_valid]
    assert len(index["train"]) + len(keys) == 100


def test_rows_without_a_split_are_an_error_when_nothing_is_held_out():
    with pytest.raises(DataError, match=r"/data/a\.tar: expected train and .*, got no two splits"):
        index_of(scanned_images([NO_SPLIT]), Config())


def test_only_classes_that_are_asked_for_are_listed():
    scan, index = index_of(scanned_images([TRAIN] * 3, [0, 1, 0]), Config(classes=("7", "9")))
    assert index["train"]["offset"].to_pylist() == [1]
    assert (scan.class_names, scan.num_images["train"]) == (("3", "7"), {"7": 1})


def test_row_groups_are_told_in_rows_of_each_index():
    sides = [TRAIN, TRAIN, VALID, VALID, TRAIN, VALID, TRAIN]
    scan, _ = index_of(scanned_images(sides, group_starts=(0, 2, 4)), Config())
    assert scan.row_groups == {"train": (0, 2, 4), "valid": (0, 2, 3)}


def test_what_crosses_ray_is_the_same_after_it():
    scan, index = index_of(scanned_images([TRAIN, VALID]))
    assert pickle.loads(pickle.dumps((ARCHIVE, scan, index))) == (ARCHIVE, scan, index)
