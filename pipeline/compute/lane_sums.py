"""The gradients of some lanes, added tile by tile.

Input: what a step's gradient is made of. Output: the sum of all lanes' gradients of a tile. Invariant: a lane's
products have the bits that they have alone, and lanes are added as the tree of `pipeline.tree`; nothing as large as a
lane's whole gradient is ever held, unless the model is one tile.

Axes: as in `lane_products`.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

from pipeline.compute.lane_products import add_equal_lanes, add_lanes, multiplies_at_once
from pipeline.compute.tiles import Params, Tile


@dataclass(frozen=True)
class Rows:
    """What a step's gradient is made of: errors_KB, derivatives of the losses by the logits, and inputs_BC."""

    errors_KB: torch.Tensor
    inputs_BC: torch.Tensor
    lane_counts: list[int]


@dataclass(frozen=True)
class _Buffers:
    """The memory of one thread, cut for tiles of one shape: [G, k, c] in one piece, and buffers [U, M] and [k, c]."""

    lanes_Gkc: torch.Tensor
    first_UM: torch.Tensor
    second_UM: torch.Tensor
    matrices: list[torch.Tensor]


class LaneSums:
    """Sums of tiles, in buffers of the thread that asks.

    Args:
        params: The model.
        num_lanes: Lanes that are added.
    """

    def __init__(self, params: Params, num_lanes: int) -> None:
        self._params = params
        # As many as a tree of the lanes needs, and at least two; one for each lane, where one call makes all products.
        self._num_buffers = max(1, (num_lanes - 1).bit_length()) + 1
        self._is_small = len(params.tiles) == 1 and params.device.type == "cpu"
        if self._is_small:
            self._num_buffers = max(self._num_buffers, num_lanes)
        self._of_thread = threading.local()

    def buffer(self, number: int) -> torch.Tensor:
        """Return room for the sum of a tile, [U, M]."""
        return self._buffers(self._params.tiles[number]).first_UM

    def spare(self, number: int) -> torch.Tensor:
        """Return room that is free once the sum of a tile is written, [U, M]."""
        return self._buffers(self._params.tiles[number]).second_UM

    def write(self, number: int, sum_UM: torch.Tensor, rows: Rows) -> None:
        """Write the sum of the lanes' gradients of a tile, by its number, to [U, M]."""
        tile = self._params.tiles[number]
        buffers = self._buffers(tile)
        matrices = buffers.matrices
        if sum_UM is not buffers.first_UM:
            matrices = [tile.matrix(sum_UM), *matrices[1:]]
        errors, inputs, counts = rows.errors_KB, rows.inputs_BC, rows.lane_counts
        if len(self._params.tiles) > 1:
            errors, inputs = errors[tile.classes], inputs[:, tile.columns]
        are_equal = self._is_small and min(counts) == max(counts)
        if are_equal and multiplies_at_once(len(counts), counts[0], *tile.shape, inputs.device.type):
            lanes_Gkc = buffers.lanes_Gkc[: len(counts)]
            add_equal_lanes(errors, inputs, lanes_Gkc)
            if sum_UM is not buffers.first_UM:
                matrices[0].copy_(lanes_Gkc[0])
        else:
            add_lanes(errors.split(counts, 1), inputs.split(counts), matrices)
        num_values = matrices[0].numel()
        if num_values < tile.size:
            sum_UM.view(-1)[num_values:] = 0

    def _buffers(self, tile: Tile) -> _Buffers:
        """Return the buffers of the thread that asks, cut for a tile."""
        if not hasattr(self._of_thread, "cut"):
            size = max(tile.size for tile in self._params.tiles)
            self._of_thread.memory = torch.empty(self._num_buffers, size, device=self._params.device)
            self._of_thread.cut = {}
        cut: dict[tuple[int, ...], _Buffers] = self._of_thread.cut
        key = (*tile.shape, tile.num_units)
        if key not in cut:
            first_UM, second_UM, *_ = self._of_thread.memory[:, : tile.size].unflatten(1, (tile.num_units, -1))
            matrices = [tile.matrix(buffer_N[: tile.size]) for buffer_N in self._of_thread.memory]
            # In one piece, as one call of several products asks for it: the first is that of `matrices`.
            num_values = math.prod(tile.shape)
            lanes_N = self._of_thread.memory.view(-1)[: self._num_buffers * num_values]
            cut[key] = _Buffers(lanes_N.view(-1, *tile.shape), first_UM, second_UM, matrices)
        return cut[key]
