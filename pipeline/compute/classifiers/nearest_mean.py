"""Class means and the distances of images to them: the nearest-mean classifiers.

Input: uint8 images, one row an image, and labels. Output: exact integer sums, float32 means and distances.
Invariant: distances of an image depend on that image and the means alone.

Axes: N images, K classes, D values of one image (H·W·C). Pixels are 0 to 255, distances on pixels divided by 255.
Images of a floating type are features, of which `compute.features` says how they are added and compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.compute import features
from pipeline.compute.threads import Threads

if TYPE_CHECKING:
    from pipeline.compute.block import Block

# Sums of uint8 in float32 are exact up to 2^24, which 65,793 rows of 255 reach; fewer stay in the cache.
_SUM_ROWS, _SUM_COLUMNS = 1024, 1024
# The differences of a block should nearly stay in a core's cache; smaller ones cost more in calls than they save.
# A GPU wants enough work for all its processors.
_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}
# Images that a thread takes at once.
_MAX_TASK_IMAGES, _TASK_BYTES = 256, 2**23
# Of a product in float64: 255 · 2^31 · 512 is below 2^53.
_PRODUCT_COLUMNS, _PRODUCT_CLASSES = 512, 256
_MIN_SQUARE = 2.0**-48


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
    if images_ND.is_floating_point():
        features.add_class_sums(sums_KD, images_ND, labels_N)
        return torch.bincount(labels_N, minlength=len(sums_KD))
    for block_ND, block_labels_N in zip(images_ND.split(_SUM_ROWS), labels_N.split(_SUM_ROWS), strict=True):
        # Only of the classes that there are: a shard of neighbours has few of many.
        present_k, places_N = block_labels_N.unique(return_inverse=True)
        for some_Kd, pixels_Nd in zip(sums_KD.split(_SUM_COLUMNS, 1), block_ND.split(_SUM_COLUMNS, 1), strict=True):
            block_kd = torch.zeros(len(present_k), some_Kd.shape[1], device=sums_KD.device)
            some_Kd[present_k] += block_kd.index_add_(0, places_N, pixels_Nd.float()).long()
    return torch.bincount(labels_N, minlength=len(sums_KD))


def sum_squares(images_ND: torch.Tensor) -> int:
    """Add up the squares of all pixels, 0 to 255 each, exactly: whole numbers in float64, far below 2^53."""
    if images_ND.is_floating_point():
        return features.sum_squares(images_ND)
    blocks = images_ND.split(_SUM_ROWS)
    return sum(int(block_ND.float().square_().sum(dtype=torch.float64)) for block_ND in blocks)


def class_means(sums_KD: torch.Tensor, counts_K: torch.Tensor, unit: int = 255) -> torch.Tensor:
    """Divide sums by counts: the "ideal" image of each class.

    Args:
        sums_KD: int64, of pixels 0 to 255.
        counts_K: int64, at least 1.
        unit: The value of a sum that stands for 1.

    Returns:
        float32 [K, D], 0 to 1; of features, their means.
    """
    means_KD = torch.empty(sums_KD.shape, device=sums_KD.device)
    for mean_D, sum_D, count in zip(means_KD, sums_KD, counts_K.tolist(), strict=True):
        mean_D.copy_(sum_D.double().div_(unit * count if count else math.nan))  # class by class, to take little memory
    return means_KD


def distances(
    images_ND: torch.Tensor, means_KD: torch.Tensor, threads: Threads | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the distances of every image to every class mean: `l1` by broadcasting, `rms` by products.

    With two classes, comparing these is the pixel-similarity baseline of "Deep Learning for Coders with fastai and
    PyTorch", chapter 4.

    Args:
        images_ND: uint8, 0 to 255.
        means_KD: float32, 0 to 1.
        threads: They share the blocks, on the CPU.

    Returns:
        The mean absolute difference and the root of the mean squared one, each float32 [N, K], 0 to 1; of features the
        Euclidean and the cosine distance.
    """
    if images_ND.is_floating_point():
        return features.distances(images_ND, means_KD)
    num_images, num_values = images_ND.shape
    num_classes = len(means_KD)
    l1_NK = torch.empty(num_images, num_classes, device=images_ND.device)
    rms_NK = torch.empty_like(l1_NK)
    block_values = _BLOCK_BYTES[images_ND.device.type] // 4
    class_block = max(1, min(num_classes, block_values // num_values))
    image_block = max(1, min(num_images, block_values // (class_block * num_values)))
    task_images = max(image_block, min(_MAX_TASK_IMAGES, _TASK_BYTES // (4 * num_values)))

    def fill(start: int) -> None:
        pixels_ND = images_ND[start : start + task_images].float().div_(255)
        buffer_NKD = torch.empty(image_block, class_block, num_values, device=images_ND.device)
        # Some means stay in the cache while all images of the task pass.
        for first in range(0, num_classes, class_block):
            means_kD = means_KD[first : first + class_block]
            for row in range(0, len(pixels_ND), image_block):
                some_nD = pixels_ND[row : row + image_block]
                # [n, 1, D] - [1, k, D] -> [n, k, D]
                differences_nkD = buffer_NKD[: len(some_nD), : len(means_kD)]
                torch.sub(some_nD[:, None, :], means_kD[None, :, :], out=differences_nkD)
                own_nk = l1_NK[start + row : start + row + len(some_nD), first : first + class_block]
                torch.mean(differences_nkD.abs_(), 2, out=own_nk)
        rms_NK[start : start + task_images] = _rms(images_ND[start : start + task_images], means_KD)

    shared = threads if threads is not None and images_ND.device.type == "cpu" else Threads()
    shared.run(fill, range(0, num_images, task_images))
    return l1_NK, rms_NK


def _rms(images_ND: torch.Tensor, means_KD: torch.Tensor) -> torch.Tensor:
    """Compute the root of the mean squared difference, float32 [N, K], as Σx² - 2 Σxm + Σm² by products.

    With means as whole multiples of 2^-31, products of some columns are whole numbers below 2^53, which float64 adds
    exactly in any order: so an image's distances do not depend on which images and classes are beside it. Columns are
    then added block after block.
    """
    num_values = images_ND.shape[1]
    products_NK = torch.zeros(len(images_ND), len(means_KD), dtype=torch.float64, device=images_ND.device)
    squares_N, squares_K = products_NK.new_zeros(len(images_ND)), products_NK.new_zeros(len(means_KD))
    for start in range(0, num_values, _PRODUCT_COLUMNS):
        columns = slice(start, start + _PRODUCT_COLUMNS)
        pixels_Nd = images_ND[:, columns].double()
        squares_N += pixels_Nd.square().sum(1)
        for first in range(0, len(means_KD), _PRODUCT_CLASSES):
            classes = slice(first, first + _PRODUCT_CLASSES)
            means_kd = means_KD[classes, columns].double().mul_(2**31).round_()
            products_NK[:, classes] += pixels_Nd @ means_kd.T
            squares_K[classes] += means_kd.mul_(2.0**-31).square_().sum(1)
    squared_NK = products_NK.mul_(-2 / (255 * 2.0**31)).add_((squares_N / 255**2)[:, None]).add_(squares_K)
    squared_NK /= num_values
    # What is left of equal images: means are rounded to float32, and so is not seen.
    squared_NK[squared_NK < _MIN_SQUARE] = 0
    return squared_NK.sqrt_().float()


def score_first(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the first of the two `distances` to each class mean; see `classifiers.Scorer`."""
    distances_NK, _ = block.distances
    return distances_NK, nearest(distances_NK)


def score_second(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the second of the two `distances` to each class mean; see `classifiers.Scorer`."""
    _, distances_NK = block.distances
    return distances_NK, nearest(distances_NK)


def nearest(distances_NK: torch.Tensor) -> torch.Tensor:
    """Choose the class of the smallest distance, the first one on a tie; int64 [N]."""
    return distances_NK.argmin(1)
