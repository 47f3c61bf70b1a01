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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.products import has_fast_int8, pair_products, products, squares, to_whole
from pipeline.compute.pruning import MIN_VALUES, Projected, Projection, find_pairs, has_axes, nearest
from pipeline.compute.pruning import stack as stack_projected
from pipeline.compute.threads import Threads

# Places of images, distances less their own squares, and rows and labels of training images, on the CPU.
_Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Of a neighbor that there is none of.
FAR = torch.iinfo(torch.int64).max
# Images that are searched for at once, and training images beside them: their products, 2^21, stay in the cache. Where
# most are left out, there are as many beside fewer images, so that the nearest are found sooner.
_TILE_IMAGES, _PLAIN_COLUMNS, _PRUNED_TILE_IMAGES = 512, 4096, 256
_MAX_GROUP = 64
# Values that become float32 at once.
_FLOAT_VALUES = 2**20
# For fewer images axes are not worth finding.
_MIN_PRUNED = 512
# Training images among which the first J are looked for, by more trials than J.
_PROBED, _MORE_PROBES = 2048, 7


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

    images_TD: torch.Tensor
    squares_T: torch.Tensor
    rows_T: torch.Tensor
    labels_T: torch.Tensor
    projected: Projected | None = None

    def __getitem__(self, columns: slice) -> _Others:
        return replace(self, **{name: values[columns] for name, values in vars(self).items() if values is not None})


def _prepare(block: TrainBlock, projection: Projection | None, threads: Threads) -> _Others:
    num_images, num_values = block.images_TD.shape
    step = max(1, min(_TILE_IMAGES, _FLOAT_VALUES // num_values))
    starts = range(0, num_images, step)
    dtype = torch.float64 if block.images_TD.is_floating_point() else torch.int8
    images_TD = torch.empty_like(block.images_TD, dtype=dtype)
    squares_T = torch.empty(num_images, dtype=torch.int64, device=images_TD.device)
    projected: dict[int, Projected] = {}
    order_T = torch.arange(num_images)
    if projection is not None:
        # The first ones are of all classes then, however the listing is sorted.
        spread = -(-num_images // _PROBED)
        order_T = torch.cat([order_T[first::spread] for first in range(spread)])

    def prepare(start: int) -> None:
        rows = slice(start, start + step)
        given_TD = block.images_TD[rows] if projection is None else block.images_TD[order_T[rows]]
        images_TD[rows] = to_whole(given_TD)
        squares_T[rows] = squares(images_TD[rows])
        if projection is not None:
            projected[start] = projection.apply(given_TD)

    threads.run(prepare, starts)
    stacked = stack_projected([projected[start] for start in starts]) if projection else None
    return _Others(images_TD, squares_T, block.rows_T[order_T], block.labels_T[order_T], stacked)


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
        num_columns = len(others.rows_T)
        done = self._take_near(others) if self.prunes(number) else 0
        if done < num_columns:
            # Later ones, when the nearest so far are nearer, may be worth another trial.
            self._next_pruned = max(self._next_pruned, 4 * (number + 1))
        for start in range(done, num_columns, _PLAIN_COLUMNS):
            self._keep(*self._compare_all(others[start : start + _PLAIN_COLUMNS]))

    def _take_near(self, others: _Others) -> int:
        """Meet those that can count by their projections, until comparing all is faster; return how many are done."""
        num_columns, done = len(others.rows_T), 0
        is_bound = bool((self._best_NJ[:, -1] != FAR).all())
        while done < num_columns:
            # The nearest of the first ones bound as many more, and so on.
            stop = num_columns if is_bound else min(2 * done or _PROBED, num_columns)
            found = self._find_pairs(others[done:stop])
            if found is None:
                break
            self._keep(*found)
            done = stop
        return done

    def _compare_all(self, others: _Others) -> _Pairs:
        products_NT = products(self._images_ND, others.images_TD)
        values_NT = torch.sub(others.squares_T.to(products_NT.dtype), products_NT, alpha=2)
        # `pad` takes a float64, which has not every int64.
        far = min(torch.iinfo(values_NT.dtype).max, 2**62)
        self._leave_out(values_NT, far, others)
        image_C, column_C, value_C = (each_C.cpu() for each_C in self._candidates(values_NT, far))
        return image_C, value_C, others.rows_T[column_C], others.labels_T[column_C]

    def _find_pairs(self, others: _Others) -> _Pairs | None:
        """Find all pairs that can count by their projections, and compare these; None where they are too many."""
        assert self._pruning is not None
        assert others.projected is not None
        projection, searched = self._pruning
        bound_N = self._best_NJ[:, -1]
        if bool((bound_N == FAR).any()):
            bound_N = bound_N.minimum(self._probe(others[:_PROBED]))
        if bool((bound_N == FAR).any()):
            return None
        longest = float(others.projected.squares_N.max())
        limit_N = projection.limits(searched, longest, (bound_N + self._squares_N).double())
        is_any = self._own_rows_N is None and self._only_labels_N is None
        choose = None if is_any else partial(self._counts, others)
        pairs = find_pairs(searched, others.projected, limit_N, choose)
        if pairs is None:
            return None
        image_C, column_C = pairs
        value_C = self._values(others, image_C, column_C)
        is_near_C = value_C <= bound_N[image_C]
        image_C, column_C, value_C = image_C[is_near_C], column_C[is_near_C], value_C[is_near_C]
        return image_C, value_C, others.rows_T[column_C], others.labels_T[column_C]

    def _probe(self, others: _Others) -> torch.Tensor:
        """Compare those that seem nearest: the J-th nearest one of all is no farther than theirs, int64 [N]."""
        assert self._pruning is not None
        assert others.projected is not None
        num_images, num_neighbors = self._best_NJ.shape
        number = min(num_neighbors + _MORE_PROBES, len(others.rows_T))
        if number < num_neighbors:
            return torch.full((num_images,), FAR)
        leave_out = partial(self._leave_out, far=math.inf, others=others)
        column_NC = nearest(self._pruning[1], others.projected, number, leave_out)
        image_C = torch.arange(num_images).repeat_interleave(number)
        value_C = self._values(others, image_C, column_NC.view(-1).clamp(min=0))
        value_NC = value_C.view(column_NC.shape).masked_fill_(column_NC < 0, FAR)
        return value_NC.kthvalue(num_neighbors, 1).values

    def _values(self, others: _Others, image_C: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        products_C = pair_products(self._images_ND, others.images_TD, image_C, column_C)
        return others.squares_T[column_C].sub_(products_C, alpha=2)

    def _counts(self, others: _Others, image_C: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        counts_C = torch.ones(len(image_C), dtype=torch.bool)
        if self._own_rows_N is not None:
            counts_C &= self._own_rows_N[image_C] != others.rows_T[column_C]
        if self._only_labels_N is not None:
            counts_C &= self._only_labels_N[image_C] == others.labels_T[column_C]
        return counts_C

    def neighbors(self) -> Neighbors:
        """Give the nearest of all that were met."""
        own_N1 = self._squares_N[:, None]
        distances_NJ = torch.where(self._best_NJ == FAR, FAR, self._best_NJ + own_N1)
        no_keys_NJ = np.full(distances_NJ.shape, "", object)
        return Neighbors(distances_NJ.cpu().numpy(), self._rows_NJ.numpy(), self._labels_NJ.numpy(), no_keys_NJ)

    def _leave_out(self, values_NT: torch.Tensor, far: float, others: _Others) -> None:
        if self._own_rows_N is not None:
            order_T = others.rows_T.argsort()
            sorted_T = others.rows_T[order_T]
            place_N = torch.searchsorted(sorted_T, self._own_rows_N).clamp_(max=len(sorted_T) - 1)
            is_here_N = sorted_T[place_N] == self._own_rows_N
            here, there = is_here_N.nonzero()[:, 0], order_T[place_N[is_here_N]]
            values_NT[here.to(values_NT.device), there.to(values_NT.device)] = far
        if self._only_labels_N is not None:
            is_other_NT = self._only_labels_N[:, None] != others.labels_T[None, :]
            values_NT[:, : len(others.rows_T)].masked_fill_(is_other_NT.to(values_NT.device), far)

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
