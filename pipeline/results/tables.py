"""The layouts of the result tables.

Input: figures, counts, parameters and scored parts. Output: Arrow tables, one for each Parquet file. Invariant: column
names and types depend on the classes and the classifiers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.files import display
from pipeline.decoding.images import Fault
from pipeline.results.figures import EpochMetric, Metric

# Scores of an image that are kept where not all are.
_NUM_TOP = 10
SKIPPED_SCHEMA = pa.schema(
    [("key", pa.string()), ("split", pa.string()), ("class", pa.string()), ("reason", pa.string()),
     ("error", pa.string())]
)  # fmt: skip
DUPLICATES_SCHEMA = pa.schema(
    [("kind", pa.string()), ("group", pa.int64()), ("key", pa.string()), ("split", pa.string()), ("class", pa.string()),
     ("distance", pa.float32()), ("ratio", pa.float32())]
)  # fmt: skip
SUSPECTS_SCHEMA = pa.schema(
    [("key", pa.string()), ("split", pa.string()), ("class", pa.string()), ("suggested_class", pa.string()),
     ("score", pa.float32())]
)  # fmt: skip


@dataclass(frozen=True)
class NeighborColumns:
    """What predictions say of the nearest training images of N images, nearest first.

    Attributes:
        keys_NJ: str.
        labels_NJ: Their classes, int64.
        distances_NJ: rms, float32, 0 to 1; of features cosine distances, 0 to 2.
        voters: Of features, the classes and distances of those that vote by weights, of which there may be more.
    """

    keys_NJ: npt.NDArray[np.object_]
    labels_NJ: npt.NDArray[np.int64]
    distances_NJ: npt.NDArray[np.float32]
    voters: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class TopScores:
    """The best scores of N images, best first; of equal ones the first class's.

    Attributes:
        scores_NT: float32.
        labels_NT: Their classes, int64.
        own_N: The scores of the images' own classes, float32.
    """

    scores_NT: npt.NDArray[np.float32]
    labels_NT: npt.NDArray[np.int64]
    own_N: npt.NDArray[np.float32]


def choose_top(
    scores_NK: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], *, are_distances: bool
) -> TopScores:
    """Choose the best scores of each image.

    Args:
        scores_NK: Numbers, or infinite.
        labels_N: The images' own classes.
        are_distances: Whether the smallest is the best.
    """
    # The bits of floats that are not negative are ordered as they are, those of others the other way round; behind them
    # goes the class, so that none tie.
    bits_NK = (scores_NK + np.float32(0)).view(np.int32).astype(np.int64)
    bits_NK = np.where(bits_NK < 0, -(2**31) - bits_NK, bits_NK)
    keys_NK = (bits_NK if are_distances else -bits_NK) << 32 | np.arange(scores_NK.shape[1])
    num_top = min(_NUM_TOP, scores_NK.shape[1])
    labels_NT = np.sort(np.partition(keys_NK, num_top - 1, 1)[:, :num_top], 1) & (2**32 - 1)
    own_N = np.take_along_axis(scores_NK, labels_N[:, None], 1)[:, 0]
    return TopScores(np.take_along_axis(scores_NK, labels_NT, 1), labels_NT, own_N)


def metrics_table(metrics: Sequence[Metric]) -> pa.Table:
    """Lay out `metrics.parquet`."""
    rows = [asdict(metric) for metric in metrics]
    schema = pa.schema(
        [("classifier", pa.string()), ("scope", pa.string()), ("class", pa.string()), ("num_images", pa.int64()),
         ("num_correct", pa.int64()), ("accuracy", pa.float64()), ("accuracy_low", pa.float64()),
         ("accuracy_high", pa.float64()), ("precision", pa.float64()), ("f1", pa.float64()),
         ("top5_accuracy", pa.float64())]
    )  # fmt: skip
    columns = [[row["class_name" if name == "class" else name] for row in rows] for name in schema.names]
    return pa.table(columns, schema=schema)


def confusion_table(classes: Sequence[str], confusions: Mapping[str, npt.NDArray[np.int64]]) -> pa.Table:
    """Lay out `confusion.parquet`: a row for each pair of classes that occurs; null for one that the dataset lacks."""
    names = [*classes, None]
    rows = [
        (classifier, names[true], names[predicted], int(confusion_KK[true, predicted]))
        for classifier, confusion_KK in confusions.items()
        for true, predicted in np.argwhere(confusion_KK)
    ]
    schema = pa.schema(
        [("classifier", pa.string()), ("true_class", pa.string()), ("predicted_class", pa.string()),
         ("num_images", pa.int64())]
    )  # fmt: skip
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def means_table(
    classes: Sequence[str],
    shape: tuple[int, int, int],
    counts_K: npt.NDArray[np.int64],
    means_KD: npt.NDArray[np.float32],
) -> pa.Table:
    """Lay out `means.parquet`, of images of a shape of H, W, C; D is row-major, 0 to 1."""
    columns = {"class": list(classes), "num_images": counts_K, **_shape_columns(len(classes), shape)}
    return pa.table({**columns, "mean": _to_lists(means_KD)})


def weights_table(
    classes: Sequence[str],
    shape: tuple[int, int, int],
    params_P: npt.NDArray[np.float32],
    centre_D: npt.NDArray[np.float64],
    scale_D: npt.NDArray[np.float64] | None = None,
) -> pa.Table:
    """Lay out `weights.parquet` from the parameters, K·D weights and K biases, for a shape of H, W, C; D is row-major.

    The model was trained on pixels less `centre_D`, or on features that were then multiplied by `scale_D`; what is
    written is for pixels as they are, 0 to 1, or for features as they are.
    """
    columns = {"class": list(classes), **_shape_columns(len(classes), shape)}
    weights_KD, bias_K = params_P[: -len(classes)].reshape(len(classes), -1), params_P[-len(classes) :]
    if scale_D is not None:
        weights_KD = (weights_KD * scale_D).astype(np.float32)
    plain_bias_K = (bias_K - weights_KD.astype(np.float64) @ centre_D).astype(np.float32)
    return pa.table({**columns, "weights": _to_lists(weights_KD), "bias": plain_bias_K})


def history_table(history: Sequence[EpochMetric]) -> pa.Table:
    """Lay out `history.parquet`."""
    kinds = {"epoch": pa.int64(), "num_steps": pa.int64(), "step_losses": pa.list_(pa.float64())}
    schema = pa.schema([(each.name, kinds.get(each.name, pa.float64())) for each in fields(EpochMetric)])
    return pa.Table.from_pylist([asdict(row) for row in history], schema)


def predictions_table(
    classes: Sequence[str],
    keys: pa.StringArray,
    labels_N: npt.NDArray[np.int64],
    predictions_N: Mapping[str, npt.NDArray[np.int64]],
    scores: Mapping[str, npt.NDArray[np.float32] | TopScores],
    neighbors: NeighborColumns | None = None,
) -> pa.Table:
    """Lay out one part of `predictions/`; a classifier without scores has no column of them.

    Behind the dataset's classes may follow those that a model knows besides. A prediction of -1, which is a class that
    nothing here knows, is null.
    """
    names = np.array([*classes, None], object)  # Arrow's own choice would load pyarrow.compute
    columns = {"key": keys, "class": pa.array(names[labels_N], pa.string())}
    for classifier, predicted_N in predictions_N.items():
        columns[f"{classifier}_prediction"] = pa.array(names[predicted_N], pa.string())
        of_images = scores.get(classifier)
        if isinstance(of_images, TopScores):
            columns[f"{classifier}_top_classes"] = _to_lists(names[of_images.labels_NT], pa.string())
            columns[f"{classifier}_top_scores"] = _to_lists(of_images.scores_NT)
            columns[f"{classifier}_class_score"] = pa.array(of_images.own_N)
        elif of_images is not None:
            values = pa.array(of_images.reshape(-1))
            columns[f"{classifier}_scores"] = pa.FixedSizeListArray.from_arrays(values, of_images.shape[1])
    if neighbors is not None:
        columns["neighbor_keys"] = _to_lists(neighbors.keys_NJ, pa.string())
        columns["neighbor_classes"] = _to_lists(names[neighbors.labels_NJ], pa.string())
        columns["neighbor_distances"] = _to_lists(neighbors.distances_NJ)
    return pa.table(columns)


def skipped_table(skipped: Sequence[tuple[bytes, int, Fault]], split: str, classes: Sequence[str]) -> pa.Table:
    """Lay a shard's skipped images, each a key, a label and the reason, out as rows of `SKIPPED_SCHEMA`."""
    return pa.table(
        [
            [display(key) for key, _, _ in skipped],
            [split] * len(skipped),
            [classes[label] for _, label, _ in skipped],
            [fault.reason for _, _, fault in skipped],
            [fault.error for _, _, fault in skipped],
        ],
        schema=SKIPPED_SCHEMA,
    )


def _shape_columns(num_rows: int, shape: tuple[int, int, int]) -> dict[str, pa.Array]:
    sides = zip(("height", "width", "channels"), shape, strict=True)
    return {name: pa.repeat(pa.scalar(side, pa.int32()), num_rows) for name, side in sides}


def _to_lists(values_ND: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.ListArray:
    num_rows, num_values = values_ND.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_values)
    return pa.ListArray.from_arrays(offsets, pa.array(values_ND.reshape(-1), kind))
