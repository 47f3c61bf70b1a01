"""Pairs of images that are too far from each other to matter, found without their distances.

Input: images, uint8, and for each a squared distance up to which others matter. Output: pairs, among them all that are
so near. Invariant: no pair is missed, whatever float32 rounds; so which pairs are offered changes no result.

The idea is GEMINI's (C. Faloutsos, M. Ranganathan, Y. Manolopoulos, "Fast subsequence matching in time-series
databases", SIGMOD 1994): a distance that is cheap, and never above the true one, leaves few pairs to compare exactly.
Images are projected on the first principal axes of a sample; what is left of each counts by its length alone, as by
Cauchy and Schwarz x.y <= Px.Py + |x - Px| |y - Py|. A first level of few axes is a product of matrices; a second one of
more axes is computed for pairs that pass the first.

Axes: N images that are searched for, T training images, D values of an image, P axes, C pairs, G groups of W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.compute.products import add_products

# Axes of the first level, and of both.
_FIRST, _ALL = 53, 144
# Images of fewer values are as fast compared at once.
MIN_VALUES = 512
_MIN_SAMPLE = 3 * _ALL
# Of the sample, and of the axes.
_MAX_BYTES = 16 * 2**20
_MAX_SAMPLE = 1024
# Values that are summed at once: rounding grows with their number.
_SUM_VALUES = 128
_ROUNDING = 2.0**-24
# Training images beside which a tile's products stay in the cache.
_STRIP = 4096
# Shares of all pairs. One that passes the first level costs as much as about four in a product of all, and one that
# passes both as much as ten or more.
_MAX_PASSED, _MAX_LEFT = 1 / 8, 1 / 16


@dataclass(frozen=True)
class Projected:
    """Images as both levels compare them.

    Attributes:
        first_NP: Half of the square, one, the length of the rest, and lengths along the first axes, float32.
        more_NP: What the second level adds: the length of its rest, that of the first one's, lengths along its axes.
        squares_N: Of all values less the mean, float64.
    """

    first_NP: torch.Tensor
    more_NP: torch.Tensor
    squares_N: torch.Tensor

    def __getitem__(self, rows: slice) -> Projected:
        return Projected(*(values[rows] for values in vars(self).values()))

    def as_searched(self) -> Projected:
        """Turn the signs so that products with others are half of squared distances, less half of the own squares."""
        first_NP, more_NP = self.first_NP.neg(), self.more_NP.neg()
        first_NP[:, :2] = torch.tensor([1.0, 0.0])
        more_NP[:, 1].neg_()
        return Projected(first_NP, more_NP, self.squares_N)


class Projection:
    """Axes along which images differ most.

    Args:
        sample_TD: Some images, uint8; enough of them, as `has_axes` says.
    """

    def __init__(self, sample_TD: torch.Tensor) -> None:
        num_values = sample_TD.shape[1]
        step = max(1, -(-len(sample_TD) // min(_MAX_SAMPLE, _MAX_BYTES // (4 * num_values))))
        sample_TD = sample_TD[::step].float()
        self._mean_D = sample_TD.mean(0).round_()
        self._axes_DP = _principal_axes(sample_TD.sub_(self._mean_D), _ALL)
        axes_DP = self._axes_DP.double()
        skew = float((axes_DP.T @ axes_DP - torch.eye(_ALL)).norm())
        num_sums = min(num_values, _SUM_VALUES) + -(-num_values // _SUM_VALUES)
        # By how much, of its length, an image's projection can be wrong: the axes are not quite orthonormal, and each
        # of the sums is rounded (N. Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
        self._error = skew + 1.01 * math.sqrt(_ALL) * num_sums * _ROUNDING

    def apply(self, images_ND: torch.Tensor) -> Projected:
        """Project images, uint8."""
        less_mean_ND = images_ND.float().sub_(self._mean_D)
        along_NP = torch.zeros(len(images_ND), _ALL)
        for start in range(0, images_ND.shape[1], _SUM_VALUES):
            values = slice(start, start + _SUM_VALUES)
            along_NP.addmm_(less_mean_ND[:, values], self._axes_DP[values])
        squares_N = less_mean_ND.square_().sum(1, dtype=torch.float64)
        first_N, more_N = (part_NP.square().sum(1).double() for part_NP in along_NP.tensor_split([_FIRST], 1))
        # Never shorter than it is.
        rest_N, last_N = (
            ((squares_N - covered_N).clamp_(min=0) + 4 * self._error * squares_N)
            .sqrt_()
            .mul_(1 + 4 * _ROUNDING)
            .float()
            for covered_N in (first_N, first_N + more_N)
        )
        ones_N = torch.ones(len(images_ND))
        first_NP = torch.column_stack([squares_N.float() / 2, ones_N, rest_N, along_NP[:, :_FIRST]])
        return Projected(first_NP, torch.column_stack([last_N, rest_N, along_NP[:, _FIRST:]]), squares_N)

    def limits(self, searched: Projected, longest: float, distances_N: torch.Tensor) -> torch.Tensor:
        """Say which products of levels, float32 [N], pairs can have that are as near as `distances_N`.

        Args:
            searched: Of N images.
            longest: The largest of the training images' `squares_N`.
            distances_N: Squared distances, float64.
        """
        longest = math.sqrt(longest)
        rounding = 4 * (_ALL + 8) * _ROUNDING
        margin_N = searched.squares_N.sqrt() * longest * (4 * self._error + rounding) + longest**2 * rounding
        limit_N = (distances_N - searched.squares_N) / 2 + margin_N
        return (limit_N + limit_N.abs() * 2 * rounding).float()


def stack(parts: Sequence[Projected]) -> Projected:
    """Put images below others."""
    return Projected(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


def has_axes(sample_TD: torch.Tensor) -> bool:
    """Whether images, uint8, are of enough values, and enough in number, for axes to be found and to be of use."""
    num_images, num_values = sample_TD.shape
    return num_values >= MIN_VALUES and min(num_images, _MAX_BYTES // (4 * num_values)) >= _MIN_SAMPLE


def nearest(
    searched: Projected, others: Projected, number: int, leave_out: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    """Return the rows of what seems nearest to each image by the first level, int64 [N, `number`]; -1 for none.

    Args:
        searched: Of N images.
        others: Of T, at least `number`.
        number: How many.
        leave_out: Sets to infinity, in float32 [N, T], what counts for no pair.
    """
    values_NT = searched.first_NP @ others.first_NP.T
    leave_out(values_NT)
    found = values_NT.topk(number, 1, largest=False, sorted=False)
    return found.indices.masked_fill_(found.values.isinf(), -1)


def find_pairs(
    searched: Projected,
    others: Projected,
    limit_N: torch.Tensor,
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find all pairs that can be as near as `Projection.limits` says.

    Args:
        searched: Of N images.
        others: Of T.
        limit_N: float32.
        choose: Says of pairs, by rows of images and of training images, which count at all, bool [C]; None for all.

    Returns:
        Rows of the images, which ascend, and of the training images, int64 [C]; None where so many are left that
        comparing all is faster.
    """
    # So that what is as near as it says is below zero.
    first_NP = searched.first_NP.clone()
    first_NP[:, 1] = -limit_N
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    num_compared = num_left = 0
    for start in range(0, len(others.first_NP), _STRIP):
        strip = slice(start, start + _STRIP)
        values_NT = first_NP @ others.first_NP[strip].T
        num_columns = values_NT.shape[1]
        # By NumPy, at several times torch's speed.
        passed_C = torch.from_numpy(np.flatnonzero(values_NT.numpy() <= 0))
        if len(passed_C) > values_NT.numel() * _MAX_PASSED:
            return None
        image_C = passed_C // num_columns
        column_C = passed_C - image_C * num_columns
        if choose is not None:
            chosen_C = choose(image_C, column_C + start)
            passed_C, image_C, column_C = passed_C[chosen_C], image_C[chosen_C], column_C[chosen_C]
        value_C = values_NT.view(-1)[passed_C]
        value_C = add_products(value_C, image_C, column_C, searched.more_NP, others.more_NP[strip])
        near_C = torch.from_numpy(np.flatnonzero(value_C.numpy() <= 0))
        found.append((image_C[near_C], column_C[near_C].add_(start)))
        num_compared, num_left = num_compared + values_NT.numel(), num_left + len(near_C)
        if num_left > num_compared * _MAX_LEFT:
            return None
    image_C, column_C = (torch.cat(parts) for parts in zip(*found, strict=True))
    order_C = image_C.argsort(stable=True)
    return image_C[order_C], column_C[order_C]


def _principal_axes(images_TD: torch.Tensor, num_axes: int) -> torch.Tensor:
    """Find the axes along which images differ most, nearly, in order: orthonormal float32 [D, P].

    N. Halko, P. Martinsson, J. Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    basis_DP = torch.randn(images_TD.shape[1], num_axes + 16, generator=generator)
    for _ in range(3):
        basis_DP = torch.linalg.qr(images_TD.T @ (images_TD @ basis_DP)).Q
    along_TP = images_TD @ basis_DP
    _, turn_PP = torch.linalg.eigh(along_TP.T @ along_TP)
    axes_DP: torch.Tensor = torch.linalg.qr(basis_DP @ turn_PP.flip(1)[:, :num_axes]).Q
    return axes_DP
