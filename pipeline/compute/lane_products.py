"""Products of rows of inputs with the parameters' tiles: logits, and the sums of lanes' gradients.

Input: inputs, and tiles or the derivatives of losses by logits. Output: logits and sums. Invariant: a lane's
products have the bits that they have alone, and lanes are added as the tree of `pipeline.tree`, so that it does not
matter who holds which lanes.

Axes: as in `tiles`; G groups of R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from pipeline.compute.threads import Threads
from pipeline.compute.tiles import ALIGNED, Params
from pipeline.tree import halve

# Of what threads share.
_TASKS_PER_THREAD = 4


def write_logits(
    params: Params,
    inputs_BC: torch.Tensor,
    counts: list[int],
    logits_BK: torch.Tensor,
    threads: Threads,
    blocks: slice = slice(None),
) -> None:
    """Compute the logits of groups of rows, each group with the bits of a product of its own.

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
    size = -(-num_classes * num_rows // ALIGNED) * ALIGNED
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
