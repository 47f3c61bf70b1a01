"""Figures as what is drawn: axes and lines, steps of a scale, arrays as small images.

Input: numbers. Output: positions in a drawing, levels, and PNG files as data URIs. Invariant: nothing here rounds a
figure that is written; what is drawn is no more exact than can be seen.

H height, W width, C channels.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.results.texts import with_minus

# A drawing's size in its own units, and the frame of its axes in it.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 14, 188
# Steps of the shading of a table's cells, so that text on them can be seen: none is of a middle tone.
NUM_LEVELS = 10
_MAX_IMAGE_SIDE = 64
# The ends of the scale around zero, and its middle: told apart with any kind of colour vision.
_NEGATIVE, _MIDDLE, _POSITIVE = (33, 102, 172), (247, 247, 247), (178, 60, 23)


def line_chart(
    places: Sequence[float], lines: Sequence[tuple[str, Sequence[float]]], labels: Sequence[float] = ()
) -> dict[str, Any]:
    """Lay out values as lines over one pair of axes.

    Args:
        places: Rising, as epochs; a line that is shorter ends earlier.
        lines: A name and values each.
        labels: The places that are written below; some round ones by default.

    Returns:
        For each line its `name`, its `points` as SVG writes them, and its `last` value and position; and `y_ticks` and
        `x_ticks`, each a position and a label.
    """
    values = [value for _, own in lines for value in own]
    first, last = places[0], places[-1]
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x_of(place: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * ((place - first) / (last - first) if last > first else 0.5), 1)

    def y_of(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    drawn = [
        {
            "name": name,
            "points": " ".join(f"{x_of(place)},{y_of(value)}" for place, value in zip(places, own, strict=False)),
            "last": (x_of(places[len(own) - 1]), y_of(own[-1])),
        }
        for name, own in lines
    ]
    step = (last - first) / 12
    inner = [tick for tick in map(round, _ticks(first, last)) if first + step < tick < last - step]
    return {
        "lines": drawn,
        "y_ticks": [(y_of(tick), label) for tick, label in zip(ticks, _labels(ticks), strict=True)],
        "x_ticks": [(x_of(place), f"{place:g}") for place in labels or sorted({first, *inner, last})],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Choose three to seven round values that hold a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def round_limit(largest: float) -> float:
    """Choose the round end of an axis around zero, a little further than the largest value on it."""
    if not largest:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * factor for factor in (1, 1.5, 2, 3, 4, 5, 7.5, 10, 15) if largest * 1.04 <= power * factor)


def _labels(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many decimals as their distance has."""
    step, largest = ticks[1] - ticks[0], max(map(abs, ticks))
    if not 1e-4 <= step <= largest < 1e6:
        return [with_minus(f"{tick:.2g}") for tick in ticks]
    decimals = len(f"{step:.6g}".partition(".")[2])
    return [with_minus(f"{tick:.{decimals}f}") for tick in ticks]


def level(share: float) -> int:
    """Choose the step of a cell's shading for a share of the largest, 0 to 1; only nothing is unshaded."""
    return 0 if share <= 0 else min(NUM_LEVELS, max(1, math.ceil(share * NUM_LEVELS)))


def grey_or_colour_png(image_HWC: npt.NDArray[np.floating[Any]]) -> str:
    """Draw an image, float32, 0 to 1."""
    pixels_HWC = np.rint(np.clip(_shrunk(image_HWC), 0, 1) * 255).astype(np.uint8)
    return _png(pixels_HWC)


def diverging_png(values_HW: npt.NDArray[np.float32], limit: float) -> str:
    """Draw values on a scale around zero, the ends of which are `limit` on either side."""
    share_HW1 = np.clip(_shrunk(values_HW[:, :, None]) / (limit or 1.0), -1, 1)
    middle, ends = np.array(_MIDDLE), np.where(share_HW1 < 0, np.array(_NEGATIVE), np.array(_POSITIVE))
    return _png(np.rint(middle + (ends - middle) * np.abs(share_HW1)).astype(np.uint8))


def data_uri(data: bytes, media_type: str) -> str:
    """Write a file as a URI that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _shrunk(image_HWC: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Average blocks of pixels, so that no side is longer than the page has use for."""
    height, width, _ = image_HWC.shape
    factor = math.ceil(max(height, width) / _MAX_IMAGE_SIDE)
    if factor == 1:
        return image_HWC
    rows, columns = (np.arange(0, side, factor) for side in (height, width))
    sums_HWC = np.add.reduceat(np.add.reduceat(image_HWC, rows, 0), columns, 1)
    areas_HW = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    means_HWC: npt.NDArray[np.floating[Any]] = sums_HWC / areas_HW[:, :, None]
    return means_HWC


def _png(pixels_HWC: npt.NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC).save(stream, "PNG")
    return data_uri(stream.getvalue(), "image/png")
