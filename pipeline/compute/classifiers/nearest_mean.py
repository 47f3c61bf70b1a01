"""Class means and the distances of images to them: the nearest-mean classifiers.

Input: uint8 images, one row an image, and labels. Output: exact integer sums, float32 means and distances.
Invariant: distances of an image depend on that image and the means alone.

Axes: N images, K classes, D values of one image (H·W·C), of which n, k and c are some; V values that a pixel can have.
Pixels are 0 to 255, distances on pixels divided by 255. Images of a floating type are features, of which
`compute.features` says how they are added and compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding_bag

from pipeline.compute import features
from pipeline.compute.threads import Threads

if TYPE_CHECKING:
    from pipeline.compute.block import Block

# Sums of uint8 in float32 are exact up to 2^24, which 65,793 rows of 255 reach; fewer stay in the cache.
_SUM_ROWS, _SUM_COLUMNS = 1024, 1024
# The differences of a block should nearly stay in a core's cache; smaller ones cost more in calls than they save.
# A GPU wants enough work for all its processors.
_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}
# Of one sum in float32: more would cost it digits.
_MAX_COLUMNS = 8192
# From so many classes on, a CPU looks differences up; tables of so many columns and classes stay close to its cache.
_MIN_TABLE_CLASSES = 32
_TABLE_COLUMNS, _TABLE_CLASSES = 64, 64
# Images that a thread takes at once.
_MAX_TASK_IMAGES, _TASK_BYTES = 256, 2**23
# Of a product in float64: 255 · 2^31 · 512 is below 2^53.
_PRODUCT_COLUMNS, _PRODUCT_CLASSES, _PRODUCT_IMAGES = 512, 256, 1024
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
    blocks = [each for block_ND in images_ND.split(_SUM_ROWS) for each in block_ND.split(_SUM_COLUMNS, 1)]
    return sum(int(block_Nd.float().square_().sum(dtype=torch.float64)) for block_Nd in blocks)


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
    """Compute the distances of every image to every class mean, equal to those by broadcasting up to rounding.

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
    on_cpu = images_ND.device.type == "cpu"
    shared = threads if threads is not None and on_cpu else Threads()
    l1 = _l1_by_tables if on_cpu and len(means_KD) >= _MIN_TABLE_CLASSES else _l1
    return l1(images_ND, means_KD, shared), _rms(images_ND, means_KD, shared)


def _l1_by_tables(images_ND: torch.Tensor, means_KD: torch.Tensor, threads: Threads) -> torch.Tensor:
    """Compute the mean absolute difference, float32 [N, K], from tables of what each of 256 values differs by.

    A table costs about as much as 256 images, and what is left of an image is to add up rows of it: of 2,000 images and
    64 classes a third of the time that a minimum for each pair of values takes. For some images it takes longer, but a
    choice by their number would show in the last bits.
    """
    num_images, num_values = images_ND.shape
    num_classes = len(means_KD)
    l1_NK = torch.empty(num_images, num_classes)
    values_V1 = torch.arange(256.0).div_(255)[:, None]
    first_c = 256 * torch.arange(_TABLE_COLUMNS, dtype=torch.int32)

    def fill(task: tuple[slice, slice]) -> None:
        rows, classes = task
        pixels_nD, means_Dk = images_ND[rows], means_KD[classes].T
        sums_nk = torch.zeros(len(pixels_nD), means_Dk.shape[1], dtype=torch.float64)
        tables = torch.empty(_TABLE_COLUMNS, 256, means_Dk.shape[1])
        for start in range(0, num_values, _TABLE_COLUMNS):
            columns = slice(start, start + _TABLE_COLUMNS)
            means_ck = means_Dk[columns].contiguous()
            # [V, 1], [c, 1, k] -> [c, V, k]
            table_cVk = torch.sub(values_V1, means_ck[:, None], out=tables[: len(means_ck)]).abs_()
            places_nc = pixels_nD[:, columns] + first_c[: len(means_ck)]
            ends_n = torch.arange(0, places_nc.numel() + 1, len(means_ck), dtype=torch.int32)
            sums_nk += embedding_bag(
                places_nc.flatten(), table_cVk.flatten(0, 1), ends_n, mode="sum", include_last_offset=True
            )
        l1_NK[rows, classes] = sums_nk.div_(num_values).float()

    # Threads share the classes first, in whole vectors: those that share images make tables each.
    num_blocks = max(-(-num_classes // _TABLE_CLASSES), min(threads.number, num_classes // 16))
    classes = _cut(num_classes, num_blocks, 8)
    rows = _cut(num_images, -(-threads.number // len(classes)), 1)
    threads.run(fill, [(some, own) for some in rows for own in classes])
    return l1_NK


def _l1(images_ND: torch.Tensor, means_KD: torch.Tensor, threads: Threads) -> torch.Tensor:
    """Compute the mean absolute difference, float32 [N, K], as Σx + Σm - 2 Σ min(x, m).

    One operation less a pair of values than |x - m| takes. Sums of equal values are equal, so that an image that equals
    a mean has distance 0.
    """
    num_images, num_values = images_ND.shape
    num_classes = len(means_KD)
    l1_NK = torch.empty(num_images, num_classes, device=images_ND.device)
    block_values = _BLOCK_BYTES[images_ND.device.type] // 4
    num_columns = -(-num_values // -(-num_values // _MAX_COLUMNS))
    class_block = max(1, min(num_classes, block_values // num_columns))
    image_block = max(1, min(num_images, block_values // (class_block * num_columns)))
    task_images = max(image_block, min(_MAX_TASK_IMAGES, _TASK_BYTES // (4 * num_values)))

    def fill(start: int) -> None:
        pixels_ND = images_ND[start : start + task_images].float().div_(255)
        sums_NK = torch.zeros(len(pixels_ND), num_classes, dtype=torch.float64, device=images_ND.device)
        buffer = torch.empty(image_block * class_block * num_columns, device=images_ND.device)
        for column in range(0, num_values, num_columns):
            some_Nc = pixels_ND[:, column : column + num_columns]
            sums_NK += some_Nc.sum(1)[:, None]
            # Some means stay in the cache while all images of the task pass.
            for first in range(0, num_classes, class_block):
                means_kc = means_KD[first : first + class_block, column : column + num_columns]
                own_Nk = sums_NK[:, first : first + class_block].add_(means_kc.sum(1))
                for row in range(0, len(pixels_ND), image_block):
                    images_nc = some_Nc[row : row + image_block]
                    shape = (len(images_nc), *means_kc.shape)
                    least_nkc = buffer[: math.prod(shape)].view(shape)
                    # [n, 1, c], [1, k, c] -> [n, k, c]
                    torch.minimum(images_nc[:, None, :], means_kc[None, :, :], out=least_nkc)
                    own_Nk[row : row + image_block].sub_(least_nkc.sum(2), alpha=2)
        l1_NK[start : start + task_images] = sums_NK.div_(num_values).clamp_(min=0)

    threads.run(fill, range(0, num_images, task_images))
    return l1_NK


def _rms(images_ND: torch.Tensor, means_KD: torch.Tensor, threads: Threads) -> torch.Tensor:
    """Compute the root of the mean squared difference, float32 [N, K], as Σx² - 2 Σxm + Σm² by products.

    With means as whole multiples of 2^-31, products of some columns are whole numbers below 2^53, which float64 adds
    exactly in any order: so an image's distances do not depend on which images and classes are beside it. Columns are
    then added block after block.
    """
    num_values = images_ND.shape[1]
    rms_NK = torch.empty(len(images_ND), len(means_KD), device=images_ND.device)

    def fill(task: tuple[slice, slice]) -> None:
        rows, classes = task
        pixels_nD, means_kD = images_ND[rows], means_KD[classes]
        squared_nk = torch.zeros(len(pixels_nD), len(means_kD), dtype=torch.float64, device=images_ND.device)
        squares_n, squares_k = squared_nk.new_zeros(len(pixels_nD)), squared_nk.new_zeros(len(means_kD))
        for start in range(0, num_values, _PRODUCT_COLUMNS):
            columns = slice(start, start + _PRODUCT_COLUMNS)
            pixels_nc = pixels_nD[:, columns].double()
            means_kc = means_kD[:, columns].double().mul_(2**31).round_()
            squared_nk += pixels_nc @ means_kc.T
            squares_n += pixels_nc.square_().sum(1)
            squares_k += means_kc.mul_(2.0**-31).square_().sum(1)
        squared_nk.mul_(-2 / (255 * 2.0**31)).add_((squares_n / 255**2)[:, None]).add_(squares_k).div_(num_values)
        # What is left of equal images: means are rounded to float32, and so is not seen.
        squared_nk[squared_nk < _MIN_SQUARE] = 0
        rms_NK[rows, classes] = squared_nk.sqrt_().float()

    rows = _cut(len(images_ND), -(-len(images_ND) // _PRODUCT_IMAGES), 1)
    classes = _cut(len(means_KD), -(-len(means_KD) // _PRODUCT_CLASSES), 1)
    threads.run(fill, [(some, own) for some in rows for own in classes])
    return rms_NK


def _cut(number: int, num_shares: int, unit: int) -> list[slice]:
    """Cut a number into shares, at most so many, of whole units."""
    size = max(1, -(-number // (max(1, num_shares) * unit))) * unit
    return [slice(first, min(first + size, number)) for first in range(0, number, size)]


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
