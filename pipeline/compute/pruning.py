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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Axes of the first level, and of both.
_FIRST, _ALL = 64, 160
# Images of fewer values are as fast compared at once.
MIN_VALUES = 512
_MIN_SAMPLE = 3 * _ALL
# Of the sample, and of the axes.
_MAX_BYTES = 16 * 2**20
_MAX_SAMPLE = 1024
# Values that are summed at once: rounding grows with their number.
_SUM_VALUES = 128
_ROUNDING = 2.0**-24
_MAX_FLOAT = torch.finfo(torch.float32).max
_GROUP = 16
_EVEN = 256
# Pairs of the second level that stay in the cache.
_PAIRS = 1024
# A pair by itself costs as much as so many in a product of all.
_MAX_PASSED = 1 / 16


class _Memory(threading.local):
    values = torch.empty(0)


_MEMORY = _Memory()


@dataclass(frozen=True)
class Projected:
    """Images as both levels compare them.

    Attributes:
        first_NP: Half of the square, the length of the rest, and lengths along the first axes, float32.
        more_NP: What the second level adds: the length of its rest, that of the first one's, lengths along its axes.
        squares_N: Of all values less the mean, float64.
    """

    first_NP: torch.Tensor
    more_NP: torch.Tensor
    squares_N: torch.Tensor

    def as_searched(self) -> Projected:
        """Turn the signs so that products with others are half of squared distances, less half of the own squares."""
        first_NP, more_NP = self.first_NP.neg(), self.more_NP.neg()
        first_NP[:, 0] = 1
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
        first_NP = torch.column_stack([squares_N.float() / 2, rest_N, along_NP[:, :_FIRST]])
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
        return (limit_N + limit_N.abs() * 2 * _ROUNDING).clamp_(max=_MAX_FLOAT).float()


def stack(parts: Sequence[Projected]) -> Projected:
    """Put training images below others, and below them so many that are infinitely far that groups come out even."""
    first_TP, more_TP, squares_T = (
        torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)
    )
    first_TP = torch.nn.functional.pad(first_TP, (0, 0, 0, -len(first_TP) % _EVEN))
    first_TP[len(more_TP) :, 0] = math.inf
    return Projected(first_TP, more_TP, squares_T)


def has_axes(sample_TD: torch.Tensor) -> bool:
    """Whether images, uint8, are of enough values, and enough in number, for axes to be found and to be of use."""
    num_images, num_values = sample_TD.shape
    return num_values >= MIN_VALUES and min(num_images, _MAX_BYTES // (4 * num_values)) >= _MIN_SAMPLE


class Scan:
    """Some images beside some training images, by the first level; a thread has one at a time.

    Args:
        searched: Of N images.
        others: Of T.
        leave_out: Sets to infinity, in float32 [N, T], what counts for no pair.
    """

    def __init__(self, searched: Projected, others: Projected, leave_out: Callable[[torch.Tensor], None]) -> None:
        self._searched = searched
        self._others = others
        values_NT = _buffer(len(searched.first_NP), len(others.first_NP))
        torch.mm(searched.first_NP, others.first_NP.T, out=values_NT)
        leave_out(values_NT)
        self._values_NWG = values_NT.view(len(values_NT), _GROUP, -1)
        self._minima_NG = self._values_NWG.amin(1)
        self._minima_NVS = self._minima_NG.view(len(values_NT), _EVEN // _GROUP, -1)
        # By groups of groups, float32 [N, S].
        self._coarse_NS = self._minima_NVS.amin(1)

    @property
    def num_probes(self) -> int:
        """How many `nearest` can give."""
        return self._coarse_NS.shape[1]

    def nearest(self, number: int) -> torch.Tensor:
        """Return the rows of what seems nearest to each image, int64 [N, `number`]; -1 where there is none."""
        place_C = self._coarse_NS.topk(number, 1, largest=False, sorted=False).indices.view(-1)
        image_C = torch.arange(len(self._coarse_NS)).repeat_interleave(number)
        value_C, outer_C = self._minima_NVS[image_C, :, place_C].min(1)
        group_C = outer_C.mul_(self.num_probes).add_(place_C)
        column_C = self._values_NWG[image_C, :, group_C].argmin(1).mul_(self._minima_NG.shape[1]).add_(group_C)
        return column_C.masked_fill_(value_C.isinf(), -1).view(-1, number)

    def pairs(self, limit_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find all pairs that can be as near as `Projection.limits` says.

        Returns:
            Rows of the images and of the training images, int64 [C]; None where so many are left that comparing all is
            faster.
        """
        num_groups = self._minima_NG.shape[1]
        passed_P = _nonzero(self._minima_NG <= limit_N[:, None])
        if len(passed_P) > self._minima_NG.numel() / 2:
            return None
        image_P, group_P = passed_P // num_groups, passed_P % num_groups
        value_PW = self._values_NWG[image_P, :, group_P]
        passed_C = _nonzero(value_PW <= limit_N[image_P][:, None])
        if len(passed_C) > self._values_NWG.numel() * _MAX_PASSED:
            return None
        place_C = passed_C // _GROUP
        image_C, column_C = image_P[place_C], (passed_C % _GROUP).mul_(num_groups).add_(group_P[place_C])
        value_C = value_PW.view(-1)[passed_C].sub_(limit_N[image_C])
        for start in range(0, len(image_C), _PAIRS):
            part = slice(start, start + _PAIRS)
            more_CP = self._searched.more_NP.index_select(0, image_C[part])
            value_C[part] += more_CP.mul_(self._others.more_NP.index_select(0, column_C[part])).sum(1)
        near_C = _nonzero(value_C <= 0)
        return image_C[near_C], column_C[near_C]


def _buffer(*shape: int) -> torch.Tensor:
    """Give memory of this thread, float32: new pages would cost a third of a product of so few axes."""
    if _MEMORY.values.numel() < math.prod(shape):
        with torch.inference_mode(False):  # so that it can be written to in either mode
            _MEMORY.values = torch.empty(math.prod(shape))
    return _MEMORY.values[: math.prod(shape)].view(shape)


def _nonzero(is_true: torch.Tensor) -> torch.Tensor:
    # By NumPy, at several times torch's speed.
    return torch.from_numpy(np.flatnonzero(is_true.numpy()))


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
