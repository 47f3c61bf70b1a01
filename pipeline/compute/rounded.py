"""Pairs of images that are too far from each other to matter, found by products that are rounded to a byte.

Input: pixels, and for each image that is searched for a squared distance up to which others matter. Output: pairs,
among them all that are so near. Invariant: no pair is missed, whatever is rounded; so which pairs are offered changes
no result.

For 2^20 products of 784 values torch's product of int8 takes 1.7 ms of a core with AMX, half of it to bring both sides
in order and to write 4 bytes a product. oneDNN's product of quantized models, one side of which is packed once, takes
0.9 and writes one: how far a pair is from being near, in steps of a 253rd of what the images' half squares differ by.

Axes: N images that are searched for, T training images, D values of an image, G groups of W neighboring training
images, P pairs of an image and a group, C pairs of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.products import measure, products

# Products of uint8 and int8 stay in int32 for so many values.
MAX_VALUES = 2**16
# Neighboring training images, nearly of one length, of which the nearest one tells whether any can be near.
_GROUP = 16
# Bytes from 1 on are of products as large as some near pair of these images can have.
_LEVELS = 253
# What float32 rounds: of a sum, which is at most 2^17 for each value, and of a level.
_ROUNDING, _LEVEL_ROUNDING = 2.0**-5, 2.0**-10
# Of all pairs. One that passes costs as much as some hundreds in a product of all.
_MAX_PASSED = 1 / 200
# Sums of a whole number of so many values take less time: of 832, 0.82 of the time of 784.
_MULTIPLE = 64
# More values than these, of an image's, are not worth it.
_MAX_PADDING = 1 / 8
# For which number of training images weights are packed; they are right for others too.
_PACKED_FOR = 4096
# What it is tried with: training images, images and values.
_TRIAL = (1024, 256, 512)
# Where there are no fast ones for a processor, they take a hundred times as long as others, not about as long.
_MAX_TIMES = 3


@dataclass(frozen=True)
class Packed:
    """Images that are searched for.

    Attributes:
        weights: As oneDNN wants them.
        sums_N: Of each one's values less 128, float64.
    """

    weights: torch.Tensor
    sums_N: torch.Tensor


@dataclass(frozen=True)
class Scale:
    """How products with some training images become bytes.

    Attributes:
        least: Half of the shortest one's square.
        step: From a byte to the next.
        lowest_G1: From which byte on one of a group can be near, uint8.
    """

    least: float
    step: float
    lowest_G1: npt.NDArray[np.uint8]


def pack(images_ND: torch.Tensor) -> Packed:
    """Pack images, int8 as `to_int8` gives them, of at most `MAX_VALUES`."""
    weights = torch.ops.onednn.qlinear_prepack(images_ND, [_PACKED_FOR, images_ND.shape[1]])
    return Packed(weights, images_ND.sum(1, dtype=torch.int64).double())


def padded(num_values: int) -> int:
    """Say how many values images had better have, those of zero at the end included."""
    more = -num_values % _MULTIPLE
    return num_values + (more if more <= num_values * _MAX_PADDING else 0)


def choose_scale(squares_T: torch.Tensor, num_values: int) -> Scale:
    """Choose it by the training images' squares, less 128, int64, which ascend."""
    halves_T = squares_T.numpy() / 2
    error = num_values * _ROUNDING
    step = max((halves_T[-1] - halves_T[0]) / _LEVELS, 4 * error)
    shortest_G = halves_T[:: _GROUP if len(halves_T) % _GROUP == 0 else 1]
    lowest_G = np.ceil((shortest_G - halves_T[0] - error) / step + (0.5 - _LEVEL_ROUNDING))
    return Scale(halves_T[0], step, lowest_G.clip(min=0).astype(np.uint8)[:, None])


def find_pairs(
    images: Packed, limit_N: torch.Tensor, others_TD: torch.Tensor, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Find all pairs that are as near as the limits say.

    Args:
        images: The N images.
        limit_N: Squared distances, less the images' own squares, int64.
        others_TD: Training images, uint8.
        scale: Of these.

    Returns:
        Rows of the images and of the training images, int64 [C]; None where so many pass that comparing all is faster.
    """
    # With pixels b and a less 128, a pair is near where (|b - 128|^2 - limit) / 2 <= a(b - 128) = ab - 128 sum(a).
    shift_N = limit_N.double() / 2 - 128 * images.sums_N - scale.least
    bytes_TN = _multiply(others_TD, images.weights, shift_N.float(), scale.step)
    num_images, width = bytes_TN.shape[1], len(others_TD) // len(scale.lowest_G1)
    bytes_GWN = bytes_TN.view(-1, width, num_images)
    nearest_GN = bytes_GWN.amax(1).numpy()
    # By NumPy, at several times torch's speed.
    group_P, image_P = np.divmod(np.flatnonzero(nearest_GN >= scale.lowest_G1), num_images)
    most = bytes_TN.numel() * _MAX_PASSED
    if len(group_P) > most:
        return None
    is_near_PW = bytes_GWN.numpy()[group_P, :, image_P] >= scale.lowest_G1[group_P]
    place_C, offset_C = np.divmod(np.flatnonzero(is_near_PW), width)
    if len(place_C) > most:
        return None
    return torch.from_numpy(image_P[place_C]), torch.from_numpy(group_P[place_C] * width + offset_C)


def _multiply(others_TD: torch.Tensor, weights: torch.Tensor, shift_N: torch.Tensor, step: float) -> torch.Tensor:
    """Return (product + shift) / step + 1, rounded and clipped to a byte, [T, N]."""
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    rounded_TN: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        others_TD, 1.0, 0, weights, scale, zero, shift_N, step, 1, torch.uint8, "none", [], ""
    )
    return rounded_TN


@cache
def works() -> bool:
    """Try once whether this torch has products that are rounded, and here they are right, and no plain loop.

    Without VNNI oneDNN adds two products in 16 bits, which are too few.
    """
    num_others, num_images, num_values = _TRIAL
    others_TD = torch.full((num_others, num_values), 255, dtype=torch.uint8)
    others_TD[::2] = torch.arange(num_values).to(torch.uint8)
    images_ND = torch.full((num_images, num_values), -128, dtype=torch.int8)
    images_ND[::2] = 127
    exact_TN = others_TD.double() @ images_ND.double().T
    shift_N = -exact_TN.amin(0)
    step = float((exact_TN + shift_N).max()) / _LEVELS
    try:
        arguments = others_TD, pack(images_ND).weights, shift_N.float(), step
        rounded_TN = _multiply(*arguments)
    except (RuntimeError, AttributeError):  # this torch has none
        return False
    is_right = ((rounded_TN - 1 - (exact_TN + shift_N) / step).abs() < 0.5 + _LEVEL_ROUNDING).all()
    return bool(is_right) and measure(_multiply, *arguments) < _MAX_TIMES * measure(products, images_ND, others_TD)
