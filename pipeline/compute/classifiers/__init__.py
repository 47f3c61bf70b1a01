"""The classifiers, as one table: columns, figures, the memory for scores and the summary follow from it.

Input: a `Block` of images with what was learnt from the training images. Output: a prediction for each image and, where
the classifier has them, a score for each class. Invariant: an image's output depends on that image and on what was
learnt, and not on the block that it is in.

A classifier is added by a file beside this one, with a function like `majority_class.score`, and a record in
`CLASSIFIERS`. The records are read by processes that never import torch: what a classifier computes with is imported by
its `load`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from pipeline.model import Model
from pipeline.plan import WEIGHTED_NEIGHBORS

if TYPE_CHECKING:
    import torch

    from pipeline.compute.block import Block

# Scores, float32 [N, K], or None; and predictions, int64 [N]. The user's own model may have more classes than K.
Scorer: TypeAlias = "Callable[[Block], tuple[torch.Tensor | None, torch.Tensor]]"


@dataclass(frozen=True)
class Classifier:
    """One classifier.

    Attributes:
        name: What columns and figures are called by.
        scorer: A module beside this one and its function that scores a block.
        has_scores: Whether it has a score for each class.
        has_distances: Whether these are distances, of which the smallest is the best.
        needs_epochs: Whether it is trained by SGD, and is left out with `--epochs 0`.
        needs_neighbors: Whether it asks the nearest training images, and is left out with `--neighbors 0`.
        needs_logits: Whether it is the user's own model.
        of: What it compares, where it does not do with both: pixels, or features.
        needs_given: Whether it tells what was predicted elsewhere, and is left out without a file of `--scores`.
        has_other: Whether it can answer a class that the dataset lacks, which is number -1.
    """

    name: str
    scorer: str
    has_scores: bool = True
    has_distances: bool = False
    needs_epochs: bool = False
    needs_neighbors: bool = False
    needs_logits: bool = False
    of: Literal["both", "pixels", "features"] = "both"
    needs_given: bool = False
    has_other: bool = False

    def load(self) -> Scorer:
        """Import and return the function that scores a block."""
        module, _, function = self.scorer.partition(".")
        scorer: Scorer = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return scorer


# In the order in which they are shown; of a name with a brace, `used_classifiers` fills in the number of neighbors.
CLASSIFIERS = (
    Classifier("majority_class", "majority_class.score", has_scores=False),
    Classifier("nearest_mean_l1", "nearest_mean.score_first", has_distances=True, of="pixels"),
    Classifier("nearest_mean_rms", "nearest_mean.score_second", has_distances=True, of="pixels"),
    Classifier("nearest_mean_euclidean", "nearest_mean.score_first", has_distances=True, of="features"),
    Classifier("nearest_mean_cosine", "nearest_mean.score_second", has_distances=True, of="features"),
    Classifier("knn_1", "knn.score_first", needs_neighbors=True),
    Classifier("knn_{}", "knn.score", needs_neighbors=True),
    Classifier(f"knn_{WEIGHTED_NEIGHBORS}", "knn.score_weighted", needs_neighbors=True, of="features"),
    Classifier("sgd_linear", "sgd_linear.score", needs_epochs=True),
    Classifier("model", "own_model.score", needs_logits=True),
    Classifier("scores", "scores.score", needs_given=True, has_other=True),
)


def used_classifiers(
    num_neighbors: int, *, has_training: bool, model: Model | None = None, given: str | None = None
) -> list[Classifier]:
    """Return the classifiers of a job, by what it has: neighbors of each image, epochs of SGD, a model, predictions.

    Where two have the same name, the one that comes last has it.
    """
    has_features = model is not None and model.has_features
    named: dict[str, Classifier] = {}
    for each in CLASSIFIERS:
        if (
            (has_training or not each.needs_epochs)
            and (num_neighbors > 0 or not each.needs_neighbors)
            and ((model is not None and not has_features) or not each.needs_logits)
            and (given is not None or not each.needs_given)
            and each.of in ("both", "features" if has_features else "pixels")
        ):
            name = each.name.format(num_neighbors)
            has_scores = each.has_scores and not (each.needs_given and given == "predictions")
            named[name] = replace(each, name=name, has_scores=has_scores)
    return list(named.values())


def score_bytes(num_classes: int, model: Model | None = None) -> int:
    """Return the bytes of one image's scores by all classifiers, whichever of them a job uses."""
    num_scores = sum(num_classes for classifier in CLASSIFIERS if classifier.has_scores)
    return 4 * (num_scores + (model.num_outputs if model and not model.has_features else 0))
