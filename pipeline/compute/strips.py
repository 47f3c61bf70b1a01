"""Blocks of training images, made ready for a search.

Input: a block of training images, in the order of the listing. Output: the same images in strips, as whole numbers.
Invariant: every strip has images of all lengths, the shortest first, so that images of a group are nearly of one
length, and of equal lengths in the order of the listing; and the first strip is from all over the block.

Axes: T training images of a block, D values of an image, P axes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from pipeline.compute.products import squares, to_whole
from pipeline.compute.pruning import Projected, Projection, stack
from pipeline.compute.rounded import Scale, choose_scale, padded
from pipeline.compute.threads import Threads

# Images of a strip, at most.
STRIP = 4096
# Images of a group.
GROUP = 32
# Images, and values, that become float32 at once.
_CHUNK_IMAGES, _FLOAT_VALUES = 512, 2**20


@dataclass(frozen=True)
class TrainBlock:
    """Some training images.

    Attributes:
        images_TD: uint8, or features, on the device that searches.
        rows_T: Their rows in the listing, int64, on the CPU.
        labels_T: int64, on the CPU.
    """

    images_TD: torch.Tensor
    rows_T: torch.Tensor
    labels_T: torch.Tensor


@dataclass
class Others:
    """Some training images, with squares; projected, where that leaves most out.

    They are as `to_whole` gives them, or uint8 and `padded` for products that are rounded.
    """

    images_TD: torch.Tensor
    squares_T: torch.Tensor
    rows_T: torch.Tensor
    labels_T: torch.Tensor
    projected: Projected | None = None

    def __getitem__(self, columns: slice) -> Others:
        return replace(self, **{name: values[columns] for name, values in vars(self).items() if values is not None})


@dataclass
class Strips:
    """A block in strips.

    Attributes:
        others: Its images, strip by strip.
        bounds: Where strips begin, and where the last one ends.
        by_row_T: Places of these images, by their rows, int64, on the CPU.
        scales: For products that are rounded, by where a strip begins; of none where images are no pixels.
    """

    others: Others
    bounds: list[int]
    by_row_T: torch.Tensor
    scales: dict[int, Scale]


def make_strips(block: TrainBlock, projection: Projection | None, threads: Threads, *, keeps_pixels: bool) -> Strips:
    """Get a block ready.

    Args:
        block: At least one image.
        projection: By which most are left out; None where all are compared.
        threads: They share it, on a CPU.
        keeps_pixels: Whether they stay uint8, for products that are rounded.
    """
    num_images, num_values = block.images_TD.shape
    squares_T = torch.empty(num_images, dtype=torch.int64, device=block.images_TD.device)
    step = max(1, min(_CHUNK_IMAGES, _FLOAT_VALUES // num_values))
    chunks = [slice(start, start + step) for start in range(0, num_images, step)]

    def measure(rows: slice) -> None:
        squares_T[rows] = squares(to_whole(block.images_TD[rows]))

    threads.run(measure, chunks)
    bounds, order_T = _deal(squares_T)
    whole = block.images_TD[:1] if keeps_pixels else to_whole(block.images_TD[:1])
    width = padded(num_values) if keeps_pixels else num_values
    images_TD = block.images_TD.new_empty(num_images, width, dtype=whole.dtype)
    images_TD[:, num_values:] = 0
    projected: dict[int, Projected] = {}

    def put_in_order(rows: slice) -> None:
        given_TD = block.images_TD.index_select(0, order_T[rows])  # several times as fast as by []
        images_TD[rows, :num_values] = given_TD if keeps_pixels else to_whole(given_TD)
        if projection is not None:
            projected[rows.start] = projection.apply(given_TD)

    threads.run(put_in_order, chunks)
    stacked = stack([projected[rows.start] for rows in chunks]) if projection else None
    squares_T, order_T = squares_T[order_T], order_T.cpu()
    others = Others(images_TD, squares_T, block.rows_T[order_T], block.labels_T[order_T], stacked)
    scales = {}
    if keeps_pixels:
        scales = {first: choose_scale(squares_T[first:stop], num_values) for first, stop in itertools.pairwise(bounds)}
    return Strips(others, bounds, others.rows_T.argsort(), scales)


def _deal(lengths_T: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Deal images to strips; return the bounds of these, and the images' order."""
    # Strips of whole groups; what is left is one of its own.
    num_images = len(lengths_T)
    size = -(-num_images // (-(-num_images // STRIP) * GROUP)) * GROUP
    bounds = sorted({*range(0, num_images, size), num_images - num_images % GROUP, num_images})
    places = [torch.arange(0.5, stop - start) / (stop - start) for start, stop in itertools.pairwise(bounds)]
    order_T = torch.empty_like(lengths_T)
    order_T[torch.cat(places).argsort()] = lengths_T.argsort(stable=True)
    return bounds, order_T
