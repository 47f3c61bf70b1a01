"""The nearest training images, each with a vote for its class.

Input: a `Block` with neighbors. Output: shares of votes and predictions. Invariant: on a tie the first class wins, as
in scikit-learn's `KNeighborsClassifier`.

Axes: N images, K classes, J neighbors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipeline.compute.block import Block


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


def _score(block: Block, num_neighbors: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels_NJ = block.neighbor_labels_NJ[:, :num_neighbors]
    votes_NK = votes(labels_NJ, len(block.trained.counts_K))
    # argmax returns the first of several maxima: https://docs.pytorch.org/docs/stable/generated/torch.argmax.html
    return votes_NK / labels_NJ.shape[1], votes_NK.argmax(1)
