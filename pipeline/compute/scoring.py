"""A part's images scored by every classifier of the table.

Input: a `Part` and what was learnt. Output: a `ScoredPart`. Invariant: its rows are in the order of the listing.

Axes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.compute.block import Block, Trained
from pipeline.compute.classifiers import Classifier
from pipeline.compute.parts import Part
from pipeline.compute.threads import Threads
from pipeline.results.tables import NeighborColumns


@dataclass(frozen=True)
class ScoredPart:
    """A part of the validation images with what every classifier says of them.

    Attributes:
        keys: Of N images.
        labels: int64 [N].
        predictions: By classifier, int64 [N].
        scores: By classifier that has them, float32 [N, K]: distances, or probabilities.
        confusions: By classifier, int64 [K, K].
        num_twins_correct: By classifier, how many of the images with a twin in training are predicted right.
        num_twins: How many have one.
        neighbors: What is said of neighbors, where they were searched for.
    """

    keys: pa.StringArray
    labels: npt.NDArray[np.int64]
    predictions: dict[str, npt.NDArray[np.int64]]
    scores: dict[str, npt.NDArray[np.float32]]
    confusions: dict[str, npt.NDArray[np.int64]]
    num_twins_correct: dict[str, int]
    num_twins: int
    neighbors: NeighborColumns | None


def score_part(
    part: Part,
    trained: Trained,
    classifiers: Sequence[Classifier],
    device: torch.device,
    threads: Threads,
    neighbors: NeighborColumns | None = None,
    is_twin_N: npt.NDArray[np.bool_] | None = None,
) -> ScoredPart:
    """Score all images of a part, block by block.

    Args:
        part: The part, complete.
        trained: What was computed from the training images.
        classifiers: Those that this job has.
        device: Where blocks are scored.
        threads: They share the work, on the CPU.
        neighbors: Of the part's images, where they were searched for.
        is_twin_N: Likewise, whether they are a training image once more.
    """
    labels_N = part.labels()
    scorers = {classifier.name: classifier.load() for classifier in classifiers}
    predictions: dict[str, list[torch.Tensor]] = {name: [] for name in scorers}
    scores: dict[str, list[torch.Tensor]] = {classifier.name: [] for classifier in classifiers if classifier.has_scores}
    # Without neighbors, none of any image.
    neighbor_labels_NJ = torch.from_numpy(
        np.zeros((len(labels_N), 0), int) if neighbors is None else neighbors.labels_NJ
    )
    start = 0
    for images_ND, _ in part.blocks(device):
        rows = slice(start, start + len(images_ND))
        start = rows.stop
        block = Block(images_ND, trained, threads, neighbor_labels_NJ[rows].to(device))
        for name, scorer in scorers.items():
            scores_NK, predictions_N = scorer(block)
            predictions[name].append(predictions_N)
            if scores_NK is not None:
                scores[name].append(scores_NK)
    all_predictions = {name: torch.cat(blocks).cpu() for name, blocks in predictions.items()}
    num_classes = len(trained.counts_K)
    return ScoredPart(
        keys=part.keys(),
        labels=labels_N.numpy(),
        predictions={name: predictions_N.numpy() for name, predictions_N in all_predictions.items()},
        scores={name: torch.cat(blocks).cpu().numpy() for name, blocks in scores.items()},
        confusions={
            name: confusion(labels_N, predictions_N, num_classes).numpy()
            for name, predictions_N in all_predictions.items()
        },
        num_twins_correct={
            name: int((predictions_N == labels_N)[is_twin_N].sum()) if is_twin_N is not None else 0
            for name, predictions_N in all_predictions.items()
        },
        num_twins=0 if is_twin_N is None else int(is_twin_N.sum()),
        neighbors=neighbors,
    )


def confusion(labels_N: torch.Tensor, predictions_N: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count images by true class (rows) and predicted class (columns); int64 [K, K]."""
    pairs_N = labels_N * num_classes + predictions_N
    return torch.bincount(pairs_N, minlength=num_classes**2).view(num_classes, num_classes)
