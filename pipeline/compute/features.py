"""A model's features in the place of pixels: whole multiples of 2^-24, so that sums and products are exact.

Input: features, float32 or float16, one row an image. Output: the same on a grid of fixed points, sums of classes,
distances, unit vectors. Invariant: what is added over images, blocks or actors is whole numbers.

Axes: N images, K classes, D features of an image.
"""

from __future__ import annotations

import torch

# Every float16 is a whole multiple of 1 / UNIT, and so is a float32 of at least 1; smaller ones are rounded to it.
UNIT = 2**24
# Squares are added as whole multiples of this, which is enough for a step's length.
SQUARE_UNIT = 2**16
# The length of a unit vector in whole numbers: products of two of them are below 2^53, where float64 is exact.
LENGTH = 2.0**25
# Of the squares that a length is computed from, bits: they are added exactly too.
_MAX_BITS = 20
# Rows of features in float64 at once.
_ROWS = 1024
# Of what is left of two equal vectors, a share of their squares.
_ROUNDING = 2.0**-48
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def to_features(outputs_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a model's outputs, float32, to what is kept of them: whole multiples of 2^-24 as `dtype`."""
    return (outputs_ND.double() * UNIT).round_().div_(UNIT).to(dtype)


def add_class_sums(sums_KD: torch.Tensor, features_ND: torch.Tensor, labels_N: torch.Tensor) -> None:
    """Add features to the sums of their classes, int64 [K, D], in units of 1 / UNIT."""
    for block_ND, block_labels_N in zip(features_ND.split(_ROWS), labels_N.split(_ROWS), strict=True):
        sums_KD.index_add_(0, block_labels_N, (block_ND.double() * UNIT).long())


def sum_squares(features_ND: torch.Tensor) -> int:
    """Add up the squares of all features, each a whole multiple of 1 / SQUARE_UNIT, in this unit."""
    blocks = features_ND.split(_ROWS)
    return sum(int((block_ND.double().square_() * SQUARE_UNIT).round_().long().sum()) for block_ND in blocks)


def distances(features_ND: torch.Tensor, means_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the distances of images to class means in float64.

    Args:
        features_ND: float32 or float16.
        means_KD: float32.

    Returns:
        The Euclidean distance; and the cosine distance, 1 less the cosine, 0 to 2; each float32 [N, K].
    """
    points_ND, means_KD = features_ND.double(), means_KD.double()
    products_NK = points_ND @ means_KD.T
    squares_N1, squares_K = points_ND.square().sum(1, keepdim=True), means_KD.square().sum(1)
    squared_NK = squares_N1 + squares_K - 2 * products_NK
    squared_NK[squared_NK <= _ROUNDING * (squares_N1 + squares_K)] = 0
    lengths_NK = (squares_N1 * squares_K).sqrt_().clamp_(min=torch.finfo(torch.float64).tiny)
    return squared_NK.sqrt_().float(), (1 - products_NK / lengths_NK).clamp_(0, 2).float()


def to_unit_vectors(features_ND: torch.Tensor) -> torch.Tensor:
    """Give features the length LENGTH, in whole numbers; float64 [N, D].

    Squared distances of these are those of the unit vectors, 2 less twice the cosine, in units of 1 / LENGTH².
    Everything that is added on the way is whole, so that a row depends on nothing but itself.
    """
    bits = min(_MAX_BITS, (52 - max(1, features_ND.shape[1]).bit_length()) // 2)
    points_ND = features_ND.double()
    exponents_N1 = torch.frexp(points_ND.abs().amax(1, keepdim=True)).exponent
    whole_ND = torch.ldexp(points_ND, bits - exponents_N1).round_()
    lengths_N1 = whole_ND.square().sum(1, keepdim=True).sqrt_()
    return whole_ND.div_(lengths_N1.clamp_(min=1)).mul_(LENGTH).round_()
