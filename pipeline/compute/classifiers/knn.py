"""The nearest training images, each with a vote for its class.

Input: a `Block` with neighbors. Output: shares of votes and predictions. Invariant: on a tie the first class wins, as
in scikit-learn's `KNeighborsClassifier`.

Axes: N images, K classes, J neighbors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.plan import WEIGHTED_NEIGHBORS

if TYPE_CHECKING:
    from pipeline.compute.block import Block

_TEMPERATURE = 0.07


def votes(labels_NJ: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count the neighbors of each class; int64 [N, K]."""
    votes_NK = torch.zeros(len(labels_NJ), num_classes, dtype=torch.int64, device=labels_NJ.device)
    return votes_NK.scatter_add_(1, labels_NJ, torch.ones_like(labels_NJ))


def score_first(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by its nearest training images; see `classifiers.Scorer`."""
    return _score(block, 1)


def score(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by all its neighbors; see `classifiers.Scorer`."""
    return _score(block, block.neighbor_labels_NJ.shape[1])


def score_weighted(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block of features by the shares of its neighbors' weights; see `classifiers.Scorer`.

    A neighbor of cosine similarity s weighs exp(s / 0.07) (Z. Wu, Y. Xiong, S. Yu, D. Lin, "Unsupervised feature
    learning via non-parametric instance discrimination", CVPR 2018, section 3.4), as in the evaluations of DINO.
    """
    labels_NJ, distances_NJ = (each[:, :WEIGHTED_NEIGHBORS] for each in block.voters)
    # Of a constant factor, the largest is 1: in float64, whose sums of twenty go by their order, the nearest first.
    weights_NJ = ((distances_NJ[:, :1] - distances_NJ).double() / _TEMPERATURE).exp_()
    weights_NK = torch.zeros(len(labels_NJ), len(block.trained.counts_K), dtype=torch.float64, device=labels_NJ.device)
    rows_N = torch.arange(len(labels_NJ), device=labels_NJ.device)
    for labels_N, own_N in zip(labels_NJ.T, weights_NJ.T, strict=True):
        weights_NK[rows_N, labels_N] += own_N
    return (weights_NK / weights_NK.sum(1, keepdim=True)).float(), weights_NK.argmax(1)


def _score(block: Block, num_neighbors: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels_NJ = block.neighbor_labels_NJ[:, :num_neighbors]
    votes_NK = votes(labels_NJ, len(block.trained.counts_K))
    # argmax returns the first of several maxima: https://docs.pytorch.org/docs/stable/generated/torch.argmax.html
    return votes_NK / labels_NJ.shape[1], votes_NK.argmax(1)
