"""Rows of a file beside the images that they are of: against a dictionary, however both sides are cut."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.score_join import (
    ListedRows,
    Mismatch,
    cut_rows,
    displayed,
    join,
    of_part,
    split_listed,
    split_scored,
)
from pipeline.data.score_rows import ScoredRows

PART_SIZES = (30, 1, 29, 40)
KEYS = [f"valid/ä/{number}.png" for number in range(100)]


def listed_rows(rows):
    parts = np.repeat(np.arange(4, dtype=np.int32), PART_SIZES)
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in PART_SIZES])
    return ListedRows(pa.array([KEYS[row] for row in rows], pa.string()), parts[rows], positions[rows])


def scored_rows(keys, random, num_classes=3):
    scores_NK = random.normal(size=(len(keys), num_classes)).astype(np.float32)
    codes_N = random.integers(-1, 3, len(keys)).astype(np.int32)
    return ScoredRows(pa.array(keys, pa.string()), codes_N, scores_NK, ())


def joined(listed, scored, num_buckets):
    """Part both sides into buckets and join each; return what was joined, and what does not match at all."""
    listed = [split_listed(rows, num_buckets) for rows in listed]
    scored = [split_scored(rows, num_buckets) for rows in scored]
    found, total = [], Mismatch()
    for bucket in range(num_buckets):
        given, mismatch = join([rows[bucket] for rows in listed], [rows[bucket] for rows in scored])
        total.add(mismatch)
        found.append(given)
    return found, total


@pytest.mark.parametrize("num_buckets", [1, 2, 7, 300])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_part_gets_the_rows_of_its_images(num_buckets, num_classes):
    random = np.random.default_rng(num_buckets)
    keys = [KEYS[row] for row in random.permutation(100)]
    scored = [scored_rows(some, random, num_classes) for some in (keys[:50], [], keys[50:51], keys[51:])]
    listed = [listed_rows(np.arange(*bounds)) for bounds in ((0, 35), (35, 100))]
    found, mismatch = joined(listed, scored, num_buckets)
    assert mismatch == Mismatch()
    expected = {
        key: (rows.codes_N[row], rows.scores_NK[row].tolist())
        for rows in scored
        for row, key in enumerate(rows.keys.to_pylist())
    }
    for part, size in enumerate(PART_SIZES):
        groups = [cut_rows(given, (0, 2, 4))[part // 2] for given in found]
        own = of_part(groups, part)
        keys = KEYS[sum(PART_SIZES[:part]) :][:size]
        assert own.positions_N.tolist() == list(range(size))
        assert own.codes_N.tolist() == [expected[key][0] for key in keys]
        assert own.scores_NK.tolist() == [expected[key][1] for key in keys]


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_what_does_not_match_is_counted_and_the_first_keys_are_named(num_buckets):
    random = np.random.default_rng(0)
    keys = [*KEYS[5:], *KEYS[10:12], *KEYS[10:12], "x", "x", "", "10.png", "valid/ä/100.png"]
    found, mismatch = joined([listed_rows(np.arange(100))], [scored_rows(keys, random)], num_buckets)
    assert any(given is None for given in found)
    assert (mismatch.num_missing, mismatch.num_doubled, mismatch.num_unknown) == (5, 2, 5)
    assert str(mismatch) == (
        "5 without a row (valid/ä/0.png, valid/ä/1.png, valid/ä/2.png, …), "
        "2 with several (valid/ä/10.png, valid/ä/11.png), 5 rows of other keys (, 10.png, valid/ä/100.png, …)"
    )


def test_a_key_that_the_listing_has_twice_has_no_row_of_its_own():
    random = np.random.default_rng(0)
    found, mismatch = joined([listed_rows(np.array([0, 1, 0]))], [scored_rows(KEYS[:2], random)], 1)
    assert found == [None]
    assert mismatch == Mismatch(num_missing=1, missing=[KEYS[0]])


def test_keys_are_spelled_as_in_the_tables():
    assert displayed(pa.array([b"a", "ä".encode()])).to_pylist() == ["a", "ä"]
    assert displayed(pa.array([b"a", b"\xff\\xff"])).to_pylist() == ["a", "\\xff\\xff"]
