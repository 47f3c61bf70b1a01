"""The nearest training images of other images, exactly, by squared distances of their pixels.

Input: images that are searched for, and blocks of training images. Output: for each the J nearest, by distance and
then by row of the listing. Invariant: the answer depends on the images alone: distances are whole numbers, and how
training images are cut into blocks, and blocks spread over actors, changes nothing.

Axes: N images that are searched for, T training images of a block, J neighbors, D values of an image, G groups of W
neighboring columns of a block. Distances are squared, in pixels of 0 to 255 or units of `features.LENGTH`, int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.products import products, squares, to_whole
from pipeline.compute.threads import Threads

# Of a neighbor that there is none of.
FAR = torch.iinfo(torch.int64).max
# Images that are searched for at once: their products with a block of training images, 2^21, stay in the cache.
_TILE_IMAGES = 512
_MAX_GROUP = 64


@dataclass(frozen=True)
class TrainBlock:
    """Some training images.

    Attributes:
        images_TD: uint8, on the device that searches.
        rows_T: Their rows in the listing, int64, on the CPU.
        labels_T: int64, on the CPU.
    """

    images_TD: torch.Tensor
    rows_T: torch.Tensor
    labels_T: torch.Tensor


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


def search(
    images_ND: torch.Tensor,
    blocks: Iterable[TrainBlock],
    num_neighbors: int,
    threads: Threads | None = None,
    own_rows_N: torch.Tensor | None = None,
    only_labels_N: torch.Tensor | None = None,
) -> Neighbors:
    """Find the nearest training images.

    Args:
        images_ND: uint8.
        blocks: The training images, each in one block.
        num_neighbors: J.
        threads: They share the images, on a CPU; None for the caller alone.
        own_rows_N: The rows of these images themselves, int64, where they are training images: none is its own
            neighbor.
        only_labels_N: The classes among whose images alone each is searched for, int64.
    """
    searched_ND = to_whole(images_ND)
    tiles = [
        _Tile(
            searched_ND[start : start + _TILE_IMAGES],
            num_neighbors,
            None if own_rows_N is None else own_rows_N[start : start + _TILE_IMAGES],
            None if only_labels_N is None else only_labels_N[start : start + _TILE_IMAGES],
        )
        for start in range(0, len(images_ND), _TILE_IMAGES)
    ]
    shared = threads if threads and images_ND.device.type == "cpu" else Threads()
    for block in blocks:
        others_TD = to_whole(block.images_TD)
        shared.run(partial(_Tile.take, others_TD=others_TD, squares_T=squares(others_TD), block=block), tiles)
    empty = np.zeros((0, num_neighbors))
    none = Neighbors(empty.astype(np.int64), empty.astype(np.int64), empty.astype(np.int64), empty.astype(object))
    return stack([none, *(tile.neighbors() for tile in tiles)])


def stack(found: Sequence[Neighbors], axis: int = 0) -> Neighbors:
    """Put the neighbors of some images above those of others, or, with axis 1, beside others of the same images."""
    columns = zip(*(vars(each).values() for each in found), strict=True)
    return Neighbors(*(np.concatenate(values, axis) for values in columns))


def merge(found: Sequence[Neighbors], num_neighbors: int) -> Neighbors:
    """Choose the J nearest of what several actors found for the same images; columns that none has are left out.

    Every actor's own J nearest are enough (the scheme of DINOv3's k-NN evaluation,
    https://github.com/facebookresearch/dinov3).
    """
    all_found = stack(found, axis=1)
    order_NJ = np.lexsort((all_found.rows_NJ, all_found.distances_NJ), axis=1)[:, :num_neighbors]
    merged = all_found.map(lambda values: np.take_along_axis(values, order_NJ, 1))
    num_found = int((merged.distances_NJ != FAR).any(0).sum())
    return merged.map(lambda values: values[:, :num_found])


class _Tile:
    """Some images with the J nearest that they have met so far.

    A distance is |a|^2 + |b|^2 - 2ab; while searching, |a|^2, which is the same for all b, is left out.
    """

    def __init__(
        self,
        images_ND: torch.Tensor,
        num_neighbors: int,
        own_rows_N: torch.Tensor | None,
        only_labels_N: torch.Tensor | None,
    ) -> None:
        self._images_ND = images_ND
        self._own_rows_N = own_rows_N
        self._only_labels_N = only_labels_N
        shape = len(images_ND), num_neighbors
        self._best_NJ = torch.full(shape, FAR, dtype=torch.int64, device=images_ND.device)
        self._rows_NJ = torch.full(shape, FAR, dtype=torch.int64)
        self._labels_NJ = torch.full(shape, -1, dtype=torch.int64)

    def take(self, others_TD: torch.Tensor, squares_T: torch.Tensor, block: TrainBlock) -> None:
        """Meet the images of a block, as `to_whole` gives them, with their `squares`."""
        products_NT = products(self._images_ND, others_TD)
        values_NT = torch.sub(squares_T.to(products_NT.dtype), products_NT, alpha=2)
        # `pad` takes a float64, which has not every int64.
        far = min(torch.iinfo(values_NT.dtype).max, 2**62)
        self._leave_out(values_NT, far, block)
        near, column, value = self._candidates(values_NT, far)
        if len(near):
            self._keep(near.cpu(), column.cpu(), value.cpu(), block)

    def neighbors(self) -> Neighbors:
        """Give the nearest of all that were met."""
        own_N1 = squares(self._images_ND)[:, None]
        distances_NJ = torch.where(self._best_NJ == FAR, FAR, self._best_NJ + own_N1)
        no_keys_NJ = np.full(distances_NJ.shape, "", object)
        return Neighbors(distances_NJ.cpu().numpy(), self._rows_NJ.numpy(), self._labels_NJ.numpy(), no_keys_NJ)

    def _leave_out(self, values_NT: torch.Tensor, far: int, block: TrainBlock) -> None:
        if self._own_rows_N is not None:
            order_T = block.rows_T.argsort()
            sorted_T = block.rows_T[order_T]
            place_N = torch.searchsorted(sorted_T, self._own_rows_N).clamp_(max=len(sorted_T) - 1)
            is_here_N = sorted_T[place_N] == self._own_rows_N
            here, there = is_here_N.nonzero()[:, 0], order_T[place_N[is_here_N]]
            values_NT[here.to(values_NT.device), there.to(values_NT.device)] = far
        if self._only_labels_N is not None:
            is_other_NT = self._only_labels_N[:, None] != block.labels_T[None, :]
            values_NT.masked_fill_(is_other_NT.to(values_NT.device), far)

    def _candidates(self, values_NT: torch.Tensor, far: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose all values that can be among the J nearest: their images, columns, and values.

        The J smallest of the minima of groups belong to J images, so that the J nearest are no farther than the largest
        of these. All that lie no farther are kept, ties included: which of them counts is decided by their rows.
        """
        num_images, num_columns = values_NT.shape
        num_neighbors = self._best_NJ.shape[1]
        width = _MAX_GROUP
        while width > 1 and num_columns < 2 * num_neighbors * width:
            width //= 2
        if num_columns % width:
            values_NT = torch.nn.functional.pad(values_NT, (0, -num_columns % width), value=far)
        values_NGW = values_NT.view(num_images, -1, width)
        minima_NG = values_NGW.amin(2)
        limit_N = self._best_NJ[:, -1].clamp(max=far - 1).to(values_NT.dtype)
        if num_neighbors <= minima_NG.shape[1]:
            limit_N = limit_N.minimum(minima_NG.topk(num_neighbors, 1, largest=False).values.amax(1))
        image_P, group_P = (minima_NG <= limit_N[:, None]).nonzero(as_tuple=True)
        values_PW = values_NGW[image_P, group_P]
        place_C, offset_C = ((values_PW <= limit_N[image_P][:, None]) & (values_PW < far)).nonzero(as_tuple=True)
        return image_P[place_C], group_P[place_C] * width + offset_C, values_PW[place_C, offset_C].long()

    def _keep(self, image_C: torch.Tensor, column_C: torch.Tensor, value_C: torch.Tensor, block: TrainBlock) -> None:
        """Merge candidates with what was nearest so far."""
        changed_M = image_C.unique()
        num_neighbors = self._best_NJ.shape[1]
        best_NJ = self._best_NJ.cpu()
        image_C = torch.cat([changed_M.repeat_interleave(num_neighbors), image_C])
        value_C = torch.cat([best_NJ[changed_M].view(-1), value_C])
        row_C = torch.cat([self._rows_NJ[changed_M].view(-1), block.rows_T[column_C]])
        label_C = torch.cat([self._labels_NJ[changed_M].view(-1), block.labels_T[column_C]])
        order_C = torch.from_numpy(np.lexsort((row_C.numpy(), value_C.numpy(), image_C.numpy())))
        sorted_C = image_C[order_C]
        rank_C = torch.arange(len(order_C)) - torch.searchsorted(sorted_C, sorted_C)
        kept_C = order_C[rank_C < num_neighbors]
        self._best_NJ[changed_M.to(self._best_NJ.device)] = (
            value_C[kept_C].view(-1, num_neighbors).to(self._best_NJ.device)
        )
        self._rows_NJ[changed_M] = row_C[kept_C].view(-1, num_neighbors)
        self._labels_NJ[changed_M] = label_C[kept_C].view(-1, num_neighbors)
