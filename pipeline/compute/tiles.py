"""The parameters of the linear model, cut into tiles that stay in a processor's cache.

Input: parameters as results hold them, and rows of inputs. Output: logits, and gradients tile by tile. Invariant: how
parameters are cut follows from K, D and the kind of device alone; each lane is multiplied by itself, and lanes are
added as the tree of `pipeline.tree`, so that it does not matter who holds which lanes.

A row of inputs is an image's D pixels, a 1 whose weight is the bias, and zeros: C columns. A tile holds the weights of
some classes for some columns, in one piece of memory: rows that lie as far apart as those of a whole matrix displace
each other from the cache.

Axes: B rows of a step, C columns, D values of an image, K classes, P parameters (K·D weights, class by class, then K
biases), S stored values, U units of a tile, M values of a unit; k classes and c columns of a tile. All is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from pipeline.compute.threads import Threads
from pipeline.tree import halve

# Four of them, as many as a tree of eight lanes needs, stay in a core's cache or close to it; a GPU wants enough work
# for all its processors.
_TILE_VALUES = {"cpu": 2**17, "cuda": 2**24}
_MAX_TILE_CLASSES = 512
# A smaller model is one tile: more would cost more calls than threads could save.
_WHOLE_VALUES = {"cpu": 2**15, "cuda": 2**24}
# Columns begin where memory is aligned to 64 bytes; the last bits of products depend on it on some processors.
_ALIGNED = 16
# Many classes are cut into so many blocks, of which actors have some each. A block's tiles, its part of a step's logits
# and rows of inputs stay in a core's cache.
_MIN_SHARED_CLASSES = 256
_MAX_CLASS_BLOCKS = 8
# A tile is stepped unit by unit, each by one actor. Operations go through whole vectors of it, whoever does them.
_UNIT_VALUES = 64
_MAX_UNITS = 8
# With so many tiles actors have whole ones.
_MANY_TILES = 32
# Of what threads share.
_TASKS_PER_THREAD = 4


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
    return -(-(num_values + 1) // _ALIGNED) * _ALIGNED


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
        most = max(_ALIGNED, _TILE_VALUES[device_type] // tile_classes)
        tile_columns = _aligned_share(num_columns, -(-num_columns // most))
    elif num_classes * num_columns > _WHOLE_VALUES[device_type]:
        tile_classes = _aligned_share(num_classes, -(-num_classes // _MAX_TILE_CLASSES))
        most = max(_ALIGNED, _TILE_VALUES[device_type] // tile_classes)
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
    return -(-number // (num_shares * _ALIGNED)) * _ALIGNED


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


def write_logits(
    params: Params,
    inputs_BC: torch.Tensor,
    counts: list[int],
    logits_BK: torch.Tensor,
    threads: Threads,
    blocks: slice = slice(None),
) -> None:
    """Compute the logits of groups of rows, each group by products of its own.

    Args:
        params: The model.
        inputs_BC: Of all groups, one behind the other.
        counts: Rows of each group, adding up to B.
        logits_BK: Overwritten.
        threads: They share class blocks and groups.
        blocks: The class blocks whose logits are computed.
    """
    if len(params.tiles) == 1:
        _write_whole_logits(params.matrices[0], inputs_BC, counts, logits_BK)
        return
    inputs, logits = inputs_BC.split(counts), logits_BK.split(counts)

    def fill(task: tuple[list[int], slice]) -> None:
        numbers, groups = task
        classes = params.tiles[numbers[0]].classes
        some_logits = [logits_RK[:, classes] for logits_RK in logits[groups]]
        for place, number in enumerate(numbers):
            # Tile by tile and then group by group: a tile is read from memory once.
            columns, weights_ck = params.tiles[number].columns, params.matrices[number].T
            for logits_Rk, inputs_RC in zip(some_logits, inputs[groups], strict=True):
                if place == 0:
                    torch.mm(inputs_RC[:, columns], weights_ck, out=logits_Rk)
                else:
                    torch.addmm(logits_Rk, inputs_RC[:, columns], weights_ck, out=logits_Rk)

    chosen = params.class_blocks[blocks]
    # Several for each thread, so that all have about as much to do.
    num_shares = -(-_TASKS_PER_THREAD * threads.number // max(1, len(chosen))) if threads.number > 1 else 1
    size = -(-len(inputs) // num_shares)
    shares = [slice(first, first + size) for first in range(0, len(inputs), size)]
    tasks = [(numbers, groups) for numbers in chosen for groups in shares]
    threads.run(fill, tasks)


def _write_whole_logits(
    weights_KC: torch.Tensor, inputs_BC: torch.Tensor, counts: list[int], logits_BK: torch.Tensor
) -> None:
    """Do as `write_logits` with one tile.

    [K, C] by [C, R]: of few classes in half the time that [R, C] by [C, K] takes.
    """
    (num_classes, num_columns), most = weights_KC.shape, max(counts)
    if min(counts) == most:
        products_GKR = _empty_products(len(counts), num_classes, most, weights_KC)
        if multiplies_at_once(len(counts), most, num_classes, num_columns, weights_KC.device.type):
            _multiply_groups(weights_KC, inputs_BC, products_GKR)
        else:
            for products_KR, inputs_CR in zip(products_GKR.unbind(), inputs_BC.T.split(counts, 1), strict=True):
                torch.mm(weights_KC, inputs_CR, out=products_KR)
        logits_BK.unflatten(0, (len(counts), most)).copy_(products_GKR.transpose(1, 2))
        return
    for inputs_CR, logits_RK in zip(inputs_BC.T.split(counts, 1), logits_BK.split(counts), strict=True):
        logits_RK.copy_(torch.mm(weights_KC, inputs_CR).T)


def _empty_products(num_groups: int, num_classes: int, num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """Make room for products of groups, [G, K, R], each of which begins where memory is aligned."""
    size = -(-num_classes * num_rows // _ALIGNED) * _ALIGNED
    return like.new_empty_strided((num_groups, num_classes, num_rows), (size, num_rows, 1))


def _multiply_groups(weights_KC: torch.Tensor, inputs_BC: torch.Tensor, products_GKR: torch.Tensor) -> None:
    num_groups = len(products_GKR)
    inputs_GRC = inputs_BC.unflatten(0, (num_groups, -1))
    torch.bmm(weights_KC.expand(num_groups, -1, -1), inputs_GRC.transpose(1, 2), out=products_GKR)


def add_equal_lanes(errors_kB: torch.Tensor, inputs_Bc: torch.Tensor, buffers_Gkc: torch.Tensor) -> None:
    """Do as `add_lanes` with lanes of as many rows each, by one call for their products; the first buffer is the sum.

    It is for where `multiplies_at_once` says that this makes no difference.
    """
    _multiply_lanes(errors_kB, inputs_Bc, buffers_Gkc)
    num_lanes = len(buffers_Gkc)
    if num_lanes.bit_count() > 1:
        add_tree(buffers_Gkc.unbind())
        return
    for level in range(num_lanes.bit_length() - 1):  # level by level, the same tree
        buffers_Gkc[:: 2 << level].add_(buffers_Gkc[1 << level :: 2 << level])


def _multiply_lanes(errors_kB: torch.Tensor, inputs_Bc: torch.Tensor, buffers_Gkc: torch.Tensor) -> None:
    num_lanes = len(buffers_Gkc)
    errors_kGR = errors_kB.unflatten(1, (num_lanes, -1))
    torch.bmm(errors_kGR.transpose(0, 1), inputs_Bc.unflatten(0, (num_lanes, -1)), out=buffers_Gkc)


@cache
def multiplies_at_once(num_groups: int, num_rows: int, num_classes: int, num_columns: int, device_type: str) -> bool:
    """Say whether the products of some groups of rows have the same bits when one call makes them all.

    Another actor, which has other groups, may make each by itself. It is tried for every shape on random numbers.
    """
    if device_type != "cpu" or num_rows == 0 or num_groups == 1:
        return False
    numbers = torch.Generator().manual_seed(0)
    weights_KC = torch.randn(num_classes, num_columns, generator=numbers)
    inputs_BC = torch.randn(num_groups * num_rows, num_columns, generator=numbers)
    errors_KB = torch.randn(num_groups * num_rows, num_classes, generator=numbers).T
    products_GKR = _empty_products(num_groups, num_classes, num_rows, weights_KC)
    _multiply_groups(weights_KC, inputs_BC, products_GKR)
    sums_GKC = torch.empty(num_groups, num_classes, num_columns)
    _multiply_lanes(errors_KB, inputs_BC, sums_GKC)
    groups = zip(inputs_BC.split(num_rows), errors_KB.split(num_rows, 1), products_GKR, sums_GKC, strict=True)
    return all(
        torch.equal(weights_KC @ inputs_RC.T, products_KR) and torch.equal(errors_KR @ inputs_RC, sums_KC)
        for inputs_RC, errors_KR, products_KR, sums_KC in groups
    )


def add_lanes(errors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> None:
    """Add the gradients of lanes, as a tree.

    Args:
        errors: Of each lane the derivatives of its rows' losses by the logits, [k, R].
        inputs: Of each lane, [R, c].
        buffers: Room for [k, c] each, one more than the tree has levels; the first becomes the sum.
    """
    if len(errors) == 1:
        torch.mm(errors[0], inputs[0], out=buffers[0])
        return
    middle = halve(len(errors))
    add_lanes(errors[:middle], inputs[:middle], buffers)
    if len(errors) - middle == 1 and _adds_last(*errors[-1].shape, inputs[-1].shape[1], inputs[-1].device.type):
        buffers[0].addmm_(errors[-1], inputs[-1])
        return
    add_lanes(errors[middle:], inputs[middle:], buffers[1:])
    buffers[0].add_(buffers[1])


@cache
def _adds_last(num_classes: int, num_rows: int, num_columns: int, device_type: str) -> bool:
    """Say whether `addmm` gives the bits of a product that is added when it is whole, as another actor may add it.

    It does where the library goes through all rows at once, which is tried for every shape on random numbers.
    """
    if device_type != "cpu" or num_rows == 0:
        return False
    numbers = torch.Generator().manual_seed(0)
    errors_kR = torch.randn(num_rows, num_classes, generator=numbers).T
    inputs_Rc = torch.randn(num_rows, num_columns, generator=numbers)
    sum_kc = torch.randn(num_classes, num_columns, generator=numbers)
    return torch.equal(torch.addmm(sum_kc, errors_kR, inputs_Rc), sum_kc + errors_kR @ inputs_Rc)


def add_tree(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add tensors as a tree, in place: the first becomes the sum, and is returned."""
    if len(tensors) > 1:
        middle = halve(len(tensors))
        add_tree(tensors[:middle]).add_(add_tree(tensors[middle:]))
    return tensors[0]
