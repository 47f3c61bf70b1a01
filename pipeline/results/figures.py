"""Counts to accuracies, precisions and F1.

Input: confusion counts and epoch sums, all of them whole numbers or sums by lane and part. Output: figures with their
intervals. Invariant: the same counts give the same figures, in whatever order they were added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config

# The 0.975 quantile of the standard normal distribution, for an interval of 95 %.
_Z = 1.959963984540054
# How far along its gradient the loss of an epoch's last step is measured, in steps of the length that was taken.
LINE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# Among the classes of the best scores, so many, the true class is looked for where there are more than twice as many.
TOP = 5


@dataclass(frozen=True)
class Metric:
    """One row of `metrics.parquet`.

    Attributes:
        classifier: Its name.
        scope: `class`, `all`, or `mean_of_classes`, the plain mean over the classes that have images.
        class_name: For scope `class`.
        num_images: Validation images; None for `mean_of_classes`, as the other counts and the interval.
        num_correct: Of these, predicted right.
        accuracy: 0 to 1; None where there is no image. That of a class is its recall.
        accuracy_low: Lower end of the 95 % interval.
        accuracy_high: Upper end.
        precision: Of the images that are predicted to be of the class, the share that is, 0 to 1; 0 where none is
            predicted. None for a class without images, and for `all`, where it is the accuracy.
        f1: The harmonic mean of precision and recall, 0 to 1; None likewise.
        top5_accuracy: For `all`, the share of images whose class is among those of the five best scores; None where
            there are ten classes or fewer, or no scores.
    """

    classifier: str
    scope: str
    class_name: str | None
    num_images: int | None
    num_correct: int | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    precision: float | None = None
    f1: float | None = None
    top5_accuracy: float | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one actor: its own share of the counts, and what all actors hold alike.

    Attributes:
        epoch: From 1.
        num_steps: Steps taken.
        lane_losses: By lane, the sum of its images' losses while training, in nats.
        num_train_correct: Images predicted right while training.
        num_train: Images trained on.
        part_losses: By part, the sum of its validation images' losses after the epoch.
        valid_confusion: int64 [K, K] of the parts held here, after the epoch.
        gradient_norm: Mean over the steps of the norm of the mean gradient.
        seconds: Time taken.
        line_sums: By lane, sums over its images in the last step: the losses at the lengths `LINE`, the slope at the
            first of these, and their number.
    """

    epoch: int
    num_steps: int
    lane_losses: dict[int, float]
    num_train_correct: int
    num_train: int
    part_losses: dict[int, float]
    valid_confusion: npt.NDArray[np.int64]
    gradient_norm: float
    seconds: float
    line_sums: dict[int, list[float]]


@dataclass(frozen=True)
class EpochMetric:
    """One row of `history.parquet`: training figures measured during the epoch, validation figures after the epoch.

    Losses are means over images, in nats; accuracies 0 to 1. `step_losses` are those of the last step's images at the
    lengths `LINE` along their gradient, `step_slope` the slope at the first of these, in nats a step.
    """

    epoch: int
    num_steps: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    valid_mean_class_accuracy: float
    gradient_norm: float
    seconds: float
    step_losses: list[float] = field(default_factory=list)
    step_slope: float | None = None


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """Compute the 95 % score interval of a proportion.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22
    (1927), 209-212. Unlike the normal approximation it stays inside 0 to 1 and holds for accuracies near 1.
    """
    share = num_correct / num_images
    widening = _Z**2 / num_images
    centre = (share + widening / 2) / (1 + widening)
    half = _Z / (1 + widening) * math.sqrt(share * (1 - share) / num_images + widening / (4 * num_images))
    # With no image wrong, or none right, the end is exact; rounding must not push it past.
    low = 0.0 if num_correct == 0 else centre - half
    high = 1.0 if num_correct == num_images else centre + half
    return low, high


def has_top(num_classes: int) -> bool:
    """Say whether it tells anything that a class is among the `TOP` best: of ten, half of all guesses are."""
    return num_classes > 2 * TOP


def accuracies(
    classifier: str, classes: Sequence[str], confusion_KK: npt.NDArray[np.int64], num_in_top: int | None = None
) -> list[Metric]:
    """Turn one classifier's confusion counts into its rows of figures.

    Precision, recall (the accuracy of a class), F1 and their means are those of scikit-learn's `classification_report`
    with `labels` the classes that have images: of a class without any there is nothing to say, and it counts for no
    mean.

    Args:
        classifier: Its name.
        classes: Names of the K classes.
        confusion_KK: Images by true class (rows) and predicted class (columns), of which there may be further ones.
        num_in_top: Images whose class is among those of the `TOP` best scores; None where these are not looked at.
    """
    num_predicted_K = confusion_KK.sum(0)
    rows = []
    for label, name in enumerate(classes):
        num_images, num_correct = int(confusion_KK[label].sum()), int(confusion_KK[label, label])
        row = _metric(classifier, "class", name, num_images, num_correct)
        if num_images > 0:
            num_predicted = int(num_predicted_K[label])
            # Without a prediction precision is 0 / 0, and as in scikit-learn 0; F1 is 2 / (1 / precision + 1 / recall).
            precision = num_correct / num_predicted if num_predicted else 0.0
            row = replace(row, precision=precision, f1=2 * num_correct / (num_images + num_predicted))
        rows.append(row)
    total = _metric(classifier, "all", None, int(confusion_KK.sum()), int(np.trace(confusion_KK)))
    if num_in_top is not None and total.num_images:
        total = replace(total, top5_accuracy=num_in_top / total.num_images)
    accuracy, precision, f1 = (
        _mean([value for row in rows if (value := getattr(row, name)) is not None])
        for name in ("accuracy", "precision", "f1")
    )
    mean = Metric(classifier, "mean_of_classes", None, None, None, accuracy, None, None, precision, f1)
    return [*rows, total, mean]


def mean_class_accuracy(confusion_KK: npt.NDArray[np.int64]) -> float:
    """Average the accuracies of the classes that have images."""
    counts_K = confusion_KK.sum(1)
    has_images_K = counts_K > 0
    return _mean((np.diag(confusion_KK)[has_images_K] / counts_K[has_images_K]).tolist())


def _mean(shares: Sequence[float]) -> float:
    return math.fsum(shares) / len(shares)


def epoch_metric(records: Sequence[EpochRecord]) -> EpochMetric:
    """Put the records that all actors made of one epoch together.

    Losses are added exactly, so that it does not matter which actor held which lane or part.
    """
    num_train = sum(record.num_train for record in records)
    valid_confusion_KK = sum((record.valid_confusion for record in records[1:]), records[0].valid_confusion)
    num_valid = int(valid_confusion_KK.sum())
    train_losses = [loss for record in records for loss in record.lane_losses.values()]
    valid_losses = [loss for record in records for loss in record.part_losses.values()]
    *line, num_in_step = map(
        math.fsum, zip(*(sums for each in records for sums in each.line_sums.values()), strict=True)
    )
    return EpochMetric(
        epoch=records[0].epoch,
        num_steps=records[0].num_steps,
        train_loss=math.fsum(train_losses) / num_train,
        train_accuracy=sum(record.num_train_correct for record in records) / num_train,
        valid_loss=math.fsum(valid_losses) / num_valid,
        valid_accuracy=int(np.trace(valid_confusion_KK)) / num_valid,
        valid_mean_class_accuracy=mean_class_accuracy(valid_confusion_KK),
        gradient_norm=records[0].gradient_norm,
        seconds=max(record.seconds for record in records),
        step_losses=[loss / num_in_step for loss in line[:-1]],
        step_slope=line[-1] / num_in_step,
    )


def stop_reason(config: Config, history: Sequence[EpochMetric]) -> str | None:
    """Say which of the four rules ends the training after the epochs in `history`, if one does."""
    if not history:
        return None
    accuracies = [row.valid_accuracy for row in history]
    best_epoch = accuracies.index(max(accuracies)) + 1
    if len(history) >= config.epochs:
        return "epochs"
    if config.target_accuracy is not None and accuracies[-1] >= config.target_accuracy:
        return "target_accuracy"
    if config.patience is not None and len(history) - best_epoch >= config.patience:
        return "patience"
    if config.max_seconds is not None and sum(row.seconds for row in history) >= config.max_seconds:
        return "max_seconds"
    return None


def classifier_names(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the classifiers, in their order, from the rows of `metrics.parquet`."""
    return list(dict.fromkeys(row["classifier"] for row in metrics))


def best_classifier(metrics: Iterable[Mapping[str, Any]]) -> str:
    """Return the classifier with the highest accuracy of all images, the first on a tie."""
    rows = [row for row in metrics if row["scope"] == "all"]
    return str(max(rows, key=lambda row: row["accuracy"] or 0.0)["classifier"])


def _metric(classifier: str, scope: str, class_name: str | None, num_images: int, num_correct: int) -> Metric:
    if num_images == 0:
        return Metric(classifier, scope, class_name, 0, 0, None, None, None)
    low, high = wilson_interval(num_correct, num_images)
    return Metric(classifier, scope, class_name, num_images, num_correct, num_correct / num_images, low, high)
