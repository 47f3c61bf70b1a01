"""The layouts of the result tables.

Input: figures, counts, parameters and scored parts. Output: Arrow tables, one for each Parquet file. Invariant: column
names and types depend on the classes and the classifiers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.files import display
from pipeline.decoding.images import Fault
from pipeline.plan import Target
from pipeline.results.figures import EpochMetric, Metric

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
        distances_NJ: rms, float32, 0 to 1.
    """

    keys_NJ: npt.NDArray[np.object_]
    labels_NJ: npt.NDArray[np.int64]
    distances_NJ: npt.NDArray[np.float32]


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
    """Lay out `confusion.parquet`: a row for each pair of classes that occurs."""
    rows = [
        (classifier, classes[true], classes[predicted], int(confusion_KK[true, predicted]))
        for classifier, confusion_KK in confusions.items()
        for true, predicted in np.argwhere(confusion_KK)
    ]
    schema = pa.schema(
        [("classifier", pa.string()), ("true_class", pa.string()), ("predicted_class", pa.string()),
         ("num_images", pa.int64())]
    )  # fmt: skip
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def means_table(
    classes: Sequence[str], target: Target, counts_K: npt.NDArray[np.int64], means_KD: npt.NDArray[np.float32]
) -> pa.Table:
    """Lay out `means.parquet`; D is row-major, 0 to 1."""
    columns = {"class": list(classes), "num_images": counts_K, **_shape_columns(len(classes), target)}
    return pa.table({**columns, "mean": _to_lists(means_KD)})


def weights_table(
    classes: Sequence[str], target: Target, params_P: npt.NDArray[np.float32], centre_D: npt.NDArray[np.float64]
) -> pa.Table:
    """Lay out `weights.parquet` from the parameters, K·D weights and K biases; D is row-major.

    The model was trained on pixels less `centre_D`; the bias that is written is that for pixels as they are, 0 to 1.
    """
    columns = {"class": list(classes), **_shape_columns(len(classes), target)}
    weights_KD, bias_K = params_P[: -len(classes)].reshape(len(classes), -1), params_P[-len(classes) :]
    plain_bias_K = (bias_K - weights_KD.astype(np.float64) @ centre_D).astype(np.float32)
    return pa.table({**columns, "weights": _to_lists(weights_KD), "bias": plain_bias_K})


def history_table(history: Sequence[EpochMetric]) -> pa.Table:
    """Lay out `history.parquet`."""
    return pa.Table.from_pylist([asdict(row) for row in history])


def predictions_table(
    classes: Sequence[str],
    keys: pa.StringArray,
    labels_N: npt.NDArray[np.int64],
    predictions_N: Mapping[str, npt.NDArray[np.int64]],
    scores_NK: Mapping[str, npt.NDArray[np.float32]],
    neighbors: NeighborColumns | None = None,
) -> pa.Table:
    """Lay out one part of `predictions/`; a classifier without scores has no column of them."""
    names = np.array(classes, object)  # Arrow's own choice would load pyarrow.compute
    columns = {"key": keys, "class": pa.array(names[labels_N], pa.string())}
    for classifier, predicted_N in predictions_N.items():
        columns[f"{classifier}_prediction"] = pa.array(names[predicted_N], pa.string())
        if classifier in scores_NK:
            scores = pa.array(scores_NK[classifier].reshape(-1))
            columns[f"{classifier}_scores"] = pa.FixedSizeListArray.from_arrays(scores, len(classes))
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


def _shape_columns(num_rows: int, target: Target) -> dict[str, pa.Array]:
    sides = {"height": target.height, "width": target.width, "channels": target.channels}
    return {name: pa.repeat(pa.scalar(side, pa.int32()), num_rows) for name, side in sides.items()}


def _to_lists(values_ND: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.ListArray:
    num_rows, num_values = values_ND.shape
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * num_values)
    return pa.ListArray.from_arrays(offsets, pa.array(values_ND.reshape(-1), kind))
