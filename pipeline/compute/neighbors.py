"""What is found when training images that are nearest to other images are looked for.

Input: what actors, or parts of an actor, found. Output: the J nearest of all. Invariant: the J nearest by distance and
then by row of the listing, however they were found.

Axes: N images that are searched for, J neighbors. Distances are squared, in pixels of 0 to 255 or units of
`features.LENGTH`, int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Of a neighbor that there is none of.
FAR = torch.iinfo(torch.int64).max


@dataclass
class Neighbors:
    """The nearest training images of N images, nearest first.

    Attributes:
        distances_NJ: int64; `FAR` where there are fewer than J.
        rows_NJ: Their rows in the listing, int64.
        labels_NJ: Their classes, int64; -1 where there is none.
        keys_NJ: Their keys, str as objects; empty until they are looked up.
    """

    distances_NJ: npt.NDArray[np.int64]
    rows_NJ: npt.NDArray[np.int64]
    labels_NJ: npt.NDArray[np.int64]
    keys_NJ: npt.NDArray[np.object_]

    def __getitem__(self, rows: slice) -> Neighbors:
        return self.map(lambda values: values[rows])

    def map(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Neighbors:
        """Do the same with every column."""
        return Neighbors(*(change(values) for values in vars(self).values()))


def stack(found: Sequence[Neighbors], axis: int = 0) -> Neighbors:
    """Put the neighbors of some images above those of others, or, with axis 1, beside others of the same images."""
    columns = zip(*(vars(each).values() for each in found), strict=True)
    return Neighbors(*(np.concatenate(values, axis) for values in columns))


def merge(found: Sequence[Neighbors], num_neighbors: int) -> Neighbors:
    """Choose the J nearest of what several actors found for the same images; columns that no image has are left out.

    Every actor's own J nearest are enough (the scheme of DINOv3's k-NN evaluation,
    https://github.com/facebookresearch/dinov3).
    """
    all_found = stack(found, axis=1)
    order_NJ = np.lexsort((all_found.rows_NJ, all_found.distances_NJ), axis=1)[:, :num_neighbors]
    merged = all_found.map(lambda values: np.take_along_axis(values, order_NJ, 1))
    if not len(merged.distances_NJ):
        return merged
    num_found = int((merged.distances_NJ != FAR).any(0).sum())
    return merged.map(lambda values: values[:, :num_found])
