"""Near-duplicates: validation images that are a training image once more, changed a little.

Input: images that are searched for, blocks of training images, and the plain neighbors. Output: for each the training
image that is most likely the same, with its distance. Invariant: whole numbers alone, and of several actors' candidates
as many as one actor has of all images, so that nothing depends on devices, blocks or actors.

A training image that was moved by a pixel can be farther, pixel by pixel, than strangers. So images are compared by
signatures as well: a coarse grid around their centre of mass, which a move does not change. What is near by its
signature is compared pixel by pixel, moved by up to one pixel each way.

Axes: N images, T training images of a block, C candidates, J neighbors, S values of a signature; H, W, c of an image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.neighbors import FAR, Neighbors, stack
from pipeline.compute.search import search
from pipeline.compute.strips import TrainBlock
from pipeline.compute.threads import Threads

# Images, and values of them, that are looked at at once.
_BLOCK_IMAGES, _BLOCK_VALUES = 256, 2**21
# Cells of a signature's grid, each way.
_GRID = 8
# What differs from the background by less is noise.
_NOISE = 16
# The nearest by signature that are compared pixel by pixel.
_NUM_CANDIDATES = 3
# A twin is at half of the J-th neighbor's distance at most; what the signature, which is coarse, says of it is less.
_MAX_RATIO = 0.6
# By how many pixels a twin may be moved, each way.
_MAX_MOVE = 1


@dataclass
class Candidates:
    """The training images that are nearest by signature.

    Attributes:
        near: These, with the distances of signatures.
        distances_NC: Pixel by pixel, as they are or moved by up to a pixel, int64; `FAR` where they cannot be near.
        num_cells: S.
    """

    near: Neighbors
    distances_NC: npt.NDArray[np.int64]
    num_cells: int


def find_candidates(
    images_ND: torch.Tensor,
    plain: Neighbors,
    shape: tuple[int, int, int],
    signed: Iterable[TrainBlock],
    take_images: Callable[[npt.NDArray[np.int64]], torch.Tensor],
    threads: Threads | None = None,
) -> Candidates:
    """Find for each image the training images that may be the same, changed a little.

    Args:
        images_ND: uint8.
        plain: Their neighbors by pixels, among the same training images.
        shape: H, W, c of an image.
        signed: The training images, as `sign` gives them.
        take_images: Returns training images, uint8 [C, D], by their rows in the listing.
        threads: They share the images, on a CPU; None for the caller alone.
    """
    searched_NS = signatures(images_ND, shape)
    near = search(searched_NS, signed, _NUM_CANDIDATES, threads)
    num_cells = searched_NS.shape[1]
    image_C, column_C = np.nonzero(_may_be_twins(near, plain, images_ND.shape[1], num_cells))
    distances_NC = np.full_like(near.distances_NJ, FAR)
    rows_C = near.rows_NJ[image_C, column_C]
    step = _block_size(shape)
    for start in range(0, len(image_C), step):
        part = slice(start, start + step)
        chosen_CD = images_ND[torch.from_numpy(image_C[part]).to(images_ND.device)]
        distances_C = _moved_distances(chosen_CD, take_images(rows_C[part]).to(images_ND.device), shape)
        distances_NC[image_C[part], column_C[part]] = distances_C.cpu().numpy()
    return Candidates(near, distances_NC, num_cells)


def choose_twins(found: Sequence[Candidates], plain: Neighbors, num_values: int) -> Neighbors:
    """Choose for each image the training image that is most likely the same, of what several actors found.

    Args:
        found: Of the same images, by actor.
        plain: Their neighbors by pixels, among all training images.
        num_values: D.

    Returns:
        The nearest one, pixel by pixel, as it is or moved by up to a pixel: J is 1.
    """
    near = stack([each.near for each in found], axis=1)
    distances_NC = np.concatenate([each.distances_NC for each in found], axis=1)
    order_NC = np.lexsort((near.rows_NJ, near.distances_NJ), axis=1)[:, :_NUM_CANDIDATES]
    near = near.map(lambda values: np.take_along_axis(values, order_NC, 1))
    distances_NC = np.take_along_axis(distances_NC, order_NC, 1)
    distances_NC[~_may_be_twins(near, plain, num_values, found[0].num_cells)] = FAR
    first = plain.map(lambda values: values[:, :1])
    either = stack([first, replace(near, distances_NJ=distances_NC)], axis=1)
    order_NC = np.lexsort((either.rows_NJ, either.distances_NJ), axis=1)[:, :1]
    return either.map(lambda values: np.take_along_axis(values, order_NC, 1))


def _may_be_twins(near: Neighbors, plain: Neighbors, num_values: int, num_cells: int) -> npt.NDArray[np.bool_]:
    """Say which of the nearest by signature, [N, C], can be near enough pixel by pixel.

    Means of cells are never farther from each other than their pixels; a value is half of one, rounded.
    """
    limit_N1 = plain.distances_NJ[:, -1:]
    cells_NC = np.maximum(0, near.distances_NJ - num_cells)
    is_near_NC = 4.0 * num_values * cells_NC <= _MAX_RATIO**2 * num_cells * limit_N1.astype(np.float64)
    is_there_NC: npt.NDArray[np.bool_] = near.distances_NJ != FAR
    return is_there_NC & is_near_NC


def _moved_distances(images_CD: torch.Tensor, others_CD: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Compute the squared distance of each pair of images, moved as they are nearest, as if of whole images."""
    height, width, _ = shape
    images_CHWc, others_CHWc = (each_CD.view(-1, *shape).short() for each_CD in (images_CD, others_CD))
    moves = range(-_MAX_MOVE, _MAX_MOVE + 1) if min(height, width) > 4 * _MAX_MOVE else (0,)
    distances = []
    for down, across in itertools.product(moves, moves):
        part_CHWc = images_CHWc[:, max(0, down) : height + min(0, down), max(0, across) : width + min(0, across)]
        other_CHWc = others_CHWc[:, max(0, -down) : height + min(0, -down), max(0, -across) : width + min(0, -across)]
        sums_C = (part_CHWc - other_CHWc).float().square_().flatten(1).sum(1, dtype=torch.float64).long()
        num_common = part_CHWc.shape[1] * part_CHWc.shape[2]
        distances.append(sums_C * (height * width) // num_common)
    return torch.stack(distances).amin(0)


def signatures(images_ND: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Reduce images to coarse grids around their centres of mass.

    Args:
        images_ND: uint8.
        shape: H, W, c.

    Returns:
        128 and more or less, uint8 [N, S]: by cell, half the mean difference from the background, which is the median
        of the outermost pixels.
    """
    blocks = [_signatures(block_ND, shape) for block_ND in images_ND.split(_block_size(shape))]
    return torch.cat(blocks) if blocks else images_ND.new_zeros(0, _GRID**2)


def sign(block: TrainBlock, shape: tuple[int, int, int]) -> TrainBlock:
    """Reduce training images to their signatures."""
    return replace(block, images_TD=signatures(block.images_TD, shape))


def _block_size(shape: tuple[int, int, int]) -> int:
    return max(1, min(_BLOCK_IMAGES, _BLOCK_VALUES // math.prod(shape)))


def _signatures(images_ND: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    height, width, channels = shape
    grey_NHW = images_ND.view(-1, height, width, channels)
    grey_NHW = grey_NHW[..., 0] if channels == 1 else (grey_NHW.sum(3, dtype=torch.int32) // channels).to(torch.uint8)
    edge_NE = torch.cat([grey_NHW[:, 0], grey_NHW[:, -1], grey_NHW[:, :, 0], grey_NHW[:, :, -1]], 1)
    background_N11 = edge_NE.median(1).values.short()[:, None, None]
    mass_NHW = (grey_NHW - background_N11).abs_().sub_(_NOISE).clamp_(min=0)
    down_N, across_N = _centre(mass_NHW.sum(2, dtype=torch.int32)), _centre(mass_NHW.sum(1, dtype=torch.int32))
    # Sums of rectangles from the corners of each in a table of sums from the origin (F. Crow, "Summed-area tables for
    # texture mapping", SIGGRAPH 1984).
    table_NHW = grey_NHW.new_zeros(len(grey_NHW), height + 1, width + 1, dtype=torch.int32)
    table_NHW[:, 1:, 1:] = grey_NHW.cumsum(1, dtype=torch.int32).cumsum_(2)
    rows_NG, columns_NG = _edges(down_N, height), _edges(across_N, width)
    corners_NGG = rows_NG[:, :, None] * (width + 1) + columns_NG[:, None, :]
    sums_NGG = table_NHW.flatten(1).gather(1, corners_NGG.flatten(1)).view(corners_NGG.shape).diff(dim=1).diff(dim=2)
    # What lies outside of the image is background.
    areas_NGG = rows_NG.diff(dim=1)[:, :, None] * columns_NG.diff(dim=1)[:, None, :]
    area = -(-height // (rows_NG.shape[1] - 1)) * -(-width // (columns_NG.shape[1] - 1))
    cells_NGG = (sums_NGG - background_N11 * areas_NGG).div_(2 * area, rounding_mode="floor")
    return (cells_NGG + 128).clamp_(0, 255).to(torch.uint8).flatten(1)


def _centre(mass_NX: torch.Tensor) -> torch.Tensor:
    """Return the place of the centre of mass along an axis, rounded, int64 [N]; the middle where there is no mass."""
    num_places = mass_NX.shape[1]
    total_N = mass_NX.sum(1, dtype=torch.int64)
    moment_N = (mass_NX.long() * torch.arange(num_places, device=mass_NX.device)).sum(1)
    centre_N = (2 * moment_N + total_N) // (2 * total_N).clamp(min=1)
    return torch.where(total_N > 0, centre_N, num_places // 2)


def _edges(centre_N: torch.Tensor, num_places: int) -> torch.Tensor:
    """Return where the cells of grids begin and end along an axis, moved with their images, int64 [N, G]."""
    num_cells = min(_GRID, num_places)
    edges_G = torch.arange(num_cells + 1, device=centre_N.device) * num_places // num_cells
    return (edges_G[None] + (centre_N - num_places // 2)[:, None]).clamp_(0, num_places)
