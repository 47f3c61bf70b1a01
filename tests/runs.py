"""Finished runs that nobody computed: tables and `run.json` of any number of classes, with image files to them."""

import json

import numpy as np
import pyarrow as pa
from builders import encode

from pipeline.results.figures import LINE, EpochMetric, accuracies
from pipeline.results.tables import (
    DUPLICATES_SCHEMA,
    SKIPPED_SCHEMA,
    SUSPECTS_SCHEMA,
    NeighborColumns,
    choose_top,
    confusion_table,
    history_table,
    means_table,
    metrics_table,
    predictions_table,
    weights_table,
)
from pipeline.results.writing import Output, write_run, write_table
from pipeline.target import Target

CLASSIFIERS = ("majority_class", "nearest_mean_l1", "knn_5", "sgd_linear")
NUM_VALID = 3
TARGET = Target(4, 4, "L")


def make_run(folder, classes, target=TARGET, num_epochs=3, has_neighbors=True, num_parts=2, is_top=False):
    """Write a finished run of `NUM_VALID` validation images and one training image of each class; return its folder.

    With `is_top` it has the best scores alone, as runs of many classes have.
    """
    random = np.random.default_rng(3)
    num_classes, output = len(classes), Output.at(str(folder / "out"))
    names = [
        name for name in CLASSIFIERS if (num_epochs or name != "sgd_linear") and (has_neighbors or name != "knn_5")
    ]
    labels_N = np.repeat(np.arange(num_classes), NUM_VALID)
    keys = [f"valid/{classes[label]}/{row % NUM_VALID}.png" for row, label in enumerate(labels_N)]
    train_keys = np.array([f"train/{name}/0.png" for name in classes], object)
    predictions, scores = {"majority_class": np.zeros_like(labels_N)}, {}
    for name in names[1:]:
        scores[name] = random.random((len(labels_N), num_classes), np.float32)
        scores[name][np.arange(len(labels_N)), labels_N] += 0.3
        predictions[name] = scores[name].argmax(1)
    near_N2 = np.stack((labels_N, (labels_N + 1) % num_classes), 1)
    distances_N2 = np.sort(random.random((len(labels_N), 2), np.float32), 1)
    kept = {name: choose_top(own, labels_N, are_distances=False) if is_top else own for name, own in scores.items()}
    neighbors = NeighborColumns(train_keys[near_N2], near_N2, distances_N2) if has_neighbors else None
    predicted = predictions_table(classes, pa.array(keys), labels_N, predictions, kept, neighbors)
    (folder / "out" / "predictions").mkdir(parents=True)
    step = -(-len(predicted) // num_parts)
    for part in range(num_parts):
        write_table(output, f"predictions/part-{part:05d}", predicted.slice(part * step, step))
    confusions = {name: np.zeros((num_classes, num_classes), np.int64) for name in names}
    for name in names:
        np.add.at(confusions[name], (labels_N, predictions[name]), 1)
    metrics = metrics_table([row for name in names for row in accuracies(name, classes, confusions[name])])
    means_KD = random.random((num_classes, target.num_values), np.float32)
    weights_P = random.normal(size=num_classes * (target.num_values + 1)).astype(np.float32)
    pair = [keys[0], train_keys[0]]
    exact = [["exact"] * 2, [0, 0], pair, ["train", "valid"], [classes[0]] * 2, [0.0, 0.0], [None, None]]
    near = [["near"] * 2, [1, 1], pair[::-1], ["train", "valid"], [classes[0]] * 2, [0.0625] * 2, [0.25] * 2]
    duplicates = [one + other if has_neighbors else one for one, other in zip(exact, near, strict=True)]
    suspects = [[keys[1], train_keys[1]], ["valid", "train"], [classes[0], classes[1]], [classes[1], classes[0]]]
    history = [
        EpochMetric(
            epoch,
            9,
            1 / epoch,
            1 - 0.5 / epoch,
            1.25 / epoch,
            0.5,
            0.25,
            0.125 / epoch,
            1.5,
            [(step - 2) ** 2 / 16 + 0.5 for step in LINE],
            -0.25,
        )
        for epoch in range(1, num_epochs + 1)
    ]
    skipped = [["train/x.png"], ["train"], [classes[0]], ["damaged"], ["OSError: cut"]]
    tables = {
        "metrics": metrics,
        "confusion": confusion_table(classes, confusions),
        "means": means_table(classes, target.sides, np.ones(num_classes, np.int64), means_KD),
        "skipped": pa.table(skipped, schema=SKIPPED_SCHEMA),
        "duplicates": pa.table(duplicates, schema=DUPLICATES_SCHEMA),
        "suspects": pa.table([*suspects, [0.9, 0.8]], schema=SUSPECTS_SCHEMA),
    }
    if num_epochs:
        tables["weights"] = weights_table(classes, target.sides, weights_P, np.zeros(target.num_values))
        tables["history"] = history_table(history)
    for name, table in tables.items():
        write_table(output, name, table)
    counts = {"num_twins": 1, "num_near_twins": 1, "num_suspects": 2}
    accuracy = dict.fromkeys(names, 0.625)
    run = {
        "version": "1",
        "options": {"data": str(folder / "data"), "report": True, "example": None, "epochs": num_epochs, "classes": []},
        "versions": {"python": "3"},
        "dataset": {"root": str(folder / "data"), "classes": list(classes), "dropped_classes": ["<gone>"]},
        "target": {"height": target.height, "width": target.width, "mode": target.mode, "draft": True},
        "num_listed": len(keys) + num_classes + 1,
        "num_train": num_classes,
        "num_valid": len(keys),
        "num_skipped": 1,
        "num_skipped_by_reason": {"damaged": 1},
        "duplicates": {"num_exact_groups": 1, "num_exact_images": 2, "num_exact_twins": 1, "num_conflicts": 0},
        "neighbors": {**counts, "of": "valid", "accuracy_without_twins": accuracy} if has_neighbors else None,
        "stopped_by": "epochs" if num_epochs else None,
        "actors": {"devices": ["cpu"]},
        "began": "2026-01-02T03:04:05+00:00",
        "seconds": {"decode": 1.25, "train": 2.5, "total": 3.75},
        "images_per_s": 1234.5,
        "metrics": metrics.to_pylist(),
        "results_sha256": "0123abc",
        "out": output.root,
    }
    write_run(output, json.loads(json.dumps(run)))
    return folder / "out"


def make_images(folder, classes, size=(48, 64, 3), image_format="JPEG"):
    """Write the image files of such a run: noise, which takes as many bytes as a picture can."""
    random = np.random.default_rng(5)
    contents = [encode(random.integers(0, 256, size, np.uint8), image_format) for _ in range(8)]
    for label, name in enumerate(classes):
        for split, number in [("train", 1), ("valid", NUM_VALID)]:
            (folder / "data" / split / name).mkdir(parents=True)
            for row in range(number):
                (folder / "data" / split / name / f"{row}.png").write_bytes(contents[(label + row) % len(contents)])
