"""The classes of a wide model, cut among actors: each steps the parameters of its own classes, on the rows of all.

Input: rows and logits of one actor. Output: those of all actors. Invariant: a product is of the same rows, classes and
columns whoever makes it, so that the number of actors changes no bit; an actor's rows stand behind those of the actors
before it, which is the order of their lanes.

Where rows are smaller than parameters, this sends less than sums of gradients would be, and makes one product of all
rows where sums need one for each lane (M. Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3, cuts a layer in
this way).

Axes: B rows of a step, D values of an image, K classes; b rows and k classes of one actor.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from pipeline.compute.collective import Collective, Pieces
from pipeline.compute.tiles import Params, has_class_blocks

# Rows of one product, at most.
ROWS = 512
_LABEL_BYTES = 8


def sends_less(num_classes: int, num_values: int, batch_size: int, image_bytes: int, device_type: str) -> bool:
    """Say whether actors share classes, by what all of them send in a step: rows and logits, or sums and parameters."""
    row_bytes = image_bytes + _LABEL_BYTES + 4 * num_classes
    param_bytes = 4 * num_classes * (num_values + 1)
    return has_class_blocks(num_classes, num_values, device_type) and batch_size * row_bytes <= 2 * param_bytes


class ClassBlocks:
    """What one actor gives to the others, and takes from them, in a step.

    Args:
        params: The model.
        collective: What connects it with the others.
    """

    def __init__(self, params: Params, collective: Collective) -> None:
        self._collective = collective
        num_blocks, num_actors = len(params.class_blocks), collective.num_actors
        firsts = [-(-rank * num_blocks // num_actors) for rank in range(num_actors + 1)]
        self._blocks = [slice(first, last) for first, last in pairwise(firsts)]
        # By rank: the numbers of the tiles, and the classes, that an actor steps.
        self.tiles = [[number for block in params.class_blocks[own] for number in block] for own in self._blocks]
        self._classes = [
            slice(params.tiles[numbers[0]].classes.start, params.tiles[numbers[-1]].classes.stop)
            if numbers
            else slice(0, 0)
            for numbers in self.tiles
        ]
        self._images_BD = torch.empty(0, 0, dtype=torch.uint8)

    @property
    def own(self) -> slice:
        """The class blocks of this actor."""
        return self._blocks[self._collective.rank]

    def gather_rows(
        self, images_bD: torch.Tensor, labels_b: torch.Tensor, counts: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """Return the images [B, D] and labels [B] of all actors, whose numbers of rows are given, and which are own."""
        rank, ends = self._collective.rank, [0, *accumulate(counts)]
        rows = [slice(first, last) for first, last in pairwise(ends)]
        if len(counts) == 1:
            return images_bD, labels_b, rows[0]
        if self._images_BD.dtype != images_bD.dtype or len(self._images_BD) < ends[-1]:
            self._images_BD = images_bD.new_empty(ends[-1], images_bD.shape[1])
        images_BD, labels_B = self._images_BD[: ends[-1]], labels_b.new_empty(ends[-1])
        images_BD[rows[rank]], labels_B[rows[rank]] = images_bD, labels_b
        self._swap(
            [images_bD, labels_b], {other: [images_BD[rows[other]], labels_B[rows[other]]] for other in self._others()}
        )
        return images_BD, labels_B, rows[rank]

    def gather_logits(self, logits_BK: torch.Tensor) -> None:
        """Complete logits of which this actor has computed those of its own classes."""
        others = self._others()
        if not others:
            return
        parts = [logits_BK[:, classes].contiguous() for classes in self._classes]
        self._swap([parts[self._collective.rank]], {other: [parts[other]] for other in others})
        for other in others:
            logits_BK[:, self._classes[other]] = parts[other]

    def _others(self) -> list[int]:
        return [rank for rank in range(self._collective.num_actors) if rank != self._collective.rank]

    def _swap(self, given: list[torch.Tensor], taken: Pieces) -> None:
        self._collective.swap(dict.fromkeys(taken, given), taken)
