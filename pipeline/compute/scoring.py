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
from pipeline.results.figures import TOP, has_top
from pipeline.results.tables import NeighborColumns


@dataclass(frozen=True)
class ScoredPart:
    """A part of the validation images with what every classifier says of them.

    Attributes:
        keys: Of N images.
        labels: int64 [N].
        predictions: By classifier, int64 [N]; -1 for a class that the dataset lacks.
        scores: By classifier that has them, float32 [N, K]: distances, or probabilities.
        confusions: By classifier, int32 [K, P]: behind the K classes may follow those that the user's own model knows
            besides, and at last, of `scores`, all others.
        num_in_top: By classifier that has scores, where there are many classes, how many images have theirs among those
            of the `TOP` best scores.
        num_twins_correct: By classifier, how many of the images with a twin in training are predicted right.
        num_twins: How many have one.
        neighbors: What is said of neighbors, where they were searched for.
    """

    keys: pa.StringArray
    labels: npt.NDArray[np.int64]
    predictions: dict[str, npt.NDArray[np.int64]]
    scores: dict[str, npt.NDArray[np.float32]]
    confusions: dict[str, npt.NDArray[np.int32]]
    num_in_top: dict[str, int]
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
    voters = neighbors.voters or () if neighbors else ()
    num_classes = len(trained.counts_K)
    num_in_top = dict.fromkeys(scores, 0) if has_top(num_classes) else {}
    classifier_of = {classifier.name: classifier for classifier in classifiers}
    start = 0
    for images_ND, block_labels_N, logits_NO in part.blocks(device):
        rows = slice(start, start + len(images_ND))
        start = rows.stop
        block = Block(images_ND, trained, threads, neighbor_labels_NJ[rows].to(device), logits_NO)
        block.voters = tuple(torch.from_numpy(each[rows]).to(device) for each in voters)
        block.given = part.given(rows, device)
        for name, scorer in scorers.items():
            scores_NK, predictions_N = scorer(block)
            predictions[name].append(predictions_N)
            if scores_NK is not None:
                scores[name].append(scores_NK)
                if name in num_in_top:
                    num_in_top[name] += count_in_top(rank(classifier_of[name], scores_NK, trained), block_labels_N)
    num_known = num_classes + (len(trained.own_model.extra_classes) if trained.own_model else 0)
    num_predicted = {
        each.name: num_known + each.has_other if each.needs_logits or each.has_other else num_classes
        for each in classifiers
    }
    all_predictions = {name: torch.cat(blocks).cpu() for name, blocks in predictions.items()}
    return ScoredPart(
        keys=part.keys(),
        labels=labels_N.numpy(),
        predictions={name: predictions_N.numpy() for name, predictions_N in all_predictions.items()},
        scores={name: torch.cat(blocks).cpu().numpy() for name, blocks in scores.items()},
        confusions={
            name: confusion(labels_N, predictions_N, num_classes, num_predicted[name]).int().numpy()
            for name, predictions_N in all_predictions.items()
        },
        num_in_top=num_in_top,
        num_twins_correct={
            name: int((predictions_N == labels_N)[is_twin_N].sum()) if is_twin_N is not None else 0
            for name, predictions_N in all_predictions.items()
        },
        num_twins=0 if is_twin_N is None else int(is_twin_N.sum()),
        neighbors=neighbors,
    )


def rank(classifier: Classifier, scores_NK: torch.Tensor, trained: Trained) -> torch.Tensor:
    """Return a classifier's scores with the highest as the best, minus infinity for classes that it cannot answer."""
    if classifier.has_distances:
        return -scores_NK
    if not classifier.needs_logits or trained.own_model is None or not trained.own_model.missing_classes:
        return scores_NK
    places = torch.tensor(trained.own_model.places, device=scores_NK.device)
    return torch.full_like(scores_NK, -torch.inf).index_copy_(1, places, scores_NK[:, places])


def count_in_top(scores_NK: torch.Tensor, labels_N: torch.Tensor) -> int:
    """Count the images whose class is among those of the `TOP` highest scores; of equal scores the first class counts.

    A score of minus infinity is none, and never among them. Not by `topk`, which leaves the order of equal scores open.

    Args:
        scores_NK: float32.
        labels_N: int64.
    """
    own_N1 = scores_NK.gather(1, labels_N[:, None])
    is_before_NK = torch.arange(scores_NK.shape[1], device=scores_NK.device) < labels_N[:, None]
    num_better_N = (scores_NK > own_N1).sum(1) + ((scores_NK == own_N1) & is_before_NK).sum(1)
    return int(((num_better_N < TOP) & (own_N1[:, 0] > -torch.inf)).sum())


def confusion(
    labels_N: torch.Tensor, predictions_N: torch.Tensor, num_classes: int, num_predicted: int | None = None
) -> torch.Tensor:
    """Count images by true class (rows) and predicted class (columns), of which there may be more; int64 [K, P].

    A prediction of -1, a class that the dataset lacks, is counted in the last column.
    """
    num_columns = num_predicted or num_classes
    pairs_N = labels_N * num_columns + predictions_N % num_columns
    return torch.bincount(pairs_N, minlength=num_classes * num_columns).view(num_classes, num_columns)
