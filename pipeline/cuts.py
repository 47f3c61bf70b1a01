"""A listing cut into shards, which are decoded, and into parts, which are scored.

Input: the rows at which each file is best cut. Output: numbered shards, each some neighbours in the listing, and the
bounds of parts. Invariant: every image is in one shard, and nothing depends on the number of workers.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.splits import Split

MAX_PART_IMAGES = 100_000
# While it is scored, or waits to be, a part is held by its actor.
MAX_PART_BYTES = 256 * 2**20
# A part of fewer images is not worth a file of its own.
_MIN_PART_IMAGES = 2048


@dataclass(frozen=True)
class Shard:
    """A unit of work: some neighbours in one split's listing, all in one file where the dataset is in archives.

    Attributes:
        index: The shard's number, counted through both splits, training first.
        split: Which listing the rows are of.
        start: The first row.
        stop: The row behind the last one.
        file: The number of the archive that holds them; 0 for class folders.
        first: The first row, counted from the archive's first.
        part: Of a validation shard, the part of the predictions that it is written to.
        offset: Of a validation shard, where its first row stands in the part.
        entry: The name of its entry in the cache, where there is one and the shard is of class folders.
    """

    index: int
    split: Split
    start: int
    stop: int
    file: int
    first: int
    part: int = 0
    offset: int = 0
    entry: str = ""

    @property
    def num_images(self) -> int:
        """Listed images."""
        return self.stop - self.start


def cut_train(row_groups: Sequence[Sequence[int]], max_images: int) -> list[Shard]:
    """Cut the training listing.

    Args:
        row_groups: For each file, the rows at which it is best cut, from 0 to the number of its rows.
        max_images: Images that a shard holds at most.
    """
    pieces = _cut(row_groups, max_images, [])
    return [Shard(index, "train", *piece) for index, piece in enumerate(pieces)]


def cut_valid(
    row_groups: Sequence[Sequence[int]], max_images: int, bounds: Sequence[int], first_index: int
) -> list[Shard]:
    """Cut the validation listing, also where one part ends and the next begins.

    Args:
        row_groups: As for `cut_train`.
        max_images: Likewise.
        bounds: As `part_bounds` returns them.
        first_index: The number of the first shard.
    """
    shards = []
    for index, (start, stop, file, first) in enumerate(_cut(row_groups, max_images, bounds)):
        part = bisect.bisect_right(bounds, start) - 1
        shards.append(Shard(first_index + index, "valid", start, stop, file, first, part, start - bounds[part]))
    return shards


def part_bounds(num_images: int, image_bytes: int, lanes: int) -> list[int]:
    """Cut the validation listing into parts: one prediction file each, computed on one actor.

    `image_bytes` are those of an image's pixels and scores.

    There is one for each lane if the images suffice, and more, in a multiple of the lanes, where parts would pass
    `MAX_PART_IMAGES` or `MAX_PART_BYTES`.

    Returns:
        The first row of each part, and at last the number of rows.
    """
    max_images = min(MAX_PART_IMAGES, max(1, MAX_PART_BYTES // image_bytes))
    wanted = -(-num_images // (max_images * lanes)) * lanes
    num_parts = min(wanted, -(-num_images // min(_MIN_PART_IMAGES, max_images)))
    return [part * num_images // num_parts for part in range(num_parts)] + [num_images] if num_parts else [0]


def _cut(
    row_groups: Sequence[Sequence[int]], max_images: int, bounds: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Cut files at `bounds` and, in pieces of at most `max_images`, preferably between their row groups.

    Returns:
        For each piece its first row and the row behind its last, both of the whole listing, the number of its file,
        and its first row in the file.
    """
    pieces = []
    begin = 0
    for file, groups in enumerate(row_groups):
        end = begin + groups[-1]
        inner = set(bounds[bisect.bisect_right(bounds, begin) : bisect.bisect_left(bounds, end)])
        cuts = sorted({*(begin + row for row in groups), *inner})
        start = begin
        for high, behind in zip(cuts[1:], [*cuts[2:], None], strict=True):
            if behind is None or high in inner or behind - start > max_images:
                num_pieces = -(-(high - start) // max_images)
                steps = [start + piece * (high - start) // num_pieces for piece in range(num_pieces + 1)]
                pieces += [(left, right, file, left - begin) for left, right in itertools.pairwise(steps)]
                start = high
        begin = end
    return pieces
