"""The nearest training images of other images, exactly, by squared distances of their pixels.

Input: images that are searched for, and blocks of training images. Output: for each the J nearest, by distance and
then by row of the listing. Invariant: the answer depends on the images alone: distances are whole numbers, and how
training images are cut into blocks, and blocks spread over actors, changes nothing.

Axes: N images that are searched for, T training images of a block, J neighbors, D values of an image, G groups of W
neighboring columns of a block. Distances are squared, in pixels of 0 to 255 or units of `features.LENGTH`, int64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from pipeline.compute import rounded
from pipeline.compute.neighbors import FAR, Neighbors, stack
from pipeline.compute.products import has_fast_int8, pair_products, products, squares, to_whole
from pipeline.compute.pruning import MIN_VALUES, Projected, Projection, find_pairs, has_axes, nearest
from pipeline.compute.strips import GROUP, STRIP, Others, Strips, TrainBlock, make_strips
from pipeline.compute.threads import Threads

# Places of images, distances less their own squares, and rows and labels of training images, on the CPU.
_Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Images that are searched for at once; where most training images are left out by projections, fewer, so that the
# nearest are found sooner.
_TILE_IMAGES, _PRUNED_TILE_IMAGES = 512, 256
# Products of all that are made at once, in memory that every thread keeps; a GPU does more in one call.
_PRODUCTS = {"cpu": 2**20, "cuda": 2**21}
# The product of what is left out: a distance that is made of it is larger than all others, and has room in the type.
_LOWEST = {torch.int32: -3 * 2**28, torch.int64: -(2**60)}
# Candidates that are looked at, and that wait to be merged, at a time: where many images are near, many are candidates.
_MAX_WAITING = 2**17
# For fewer images axes are not worth finding.
_MIN_PRUNED = 512
# The first J are looked for by more trials than J.
_MORE_PROBES = 7


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
        images_ND: uint8, or features.
        blocks: The training images, each in one block.
        num_neighbors: J.
        threads: They share the images, on a CPU; None for the caller alone.
        own_rows_N: The rows of these images themselves, int64, where they are training images: none is its own
            neighbor.
        only_labels_N: The classes among whose images alone each is searched for, int64.

    Returns:
        N rows, without keys.
    """
    is_on_cpu = images_ND.device.type == "cpu"
    shared = threads if threads and is_on_cpu else Threads()
    # Features are compared by products of float64. Of pixels most pairs are left out: by rounded products, where there
    # are instructions for these, and else by projections.
    is_fast = images_ND.is_floating_point() or has_fast_int8(images_ND.device)
    can_prune = is_on_cpu and not is_fast and len(images_ND) >= _MIN_PRUNED and images_ND.shape[1] >= MIN_VALUES
    is_rounded = (
        is_on_cpu and is_fast and not images_ND.is_floating_point() and only_labels_N is None
        and images_ND.shape[1] <= rounded.MAX_VALUES and rounded.works()
    )  # fmt: skip
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
    if is_rounded:
        shared.run(_Tile.pack, tiles)
    scratches: list[torch.Tensor] = []
    for number, block in enumerate(blocks):
        if number == 0 and can_prune and has_axes(block.images_TD):
            projection = Projection(block.images_TD)
            shared.run(partial(_Tile.project, projection=projection), tiles)
        is_pruned = any(tile.prunes(number) for tile in tiles)
        prepared = make_strips(block, projection if is_pruned else None, shared, keeps_pixels=is_rounded)
        shared.run(partial(_Tile.take, block=prepared, number=number, scratches=scratches), tiles)
    shared.run(_Tile.merge, tiles)
    empty = np.zeros((0, num_neighbors))
    none = Neighbors(empty.astype(np.int64), empty.astype(np.int64), empty.astype(np.int64), empty.astype(object))
    return stack([none, *(tile.neighbors() for tile in tiles)])


def _true_places(are_true_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of what is true, in order."""
    if are_true_NT.device.type != "cpu":
        row_C, column_C = are_true_NT.nonzero(as_tuple=True)
        return row_C, column_C
    # NumPy does it at several times torch's speed.
    place_C = torch.from_numpy(np.flatnonzero(are_true_NT.numpy()))
    row_C = place_C // max(1, are_true_NT.shape[1])
    return row_C, place_C - row_C * are_true_NT.shape[1]


def _limits(farthest_NG: torch.Tensor, lasts_G: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Say how far the J nearest are at most, and of those as far how late in the listing, int64 [N].

    Each group has an image that is as far as this at most, and no later than its last one: J groups have J such images.
    """
    limit_N = farthest_NG.topk(number, 1, largest=False).values.amax(1)
    is_nearer_NG, is_as_far_NG = farthest_NG < limit_N[:, None], farthest_NG == limit_N[:, None]
    row_NG = torch.where(is_as_far_NG, lasts_G.to(farthest_NG.device), FAR).masked_fill_(is_nearer_NG, -1)
    return limit_N.long(), row_NG.topk(number, 1, largest=False).values.amax(1)


def _sort(*keys: torch.Tensor) -> torch.Tensor:
    """Return the order by the first key, then by the next; all int64 [C]."""
    lows = [int(key_C.min()) if len(key_C) else 0 for key_C in keys]
    sizes = [int(key_C.max()) - low + 1 if len(key_C) else 1 for key_C, low in zip(keys, lows, strict=True)]
    if math.prod(sizes) > FAR:
        return torch.from_numpy(np.lexsort([key_C.numpy() for key_C in reversed(keys)]))
    # One key of all takes a fifth of the time.
    joint_C = torch.zeros_like(keys[0])
    for key_C, low, size in zip(keys, lows, sizes, strict=True):
        joint_C.mul_(size).add_(key_C - low)
    return torch.from_numpy(np.argsort(joint_C.numpy()))


def _count(pairs: Iterable[Sequence[torch.Tensor]]) -> int:
    return sum(len(columns[0]) for columns in pairs)


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
        self._packed: rounded.Packed | None = None
        self._own_rows_N = own_rows_N
        self._own_places_N = torch.zeros(0, dtype=torch.int64)  # in a block; -1 where they are in another one
        self._only_labels_N = only_labels_N
        shape = len(images_ND), num_neighbors
        self._best_NJ = torch.full(shape, FAR, dtype=torch.int64, device=images_ND.device)
        self._rows_NJ = torch.full(shape, FAR, dtype=torch.int64)
        self._labels_NJ = torch.full(shape, -1, dtype=torch.int64)
        # Candidates that are not merged yet; how many training images were met, now and when they were merged last.
        self._waiting: list[_Pairs] = []
        # Pairs of images and of columns of a block that can count, and are not compared yet.
        self._unsure: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_met = self._num_merged = 0
        # Not where they let too many pass, until nearer ones are known.
        self._uses_rounded = True

    def project(self, projection: Projection) -> None:
        """Get ready to leave most images out by their projections."""
        self._pruning = projection, projection.apply(self._pixels_ND).as_searched()

    def pack(self) -> None:
        """Get ready to leave most images out by rounded products: as wide as strips that keep pixels are."""
        num_values = self._images_ND.shape[1]
        self._images_ND = torch.nn.functional.pad(self._images_ND, (0, rounded.padded(num_values) - num_values))
        self._packed = rounded.pack(self._images_ND)

    def prunes(self, number: int) -> bool:
        """Whether it tries to leave most images of a block out, by the block's number."""
        return self._pruning is not None and number >= self._next_pruned

    def take(self, block: Strips, number: int, scratches: list[torch.Tensor]) -> None:
        """Meet the images of a block, by its number, with memory that is taken from others, and put back for others."""
        bounds = block.bounds
        if self._own_rows_N is not None:
            rows_T = block.others.rows_T[block.by_row_T]
            place_N = torch.searchsorted(rows_T, self._own_rows_N).clamp_(max=len(rows_T) - 1)
            self._own_places_N = torch.where(rows_T[place_N] == self._own_rows_N, block.by_row_T[place_N], -1)
        done = self._take_near(block, number) if self.prunes(number) else 0
        most = max(STRIP, _PRODUCTS[self._images_ND.device.type])
        try:
            scratch = scratches.pop()
        except IndexError:  # all are in use by other threads
            scratch = self._images_ND.new_empty(most, dtype=torch.int32)
        for start, stop in itertools.pairwise(bound for bound in bounds if bound >= done):
            others = block.others[start:stop]
            if pairs := self._find_rounded(others, block.scales.get(start)):
                self._unsure.append((pairs[0], pairs[1].add_(start)))
            else:
                for found in self._compare_all(others, start, scratch):
                    self._waiting.append(found)
                    if _count(self._waiting) > _MAX_WAITING:
                        self.merge()
            self._num_met += stop - start
            is_end = stop == bounds[-1]
            # Bounds by the nearest of half of what was met let about as many pass as those of all.
            is_due = self._num_met >= (1.5 if is_end else 2) * self._num_merged
            if is_end or is_due or _count(self._unsure) > _MAX_WAITING:
                self._settle(block.others)
            if is_due or _count(self._waiting) > _MAX_WAITING:
                self.merge()
        scratches.append(scratch)

    def _take_near(self, block: Strips, number: int) -> int:
        """Meet those that can count by their projections, until comparing all is faster; return how many are done."""
        done, end = 0, block.bounds[-1]
        is_bound = bool((self._best_NJ[:, -1] != FAR).all())
        while done < end:
            # The nearest of the first ones bound as many more, and so on.
            stop = end if is_bound else next(bound for bound in block.bounds if bound >= min(max(2 * done, 1), end))
            found = self._find_pairs(block.others[done:stop], done)
            if found is None:
                # Later ones, when the nearest so far are nearer, may be worth another trial.
                self._next_pruned = 4 * (number + 1)
                break
            self._waiting.append(found)
            self._num_met += stop - done
            self.merge()
            done = stop
        return done

    def _compare_all(self, others: Others, start: int, scratch: torch.Tensor) -> Iterator[_Pairs]:
        """Choose all that can be among the J nearest, by distance and then by row, and few others."""
        step = max(1, len(scratch) // len(others.rows_T))
        for first in range(0, len(self._images_ND), step):
            yield from self._compare(slice(first, first + step), others, start, scratch)

    def _compare(self, rows: slice, others: Others, start: int, scratch: torch.Tensor) -> Iterator[_Pairs]:
        """Choose them for some images.

        The longest product of a group, and its shortest image, say how near its images can be at best; and its longest
        image how far the one of that product is at most.
        """
        limit_N, last_row_N = self._best_NJ[rows, -1], self._rows_NJ[rows, -1].to(self._best_NJ.device)
        num_images, num_neighbors = len(limit_N), self._best_NJ.shape[1]
        num_columns = len(others.rows_T)
        width = GROUP
        while width > 1 and num_columns < 2 * num_neighbors * width:
            width //= 2
        products_NT = products(self._images_ND[rows], others.images_TD, scratch)
        dtype = torch.int64 if products_NT.dtype == torch.int64 else torch.int32
        self._leave_out(products_NT, _LOWEST[dtype], others.labels_T, start, rows)
        squares_T, rows_T = others.squares_T.to(dtype), others.rows_T
        if more := -num_columns % width:
            products_NT = torch.nn.functional.pad(products_NT, (0, more), value=_LOWEST[dtype])
            squares_T, rows_T = (torch.cat([each_T, each_T[-1:].expand(more)]) for each_T in (squares_T, rows_T))
        products_NGW, squares_GW = products_NT.view(num_images, -1, width), squares_T.view(-1, width)
        largest_NG = products_NGW.amax(2).to(dtype)
        if num_neighbors <= len(squares_GW) and bool((limit_N == FAR).any()):
            farthest_NG = torch.sub(squares_GW.amax(1), largest_NG, alpha=2)
            nearer_N, row_N = _limits(farthest_NG, rows_T.view(-1, width).amax(1), num_neighbors)
            last_row_N = torch.where(nearer_N < limit_N, row_N, last_row_N)
            limit_N = limit_N.minimum(nearer_N)
        # What is left out is farther, whatever is known of others.
        limit_N1 = limit_N.clamp(max=-2 * _LOWEST[dtype] - 1).to(dtype)[:, None]
        nearest_NG = torch.sub(squares_GW.amin(1), largest_NG, alpha=2)
        # Of equally near images those that are listed first count: a group that begins behind the J-th nearest so far
        # counts only if it is nearer.
        is_later_NG = rows_T.view(-1, width).amin(1).to(nearest_NG.device) > last_row_N[:, None]
        image_P, group_P = _true_places(nearest_NG.add_(is_later_NG) <= limit_N1)
        for first in range(0, len(image_P), _MAX_WAITING // width):
            some = slice(first, first + _MAX_WAITING // width)
            image_S, group_S = image_P[some], group_P[some]
            values_SW = squares_GW[group_S].sub_(products_NGW[image_S, group_S].to(dtype), alpha=2)
            place_C, offset_C = _true_places(values_SW <= limit_N1[image_S])
            column_C = (group_S[place_C] * width + offset_C).cpu()
            image_C, value_C = image_S[place_C].cpu().add_(rows.start), values_SW[place_C, offset_C].long().cpu()
            yield image_C, value_C, others.rows_T[column_C], others.labels_T[column_C]

    def _find_rounded(self, others: Others, scale: rounded.Scale | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find all pairs that can count by rounded products; None where all are to be compared."""
        limit_N = self._best_NJ[:, -1]
        if self._packed is None or scale is None or not self._uses_rounded:
            return None
        if bool((limit_N == FAR).any()):  # without limits all would pass
            return None
        pairs = rounded.find_pairs(self._packed, limit_N, others.images_TD, scale)
        self._uses_rounded = pairs is not None
        return pairs

    def _settle(self, others: Others) -> None:
        """Compare the pairs that can count, of some training images, and forget them."""
        if self._unsure:
            image_C, column_C = (torch.cat(places) for places in zip(*self._unsure, strict=True))
            self._unsure.clear()
            order_C = _sort(image_C)
            image_C, column_C = image_C[order_C], column_C[order_C]
            counts_C = self._counts(others, image_C, column_C)
            self._waiting.append(self._choose(others, image_C[counts_C], column_C[counts_C], self._best_NJ[:, -1]))

    def _find_pairs(self, others: Others, start: int) -> _Pairs | None:
        """Find all pairs that can count by their projections, and compare these; None where they are too many."""
        assert self._pruning is not None
        assert others.projected is not None
        projection, searched = self._pruning
        bound_N = self._best_NJ[:, -1]
        if bool((bound_N == FAR).any()):
            bound_N = bound_N.minimum(self._probe(others[:STRIP], start))
        if bool((bound_N == FAR).any()):
            return None
        longest = float(others.projected.squares_N.max())
        limit_N = projection.limits(searched, longest, (bound_N + self._squares_N).double())
        is_any = self._own_rows_N is None and self._only_labels_N is None
        choose = None if is_any else partial(self._counts, others)
        pairs = find_pairs(searched, others.projected, limit_N, choose)
        if pairs is None:
            return None
        return self._choose(others, *pairs, bound_N)

    def _choose(self, others: Others, image_C: torch.Tensor, column_C: torch.Tensor, bound_N: torch.Tensor) -> _Pairs:
        """Compare pairs, by images that ascend, and choose those that are as near as bounds."""
        value_C = self._values(others, image_C, column_C)
        is_near_C = value_C <= bound_N[image_C]
        image_C, column_C, value_C = image_C[is_near_C], column_C[is_near_C], value_C[is_near_C]
        return image_C, value_C, others.rows_T[column_C], others.labels_T[column_C]

    def _probe(self, others: Others, start: int) -> torch.Tensor:
        """Compare those that seem nearest: the J-th nearest one of all is no farther than theirs, int64 [N]."""
        assert self._pruning is not None
        assert others.projected is not None
        num_images, num_neighbors = self._best_NJ.shape
        number = min(num_neighbors + _MORE_PROBES, len(others.rows_T))
        if number < num_neighbors:
            return torch.full((num_images,), FAR)
        leave_out = partial(self._leave_out, far=math.inf, labels_T=others.labels_T, start=start)
        column_NC = nearest(self._pruning[1], others.projected, number, leave_out)
        image_C = torch.arange(num_images).repeat_interleave(number)
        value_C = self._values(others, image_C, column_NC.view(-1).clamp(min=0))
        value_NC = value_C.view(column_NC.shape).masked_fill_(column_NC < 0, FAR)
        return value_NC.kthvalue(num_neighbors, 1).values

    def _values(self, others: Others, image_C: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        products_C = pair_products(self._images_ND, others.images_TD, image_C, column_C)
        return others.squares_T[column_C].sub_(products_C, alpha=2)

    def _counts(self, others: Others, image_C: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
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

    def _leave_out(
        self, values_NT: torch.Tensor, far: float, labels_T: torch.Tensor, start: int, rows: slice = slice(None)
    ) -> None:
        if self._own_rows_N is not None:
            place_N = self._own_places_N[rows] - start
            here = ((place_N >= 0) & (place_N < len(labels_T))).nonzero()[:, 0]
            values_NT[here.to(values_NT.device), place_N[here].to(values_NT.device)] = far
        if self._only_labels_N is not None:
            is_other_NT = self._only_labels_N[rows, None] != labels_T[None, :]
            values_NT.masked_fill_(is_other_NT.to(values_NT.device), far)

    def merge(self) -> None:
        """Choose the nearest among candidates and what was nearest so far."""
        self._num_merged, self._uses_rounded = self._num_met, True
        best_NJ = self._best_NJ.cpu()
        image_C, place_C = _true_places(best_NJ != FAR)
        so_far = image_C, best_NJ[image_C, place_C], self._rows_NJ[image_C, place_C], self._labels_NJ[image_C, place_C]
        image_C, value_C, row_C, label_C = (torch.cat(each) for each in zip(so_far, *self._waiting, strict=True))
        self._waiting.clear()
        order_C = _sort(image_C, value_C, row_C)
        image_C = image_C[order_C]
        rank_C = torch.arange(len(order_C)) - torch.searchsorted(image_C, torch.arange(len(best_NJ)))[image_C]
        is_kept_C = rank_C < best_NJ.shape[1]
        order_C, places = order_C[is_kept_C], (image_C[is_kept_C], rank_C[is_kept_C])
        best_NJ[places] = value_C[order_C]
        self._rows_NJ[places], self._labels_NJ[places] = row_C[order_C], label_C[order_C]
        self._best_NJ = best_NJ.to(self._best_NJ.device)
