"""Exact products of images with images, in whole numbers.

Input: pixels less 128, int8, or unit vectors of features in whole numbers, float64. Output: their scalar products.
Invariant: the same whole numbers from every way of computing them, in whatever order sums are added: on CPU or GPU, by
int8, float32 or float64.

Axes: N and T images, D values of an image.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from pipeline.compute.features import to_unit_vectors

# Products of int8 are at most 2^14: their sums are at most 2^24, up to where float32 is exact, for so many values,
_FLOAT_VALUES = 1024
# and below 2^31 for so many, with the distances that are made of them.
_INT_VALUES = 2**14
# Images, and values, that are squared at once.
_SQUARED_IMAGES, _SQUARED_VALUES = 256, 2**18
# Pairs that are compared at once.
_PAIRS = 1024
# What `int8` is tried with: rows, columns and values that are multiples of what CUDA asks for.
_TRIAL = (256, 512, 784)
# Once in a process torch says that its sparse tensors may change: here, where no other thread is, and unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))


def to_whole(images_ND: torch.Tensor) -> torch.Tensor:
    """Turn images into whole numbers that can be multiplied: pixels by `to_int8`, features by `to_unit_vectors`."""
    return to_unit_vectors(images_ND) if images_ND.is_floating_point() else to_int8(images_ND)


def to_int8(images_ND: torch.Tensor) -> torch.Tensor:
    """Take 128 off pixels, uint8; int8."""
    return images_ND.contiguous().view(torch.int8).bitwise_xor(-128)


def products(images_ND: torch.Tensor, others_TD: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply images with images, both int8 or float64.

    Args:
        images_ND: Some images.
        others_TD: Others; pixels too, uint8.
        scratch: Where the result may lie, int32 [N * T] or more: memory that is not new costs less than the products.

    Returns:
        [N, T], whole numbers of a type that has them all: int32, int64, or float32.
    """
    if images_ND.is_floating_point():
        return (images_ND @ others_TD.T).long()
    others_TD = _less_128(others_TD)
    shape = len(images_ND), len(others_TD)
    multiply, max_values, dtype = (
        (_multiply_int8, _INT_VALUES, torch.int32) if has_fast_int8(images_ND.device) else
        (_multiply_float32, _FLOAT_VALUES, torch.float32))  # fmt: skip
    if scratch is None:
        scratch = torch.empty(math.prod(shape), dtype=torch.int32, device=images_ND.device)
    place_NT = scratch[: math.prod(shape)].view(dtype).view(shape)
    num_values = images_ND.shape[1]
    if num_values <= max_values:
        return multiply(images_ND, others_TD, place_NT)
    sum_dtype = torch.int32 if num_values <= _INT_VALUES else torch.int64
    sums_NT = torch.zeros(shape, dtype=sum_dtype, device=images_ND.device)
    for start in range(0, num_values, max_values):
        values = slice(start, start + max_values)
        sums_NT += multiply(images_ND[:, values], others_TD[:, values], place_NT).to(sum_dtype)
    return sums_NT


def pair_products(
    images_ND: torch.Tensor, others_TD: torch.Tensor, image_C: torch.Tensor, column_C: torch.Tensor
) -> torch.Tensor:
    """Multiply images with some others each, all int8, on a CPU: [C], int64.

    Args:
        images_ND: Some images.
        others_TD: Others; pixels too, uint8.
        image_C: Rows of `images_ND`, which ascend, int64.
        column_C: Rows of `others_TD`, int64.
    """
    sums_C = torch.zeros(len(image_C), dtype=torch.int64)
    for first in range(0, images_ND.shape[1], _FLOAT_VALUES):
        values = slice(first, first + _FLOAT_VALUES)
        floats_ND = images_ND[:, values].float()
        for start in range(0, len(image_C), _PAIRS):
            part = slice(start, start + _PAIRS)
            chosen_CD = _less_128(others_TD[:, values].index_select(0, column_C[part])).float()
            zeros_C, place_C = torch.zeros(len(chosen_CD)), torch.arange(len(chosen_CD))
            sums_C[part] += add_products(zeros_C, image_C[part], place_C, floats_ND, chosen_CD).long()
    return sums_C


def add_products(
    values_C: torch.Tensor, image_C: torch.Tensor, column_C: torch.Tensor, images_NP: torch.Tensor,
    others_TP: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Add to values the products of rows of two matrices, all float32, on a CPU, without gathering these rows.

    Args:
        values_C: What is added to.
        image_C: Rows of `images_NP`, which ascend, int64.
        column_C: Rows of `others_TP`, int64.
        images_NP: One matrix.
        others_TP: The other.
    """
    firsts_N = torch.searchsorted(image_C, torch.arange(len(images_NP) + 1))
    shape = len(images_NP), len(others_TP)
    pairs = torch.sparse_csr_tensor(firsts_N, column_C, values_C, shape, check_invariants=False)
    added: torch.Tensor = torch.sparse.sampled_addmm(pairs, images_NP, others_TP.T).values()
    return added


def squares(images_ND: torch.Tensor) -> torch.Tensor:
    """Add up each image's squares, int8 or float64; int64 [N]."""
    if images_ND.is_floating_point():
        return images_ND.square().sum(1).long()
    num_values = images_ND.shape[1]
    size = min(num_values, _FLOAT_VALUES)
    step = max(1, min(_SQUARED_IMAGES, _SQUARED_VALUES // num_values))
    sums = []
    for some_ND in images_ND.split(step):
        pieces_NPD = torch.nn.functional.pad(some_ND.float(), (0, -num_values % size)).unflatten(1, (-1, size))
        if pieces_NPD.device.type == "cpu":  # NumPy adds up squares as it makes them
            sums_NP = torch.from_numpy(np.einsum("npd,npd->np", pieces_NPD.numpy(), pieces_NPD.numpy()))
        else:
            sums_NP = pieces_NPD.square_().sum(2)
        sums.append(sums_NP.long().sum(1))
    return torch.cat(sums)


def _less_128(images_ND: torch.Tensor) -> torch.Tensor:
    return to_int8(images_ND) if images_ND.dtype == torch.uint8 else images_ND


def _multiply_float32(images_ND: torch.Tensor, others_TD: torch.Tensor, out_NT: torch.Tensor) -> torch.Tensor:
    return torch.mm(images_ND.float(), others_TD.float().T, out=out_NT)


def _multiply_int8(images_ND: torch.Tensor, others_TD: torch.Tensor, out_NT: torch.Tensor) -> torch.Tensor:
    (num_images, num_values), num_others = images_ND.shape, len(others_TD)
    pad = torch.nn.functional.pad
    if images_ND.device.type == "cuda":
        # It takes more than 16 rows, and multiples of 8 values and columns; zeros add nothing.
        more = -num_values % 8
        images_ND = pad(images_ND, (0, more, 0, max(0, 17 - num_images)))
        others_TD = pad(others_TD, (0, more, 0, -num_others % 8))
        return torch._int_mm(images_ND, others_TD.T)[:num_images, :num_others]
    if num_values == 1:
        # A CPU's takes a column for a row, whose strides are the same, and gives whatever lies behind it.
        images_ND, others_TD = pad(images_ND, (0, 1)), pad(others_TD, (0, 1))
    return torch._int_mm(images_ND, others_TD.T, out=out_NT)


@cache
def has_fast_int8(device: torch.device) -> bool:
    """Measure once which way is faster; both give the same.

    Without instructions for it (VNNI, AMX, tensor cores) torch's product of int8 is a plain loop.
    """
    num_images, num_others, num_values = _TRIAL
    images_ND = torch.ones(num_images, num_values, dtype=torch.int8, device=device)
    others_TD = torch.ones(num_others, num_values, dtype=torch.int8, device=device)
    out_NT = torch.empty(num_images, num_others, dtype=torch.int32, device=device)
    try:
        int8_s = measure(_multiply_int8, images_ND[:32], others_TD, out_NT[:32]) * num_images / 32
    except (RuntimeError, AttributeError):  # this torch has none for this device
        return False
    return int8_s < measure(_multiply_float32, images_ND, others_TD, out_NT.view(torch.float32))


def measure(multiply: Callable[..., torch.Tensor], *arguments: Any) -> float:
    """Say how many seconds a product takes; its first argument tells where."""
    # On a CPU the time of this thread: others may keep it waiting.
    clock = time.thread_time if arguments[0].device.type == "cpu" else time.perf_counter
    multiply(*arguments)
    times = []
    for _ in range(3):
        started = clock()
        int(multiply(*arguments)[0, 0])  # which a GPU is waited for
        times.append(clock() - started)
    return min(times)
