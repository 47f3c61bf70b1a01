"""The parameters of the linear model, cut into tiles that stay in a processor's cache.

Input: parameters as results hold them, and images. Output: tiles of parameters, and rows of inputs. Invariant: how
parameters are cut follows from K, D and the kind of device alone.

A row of inputs is an image's D pixels, a 1 whose weight is the bias, and zeros: C columns. A tile holds the weights of
some classes for some columns, in one piece of memory: rows that lie as far apart as those of a whole matrix displace
each other from the cache.

Axes: B rows of a step, C columns, D values of an image, K classes, P parameters (K·D weights, class by class, then K
biases), S stored values, U units of a tile, M values of a unit; k classes and c columns of a tile. All is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

# Four of them, as many as a tree of eight lanes needs, stay in a core's cache or close to it; a GPU wants enough work
# for all its processors.
_TILE_VALUES = {"cpu": 2**17, "cuda": 2**24}
_MAX_TILE_CLASSES = 512
# A smaller model is one tile: more would cost more calls than threads could save.
_WHOLE_VALUES = {"cpu": 2**15, "cuda": 2**24}
# Columns begin where memory is aligned to 64 bytes; the last bits of products depend on it on some processors.
ALIGNED = 16
# Many classes are cut into so many blocks, of which actors have some each. A block's tiles, its part of a step's logits
# and rows of inputs stay in a core's cache.
_MIN_SHARED_CLASSES = 256
_MAX_CLASS_BLOCKS = 8
# A tile is stepped unit by unit, each by one actor. Operations go through whole vectors of it, whoever does them.
_UNIT_VALUES = 64
_MAX_UNITS = 8
# With so many tiles actors have whole ones.
_MANY_TILES = 32


@dataclass(frozen=True)
class Tile:
    """Some classes and columns.

    Attributes:
        classes: Of K.
        columns: Of C.
        start: Where it is stored, of S.
        num_units: U, of equal size.
        unit_size: M, the values of a unit; the last ones of the last unit may belong to no parameter.
    """

    classes: slice
    columns: slice
    start: int
    num_units: int
    unit_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """[k, c]."""
        return self.classes.stop - self.classes.start, self.columns.stop - self.columns.start

    @property
    def size(self) -> int:
        """Stored values, U·M."""
        return self.num_units * self.unit_size

    def matrix(self, stored_UM: torch.Tensor) -> torch.Tensor:
        """View what is stored, `size` values in one piece, as [k, c]."""
        num_rows, num_columns = self.shape
        return stored_UM.view(-1)[: num_rows * num_columns].view(num_rows, num_columns)


def count_columns(num_values: int) -> int:
    """Return C for images of D values."""
    return -(-(num_values + 1) // ALIGNED) * ALIGNED


def has_class_blocks(num_classes: int, num_values: int, device_type: str) -> bool:
    """Say whether a model is cut into enough blocks of classes for actors to share them."""
    num_weights = num_classes * count_columns(num_values)
    return device_type == "cpu" and num_classes > _MIN_SHARED_CLASSES and num_weights > _WHOLE_VALUES["cpu"]


def cut_tiles(num_classes: int, num_values: int, device_type: str) -> tuple[Tile, ...]:
    """Cut the parameters into tiles, class block by class block.

    Args:
        num_classes: K.
        num_values: D.
        device_type: `cpu` or `cuda`.
    """
    num_columns = count_columns(num_values)
    tile_classes, tile_columns = num_classes, num_columns
    if has_class_blocks(num_classes, num_values, device_type):
        tile_classes = _aligned_share(num_classes, _MAX_CLASS_BLOCKS)
        most = max(ALIGNED, _TILE_VALUES[device_type] // tile_classes)
        tile_columns = _aligned_share(num_columns, -(-num_columns // most))
    elif num_classes * num_columns > _WHOLE_VALUES[device_type]:
        tile_classes = _aligned_share(num_classes, -(-num_classes // _MAX_TILE_CLASSES))
        most = max(ALIGNED, _TILE_VALUES[device_type] // tile_classes)
        # In a multiple of four, so that threads have about as much to do.
        tile_columns = _aligned_share(num_columns, -(-num_columns // (4 * most)) * 4)
    ranges = [
        (first, min(first + tile_classes, num_classes), column, min(column + tile_columns, num_columns))
        for first in range(0, num_classes, tile_classes)
        for column in range(0, num_columns, tile_columns)
    ]
    max_units = _MAX_UNITS if len(ranges) < _MANY_TILES else 1
    tiles, start = [], 0
    for first, last, column, last_column in ranges:
        size = (last - first) * (last_column - column)
        unit_size = -(-size // (max_units * _UNIT_VALUES)) * _UNIT_VALUES
        tiles.append(Tile(slice(first, last), slice(column, last_column), start, -(-size // unit_size), unit_size))
        start += tiles[-1].size
    return tuple(tiles)


def _aligned_share(number: int, num_shares: int) -> int:
    return -(-number // (num_shares * ALIGNED)) * ALIGNED


class Params:
    """Parameters of the linear model on a device, as tiles.

    Args:
        num_classes: K.
        num_values: D.
        device: Where they are.
    """

    def __init__(self, num_classes: int, num_values: int, device: torch.device) -> None:
        self.num_classes, self.num_values = num_classes, num_values
        self.tiles = cut_tiles(num_classes, num_values, device.type)
        self.stored_S = torch.zeros(sum(tile.size for tile in self.tiles), device=device)
        # [U, M] and [k, c] of each tile, views of the same memory.
        self.units = [
            self.stored_S[tile.start :][: tile.size].view(tile.num_units, tile.unit_size) for tile in self.tiles
        ]
        self.matrices = [tile.matrix(units_UM) for tile, units_UM in zip(self.tiles, self.units, strict=True)]
        # The tiles of each class block, by their numbers.
        self.class_blocks = [
            list(numbers)
            for _, numbers in groupby(range(len(self.tiles)), lambda number: self.tiles[number].classes.start)
        ]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.stored_S.device

    def load(self, params_p: torch.Tensor, first: int = 0) -> None:
        """Take the parameters of some classes, the first of them given, from float32 [p], in the order of P."""
        for own, given in self._pairs(params_p, first):
            own.copy_(given)

    def save(self, params_p: torch.Tensor, first: int = 0) -> None:
        """Write the parameters of some classes, the first of them given, to float32 [p], in the order of P."""
        for own, given in self._pairs(params_p, first):
            given.copy_(own)

    def _pairs(self, params_p: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give what is stored of some classes, piece by piece, and where it is in [p]."""
        num_classes = len(params_p) // (self.num_values + 1)
        weights_kD, bias_k = split_params(params_p, num_classes)
        for tile, matrix_kc in zip(self.tiles, self.matrices, strict=True):
            start, stop = max(tile.classes.start, first), min(tile.classes.stop, first + num_classes)
            if start >= stop:
                continue
            chosen = slice(start - first, stop - first)
            own_kc = matrix_kc[start - tile.classes.start : stop - tile.classes.start]
            pixels_kd = weights_kD[chosen, tile.columns]
            yield own_kc[:, : pixels_kd.shape[1]], pixels_kd
            if tile.columns.start <= self.num_values < tile.columns.stop:
                yield own_kc[:, self.num_values - tile.columns.start], bias_k[chosen]


def split_params(params_P: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View parameters, or a gradient, as weights [K, D] and bias [K]."""
    weights_KD = params_P[:-num_classes].view(num_classes, -1)
    return weights_KD, params_P[-num_classes:]


def empty_inputs(num_rows: int, num_values: int, device: torch.device) -> torch.Tensor:
    """Make room for rows of inputs, float32 [B, C]: their pixels are zero."""
    inputs_BC = torch.zeros(num_rows, count_columns(num_values), device=device)
    inputs_BC[:, num_values] = 1
    return inputs_BC


def fill_inputs(
    inputs_BC: torch.Tensor,
    images_BD: torch.Tensor,
    centre_D: torch.Tensor | float,
    scale_D: torch.Tensor | None = None,
) -> None:
    """Write images less the mean one, times a scale, to where `empty_inputs` made room; pixels become 0 to 1."""
    values_BD = inputs_BC[:, : images_BD.shape[1]].copy_(images_BD)
    unit = 1.0 if images_BD.is_floating_point() else 1 / 255
    torch.add(-torch.as_tensor(centre_D), values_BD, alpha=unit, out=values_BD)
    if scale_D is not None:
        values_BD.mul_(scale_D)
