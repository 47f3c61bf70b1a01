"""The user's own model: the probability of each class by the softmax of its logits.

Input: a `Block` with logits. Output: probabilities and predictions. Invariant: classes that the model does not know
have no probability and are never predicted; those that the dataset has not follow its own.

Axes: N images, O logits of an image, P classes of the dataset and of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipeline.compute.block import Block


def score(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the model's probabilities, float32 [N, P]; see `classifiers.Scorer`."""
    model, logits_NO = block.trained.own_model, block.logits_NO
    assert model is not None
    num_places = len(block.trained.counts_K) + len(model.extra_classes)
    places_O = torch.tensor(model.places, device=logits_NO.device)
    logits_NP = logits_NO.new_full((len(logits_NO), num_places), -torch.inf)
    logits_NP[:, places_O] = logits_NO
    # Of the logits, as probabilities of unlike ones may be equal; the first of several maxima, as everywhere.
    return logits_NP.softmax(1), logits_NP.argmax(1)
