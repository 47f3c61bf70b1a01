"""Class means and the distances of images to them: the nearest-mean classifiers.

Input: uint8 images, one row an image, and labels. Output: exact integer sums, float32 means and distances.
Invariant: distances of an image depend on that image and the means alone.

Axes: N images, K classes, D values of one image (H·W·C). Pixels are 0 to 255, distances on pixels divided by 255.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.compute.threads import Threads

if TYPE_CHECKING:
    from pipeline.compute.block import Block

# Sums of uint8 in float32 are exact up to 2^24, which 65,793 rows of 255 reach; fewer stay in the cache.
_SUM_ROWS = 1024
# The differences of a block should stay in a core's cache, but be so many that threads seldom wait for their turn in
# Python; a GPU wants work enough for all its processors.
_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}


def class_sums(images_ND: torch.Tensor, labels_N: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the images of each class, exactly.

    Blocks are added in float32, while their sums are whole numbers below 2^24, then in int64: the order of additions,
    which a GPU leaves open, cannot matter.

    Args:
        images_ND: uint8, 0 to 255.
        labels_N: int64, 0 to K - 1.
        num_classes: K.

    Returns:
        Sums [K, D] and counts [K], both int64.
    """
    sums_KD = torch.zeros(num_classes, images_ND.shape[1], dtype=torch.int64, device=images_ND.device)
    return sums_KD, add_class_sums(sums_KD, images_ND, labels_N)


def add_class_sums(sums_KD: torch.Tensor, images_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Do as `class_sums`, adding to sums that there are; return the counts of these images, int64 [K]."""
    for block_ND, block_labels_N in zip(images_ND.split(_SUM_ROWS), labels_N.split(_SUM_ROWS), strict=True):
        # Only of the classes that there are: a shard of neighbours has few of many.
        present_k, places_N = block_labels_N.unique(return_inverse=True)
        block_kD = torch.zeros(len(present_k), sums_KD.shape[1], device=sums_KD.device)
        block_kD.index_add_(0, places_N, block_ND.float())
        sums_KD[present_k] += block_kD.long()
    return torch.bincount(labels_N, minlength=len(sums_KD))


def sum_squares(images_ND: torch.Tensor) -> int:
    """Add up the squares of all pixels, 0 to 255 each, exactly: whole numbers in float64, far below 2^53."""
    blocks = images_ND.split(_SUM_ROWS)
    return sum(int(block_ND.float().square_().sum(dtype=torch.float64)) for block_ND in blocks)


def class_means(sums_KD: torch.Tensor, counts_K: torch.Tensor) -> torch.Tensor:
    """Divide sums by counts: the "ideal" image of each class.

    Args:
        sums_KD: int64, of pixels 0 to 255.
        counts_K: int64, at least 1.

    Returns:
        float32 [K, D], 0 to 1.
    """
    means_KD = torch.empty(sums_KD.shape, device=sums_KD.device)
    for mean_D, sum_D, count in zip(means_KD, sums_KD, counts_K.tolist(), strict=True):
        mean_D.copy_(sum_D.double().div_(255 * count if count else math.nan))  # class by class, to take little memory
    return means_KD


def distances(
    images_ND: torch.Tensor, means_KD: torch.Tensor, threads: Threads | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the distances of every image to every class mean, by broadcasting blocks of images.

    With two classes, comparing these is the pixel-similarity baseline of "Deep Learning for Coders with fastai and
    PyTorch", chapter 4.

    Args:
        images_ND: uint8, 0 to 255.
        means_KD: float32, 0 to 1.
        threads: They share the blocks, on the CPU.

    Returns:
        The mean absolute difference and the root of the mean squared one, each float32 [N, K], 0 to 1.
    """
    num_images, num_values = images_ND.shape
    num_classes = len(means_KD)
    l1_NK = torch.empty(num_images, num_classes, device=images_ND.device)
    rms_NK = torch.empty_like(l1_NK)
    block_values = _BLOCK_BYTES[images_ND.device.type] // 4
    class_block = max(1, min(num_classes, block_values // num_values))
    image_block = max(1, min(num_images, block_values // (class_block * num_values)))

    def fill(start: int) -> None:
        pixels_ND = images_ND[start : start + image_block].float().div_(255)
        rows = slice(start, start + image_block)
        buffer_NKD = torch.empty(len(pixels_ND), class_block, num_values, device=images_ND.device)
        for first in range(0, num_classes, class_block):
            classes = slice(first, first + class_block)
            means_kD = means_KD[classes]
            # [n, 1, D] - [1, k, D] -> [n, k, D]; one buffer for both distances, since |d|² = d².
            differences_NKD = buffer_NKD[:, : len(means_kD)]
            torch.sub(pixels_ND[:, None, :], means_kD[None, :, :], out=differences_NKD)
            l1_NK[rows, classes] = differences_NKD.abs_().mean(2)
            rms_NK[rows, classes] = differences_NKD.square_().mean(2).sqrt_()

    shared = threads if threads is not None and images_ND.device.type == "cpu" else Threads()
    shared.run(fill, range(0, num_images, image_block))
    return l1_NK, rms_NK


def score_l1(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the mean absolute difference to each class mean; see `classifiers.Scorer`."""
    l1_NK, _ = block.distances
    return l1_NK, nearest(l1_NK)


def score_rms(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the root of the mean squared difference to each class mean; see `classifiers.Scorer`."""
    _, rms_NK = block.distances
    return rms_NK, nearest(rms_NK)


def nearest(distances_NK: torch.Tensor) -> torch.Tensor:
    """Choose the class of the smallest distance, the first one on a tie; int64 [N]."""
    return distances_NK.argmin(1)
