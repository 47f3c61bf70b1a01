"""The most frequent class of the training images, for every image: what an accuracy has to beat.

Input: a `Block`. Output: predictions, and no scores. Invariant: among equally frequent classes the first is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.compute.block import Block


def score(block: Block) -> tuple[None, torch.Tensor]:
    """Predict the class of most training images; see `classifiers.Scorer`."""
    # argmax returns the first of several maxima: https://docs.pytorch.org/docs/stable/generated/torch.argmax.html
    return None, block.trained.counts_K.argmax().repeat(len(block.images_ND))
