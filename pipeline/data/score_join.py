"""Rows of a file of predictions beside the images that they are of, found by their keys.

Input: the keys of all validation images, and all rows of the file, each parted into the same buckets by a hash of the
key. Output: of each bucket, the rows in the order of the listing, and what does not match. Invariant: what is joined is
one bucket at a time, and the answer does not depend on how either side was cut.

Axes: N rows, K classes.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.files import display
from pipeline.data.score_rows import ScoredRows

_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class ListedRows:
    """Validation images: keys as tables spell them, string; int32 [N] each the part and the position there."""

    keys: pa.StringArray
    parts_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]


@dataclass(frozen=True)
class GivenRows:
    """What a file says of images: where they are, as in `ListedRows`, and what is said, as in `ScoredRows`."""

    parts_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]
    codes_N: npt.NDArray[np.int32]
    scores_NK: npt.NDArray[np.float32]


@dataclass
class Mismatch:
    """How many images have no row or several, and how many rows are of no image; the first keys of each, sorted."""

    num_missing: int = 0
    num_doubled: int = 0
    num_unknown: int = 0
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, other: Mismatch) -> None:
        """Add what does not match in another bucket."""
        for name in ("missing", "doubled", "unknown"):
            setattr(self, f"num_{name}", getattr(self, f"num_{name}") + getattr(other, f"num_{name}"))
            setattr(self, name, sorted(getattr(self, name) + getattr(other, name))[:_NUM_EXAMPLES])

    def __str__(self) -> str:
        texts = (
            (self.num_missing, "without a row", self.missing),
            (self.num_doubled, "with several", self.doubled),
            (self.num_unknown, "row of another key" if self.num_unknown == 1 else "rows of other keys", self.unknown),
        )
        return ", ".join(
            f"{number:,} {what} ({', '.join(keys)}{', …' if number > len(keys) else ''})"
            for number, what, keys in texts
            if number
        )


def displayed(keys: pa.BinaryArray) -> pa.StringArray:
    """Spell keys as all tables do."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:  # not all of them are UTF-8
        return pa.array(map(display, keys.to_pylist()), pa.string())


def split_listed(rows: ListedRows, num_buckets: int) -> list[ListedRows]:
    """Part images by the hashes of their keys."""
    return [
        ListedRows(rows.keys.take(pa.array(chosen)), rows.parts_N[chosen], rows.positions_N[chosen])
        for chosen in _buckets(rows.keys, num_buckets)
    ]


def split_scored(rows: ScoredRows, num_buckets: int) -> list[ScoredRows]:
    """Part rows of a file by the hashes of their keys."""
    return [
        ScoredRows(rows.keys.take(pa.array(chosen)), rows.codes_N[chosen], rows.scores_NK[chosen], ())
        for chosen in _buckets(rows.keys, num_buckets)
    ]


def _buckets(keys: pa.StringArray, num_buckets: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each bucket, rising."""
    if num_buckets == 1:
        return [np.arange(len(keys))]
    hashes = (zlib.crc32(key) for key in keys.cast(pa.binary()).to_pylist())
    buckets_N = np.fromiter(hashes, np.uint32, len(keys)) % num_buckets
    order_N = np.argsort(buckets_N, kind="stable")
    return np.split(order_N, np.searchsorted(buckets_N[order_N], np.arange(1, num_buckets)))


def join(listed: Sequence[ListedRows], scored: Sequence[ScoredRows]) -> tuple[GivenRows | None, Mismatch]:
    """Find the row of each image in one bucket.

    Args:
        listed: The images of the bucket, in the order of the listing.
        scored: Its rows of the file.

    Returns:
        The rows in the order of the images, None if not every image has one; and what does not match.
    """
    import pyarrow.compute as pc  # which is long in loading, and the actors never need it

    keys = pa.concat_arrays([pa.array([], pa.string()), *(rows.keys for rows in listed)])
    own_keys = pa.chunked_array([rows.keys for rows in scored], pa.string())
    found = pc.index_in(own_keys, value_set=keys)
    is_unknown_M = found.is_null().to_numpy()
    images_M = found.fill_null(len(keys)).to_numpy()
    # Of a key that the listing has twice only the first image is found, so that the other one has no row.
    counts_N = np.bincount(images_M, minlength=len(keys) + 1)[: len(keys)]
    mismatch = Mismatch(int((counts_N == 0).sum()), int((counts_N > 1).sum()), int(is_unknown_M.sum()))
    for name, of, is_meant in (
        ("missing", keys, counts_N == 0),
        ("doubled", keys, counts_N > 1),
        ("unknown", own_keys, is_unknown_M),
    ):
        if is_meant.any():
            setattr(mismatch, name, sorted(of.take(pa.array(np.flatnonzero(is_meant))).to_pylist())[:_NUM_EXAMPLES])
    if mismatch != Mismatch():
        return None, mismatch
    rows_N = np.empty(len(keys), np.int64)
    rows_N[images_M] = np.arange(len(keys))
    given = GivenRows(
        np.concatenate([np.zeros(0, np.int32), *(rows.parts_N for rows in listed)]),
        np.concatenate([np.zeros(0, np.int32), *(rows.positions_N for rows in listed)]),
        np.concatenate([rows.codes_N for rows in scored])[rows_N],
        np.concatenate([rows.scores_NK for rows in scored])[rows_N],
    )
    return given, mismatch


def cut_rows(given: GivenRows, bounds: Sequence[int]) -> list[GivenRows]:
    """Cut rows at parts: from each of `bounds` up to the next one."""
    cuts = np.searchsorted(given.parts_N, bounds)
    slices = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    return [
        GivenRows(given.parts_N[each], given.positions_N[each], given.codes_N[each], given.scores_NK[each])
        for each in slices
    ]


def of_part(given: Sequence[GivenRows], part: int) -> GivenRows:
    """Put together what several buckets have of one part, sorted by position."""
    own = [cut_rows(rows, (part, part + 1))[0] for rows in given]
    positions_N = np.concatenate([rows.positions_N for rows in own])
    order_N = np.argsort(positions_N)
    return GivenRows(
        np.full(len(order_N), part, np.int32),
        positions_N[order_N],
        np.concatenate([rows.codes_N for rows in own])[order_N],
        np.concatenate([rows.scores_NK for rows in own])[order_N],
    )
