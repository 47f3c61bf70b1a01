"""The nearest training images of other images, exactly, by squared distances of their pixels.

Input: images that are searched for, and blocks of training images. Output: for each the J nearest, by distance and
then by row of the listing. Invariant: the answer depends on the images alone: distances are whole numbers, and how
training images are cut into blocks, and blocks spread over actors, changes nothing.

Axes: N images that are searched for, T training images of a block, J neighbors, D values of an image, G groups of W
neighboring columns of a block. Distances are squared, in pixels of 0 to 255 or units of `features.LENGTH`, int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.products import has_fast_int8, pair_products, products, squares, to_whole
from pipeline.compute.pruning import MIN_VALUES, Projected, Projection, Scan, has_axes
from pipeline.compute.pruning import stack as stack_projected
from pipeline.compute.threads import Threads

# Places of images, distances less their own squares, and rows and labels of training images, on the CPU.
_Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Of a neighbor that there is none of.
FAR = torch.iinfo(torch.int64).max
# Images that are searched for at once, and training images beside them: their products, 2^21, stay in the cache. Where
# most are left out, there are as many beside fewer images, so that the nearest are found sooner.
_TILE_IMAGES, _PLAIN_COLUMNS, _PRUNED_TILE_IMAGES = 512, 4096, 128
_MAX_GROUP = 64
# Values that become float32 at once.
_FLOAT_VALUES = 2**20
# For fewer images axes are not worth finding.
_MIN_PRUNED = 512
# Pairs that are compared at once.
_PAIRS = 512
# Besides J, of what seems nearest.
_MORE_PROBES = 1


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
    is_on_cpu = images_ND.device.type == "cpu"
    shared = threads if threads and is_on_cpu else Threads()
    # A product of all is faster where there are instructions for it; and of features it is one of float64.
    is_worth_it = is_on_cpu and len(images_ND) >= _MIN_PRUNED and images_ND.shape[1] >= MIN_VALUES
    can_prune = is_worth_it and not images_ND.is_floating_point() and not has_fast_int8(images_ND.device)
    size = _PRUNED_TILE_IMAGES if can_prune else _TILE_IMAGES
    tiles = [
        _Tile(
            images_ND[start : start + size],
            num_neighbors,
            None if own_rows_N is None else own_rows_N[start : start + size],
            None if only_labels_N is None else only_labels_N[start : start + size],
        )
        for start in range(0, len(images_ND), size)
    ]
    projection: Projection | None = None
    for number, block in enumerate(blocks):
        if number == 0 and can_prune and has_axes(block.images_TD):
            projection = Projection(block.images_TD)
            shared.run(partial(_Tile.project, projection=projection), tiles)
        is_pruned = any(tile.prunes(number) for tile in tiles)
        others = _prepare(block, projection if is_pruned else None, shared)
        shared.run(partial(_Tile.take, others=others, number=number), tiles)
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


@dataclass
class _Others:
    """A block of training images, as `to_whole` gives them, with their squares; projected, to leave most out."""

    block: TrainBlock
    images_TD: torch.Tensor
    squares_T: torch.Tensor
    projected: Projected | None = None

    def __getitem__(self, columns: slice) -> _Others:
        block = TrainBlock(*(values[columns] for values in vars(self.block).values()))
        return _Others(block, self.images_TD[columns], self.squares_T[columns])


def _prepare(block: TrainBlock, projection: Projection | None, threads: Threads) -> _Others:
    step = max(1, min(_TILE_IMAGES, _FLOAT_VALUES // block.images_TD.shape[1]))
    starts = range(0, len(block.rows_T), step)
    dtype = torch.float64 if block.images_TD.is_floating_point() else torch.int8
    images_TD = torch.empty_like(block.images_TD, dtype=dtype)
    squares_T = torch.empty(len(images_TD), dtype=torch.int64, device=images_TD.device)
    projected: dict[int, Projected] = {}

    def prepare(start: int) -> None:
        rows = slice(start, start + step)
        images_TD[rows] = to_whole(block.images_TD[rows])
        squares_T[rows] = squares(images_TD[rows])
        if projection is not None:
            projected[start] = projection.apply(block.images_TD[rows])

    threads.run(prepare, starts)
    stacked = stack_projected([projected[start] for start in starts]) if projection else None
    return _Others(block, images_TD, squares_T, stacked)


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
        self._images_ND = to_whole(images_ND)
        self._squares_N = squares(self._images_ND)
        self._pixels_ND = images_ND
        self._pruning: tuple[Projection, Projected] | None = None
        self._next_pruned = 0
        self._own_rows_N = own_rows_N
        self._only_labels_N = only_labels_N
        shape = len(images_ND), num_neighbors
        self._best_NJ = torch.full(shape, FAR, dtype=torch.int64, device=images_ND.device)
        self._rows_NJ = torch.full(shape, FAR, dtype=torch.int64)
        self._labels_NJ = torch.full(shape, -1, dtype=torch.int64)

    def project(self, projection: Projection) -> None:
        """Get ready to leave most images out by their projections."""
        self._pruning = projection, projection.apply(self._pixels_ND).as_searched()

    def prunes(self, number: int) -> bool:
        """Whether it tries to leave most images of a block out, by the block's number."""
        return self._pruning is not None and number >= self._next_pruned

    def take(self, others: _Others, number: int) -> None:
        """Meet the images of a block, by its number."""
        found = self._find_pairs(others) if self.prunes(number) else None
        if found is None:
            # Later ones, when the nearest so far are nearer, may be worth another trial.
            self._next_pruned = max(self._next_pruned, 4 * (number + 1))
            for start in range(0, len(others.images_TD), _PLAIN_COLUMNS):
                self._keep(*self._compare_all(others[start : start + _PLAIN_COLUMNS]))
        else:
            self._keep(*found)

    def _compare_all(self, others: _Others) -> _Pairs:
        products_NT = products(self._images_ND, others.images_TD)
        values_NT = torch.sub(others.squares_T.to(products_NT.dtype), products_NT, alpha=2)
        # `pad` takes a float64, which has not every int64.
        far = min(torch.iinfo(values_NT.dtype).max, 2**62)
        self._leave_out(values_NT, far, others.block)
        image_C, column_C, value_C = (each_C.cpu() for each_C in self._candidates(values_NT, far))
        return image_C, value_C, others.block.rows_T[column_C], others.block.labels_T[column_C]

    def _find_pairs(self, others: _Others) -> _Pairs | None:
        """Find all pairs that can count by their projections, and compare these; None where they are too many."""
        assert self._pruning is not None
        assert others.projected is not None
        projection, searched = self._pruning
        scan = Scan(searched, others.projected, partial(self._leave_out, far=math.inf, block=others.block))
        bound_N = self._best_NJ[:, -1]
        num_neighbors = self._best_NJ.shape[1]
        if scan.num_probes >= num_neighbors:
            # Those that seem nearest bound the distance of the J-th.
            column_NC = scan.nearest(min(num_neighbors + _MORE_PROBES, scan.num_probes))
            image_C = torch.arange(len(column_NC)).repeat_interleave(column_NC.shape[1])
            value_C = self._values(others, image_C, column_NC.view(-1).clamp(min=0))
            value_NC = value_C.view(column_NC.shape).masked_fill_(column_NC < 0, FAR)
            bound_N = bound_N.minimum(value_NC.kthvalue(num_neighbors, 1).values)
        if bool((bound_N == FAR).any()):
            return None
        longest = float(others.projected.squares_N.max())
        pairs = scan.pairs(projection.limits(searched, longest, (bound_N + self._squares_N).double()))
        if pairs is None:
            return None
        image_C, column_C = pairs
        value_C = self._values(others, image_C, column_C)
        is_near_C = value_C <= bound_N[image_C]
        column_C = column_C[is_near_C]
        return image_C[is_near_C], value_C[is_near_C], others.block.rows_T[column_C], others.block.labels_T[column_C]

    def _values(self, others: _Others, image_C: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        products = [
            pair_products(self._images_ND.index_select(0, images), others.images_TD.index_select(0, columns))
            for images, columns in zip(image_C.split(_PAIRS), column_C.split(_PAIRS), strict=True)
        ]
        return others.squares_T[column_C].sub_(torch.cat(products), alpha=2)

    def neighbors(self) -> Neighbors:
        """Give the nearest of all that were met."""
        own_N1 = self._squares_N[:, None]
        distances_NJ = torch.where(self._best_NJ == FAR, FAR, self._best_NJ + own_N1)
        no_keys_NJ = np.full(distances_NJ.shape, "", object)
        return Neighbors(distances_NJ.cpu().numpy(), self._rows_NJ.numpy(), self._labels_NJ.numpy(), no_keys_NJ)

    def _leave_out(self, values_NT: torch.Tensor, far: float, block: TrainBlock) -> None:
        if self._own_rows_N is not None:
            order_T = block.rows_T.argsort()
            sorted_T = block.rows_T[order_T]
            place_N = torch.searchsorted(sorted_T, self._own_rows_N).clamp_(max=len(sorted_T) - 1)
            is_here_N = sorted_T[place_N] == self._own_rows_N
            here, there = is_here_N.nonzero()[:, 0], order_T[place_N[is_here_N]]
            values_NT[here.to(values_NT.device), there.to(values_NT.device)] = far
        if self._only_labels_N is not None:
            is_other_NT = self._only_labels_N[:, None] != block.labels_T[None, :]
            values_NT[:, : len(block.rows_T)].masked_fill_(is_other_NT.to(values_NT.device), far)

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

    def _keep(self, image_C: torch.Tensor, value_C: torch.Tensor, row_C: torch.Tensor, label_C: torch.Tensor) -> None:
        """Merge candidates with what was nearest so far."""
        if not len(image_C):
            return
        changed_M = image_C.unique()
        num_neighbors = self._best_NJ.shape[1]
        best_NJ = self._best_NJ.cpu()
        image_C = torch.cat([changed_M.repeat_interleave(num_neighbors), image_C])
        value_C = torch.cat([best_NJ[changed_M].view(-1), value_C])
        row_C = torch.cat([self._rows_NJ[changed_M].view(-1), row_C])
        label_C = torch.cat([self._labels_NJ[changed_M].view(-1), label_C])
        order_C = torch.from_numpy(np.lexsort((row_C.numpy(), value_C.numpy(), image_C.numpy())))
        sorted_C = image_C[order_C]
        rank_C = torch.arange(len(order_C)) - torch.searchsorted(sorted_C, sorted_C)
        kept_C = order_C[rank_C < num_neighbors]
        self._best_NJ[changed_M.to(self._best_NJ.device)] = (
            value_C[kept_C].view(-1, num_neighbors).to(self._best_NJ.device)
        )
        self._rows_NJ[changed_M] = row_C[kept_C].view(-1, num_neighbors)
        self._labels_NJ[changed_M] = label_C[kept_C].view(-1, num_neighbors)
