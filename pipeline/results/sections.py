"""The sections of the page, each as what its part of the template needs.

Input: the content of `run.json`, tables, and rows found in the predictions. Output: dictionaries of plain values.
Invariant: figures are those of the tables, unrounded: the template writes them.

K classes, H height, W width, C channels, D = H·W·C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.results import charts
from pipeline.results.draft import GUESSING, Confusion, Draft
from pipeline.results.evidence import has_features
from pipeline.results.figures import LINE, best_classifier, classifier_names
from pipeline.results.finished import read_batches
from pipeline.results.texts import option_name
from pipeline.results.writing import Output

# Of more classes a heat map cannot be read; their most confused pairs are listed.
_MAX_MATRIX_CLASSES = 24
# Classifiers that are the user's own, as the headline calls them.
_CALLED = {"model": "your model", "scores": "your predictions"}
_MAX_SHOWN_CLASSES = 24
_MAX_TABLE_CLASSES = 2000
_MAX_TABLE_SIDE = 32
_NUM_DISTANCES = 12
_NUM_POINTS = 300
# ITU-R BT.601, as in Pillow's mode L.
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])
# Of WCAG 2.2, and where black and white text are told from it equally well.
_LUMINANCE, _EVEN_LUMINANCE = np.array([0.2126, 0.7152, 0.0722]), 0.179


def metrics_by_class(run: Mapping[str, Any], classifier: str) -> dict[str, Mapping[str, Any]]:
    """Return one classifier's figures by class."""
    rows = (row for row in run["metrics"] if row["scope"] == "class" and row["classifier"] == classifier)
    return {row["class"]: row for row in rows}


def headline(run: Mapping[str, Any]) -> dict[str, Any]:
    """Say what was evaluated, how well it went, and what to look at first."""
    totals = {row["classifier"]: row for row in run["metrics"] if row["scope"] == "all"}
    own = [name for name in _CALLED if name in totals]
    others = [row for row in run["metrics"] if row["classifier"] not in own]
    neighbors = run["neighbors"]
    num_twins = neighbors["num_twins"] if neighbors else run["duplicates"]["num_exact_twins"]
    return {
        "best": totals[best_classifier(run["metrics"])],
        "guessing": totals.get(GUESSING),
        "own": [{"name": name, "called": _CALLED[name], "accuracy": totals[name]["accuracy"]} for name in own],
        "rival": totals[best_classifier(others)] if own else None,
        "num_twins": num_twins,
        "num_suspects": neighbors["num_suspects"] if neighbors else run["duplicates"]["num_conflicts"],
        "without_twins": (neighbors or {}).get("accuracy_without_twins", {}).get(best_classifier(run["metrics"])),
    }


def accuracies(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each classifier; `more` are the figures of scopes that few runs have."""
    rows = []
    for name in classifier_names(run["metrics"]):
        own = {row["scope"]: row for row in run["metrics"] if row["classifier"] == name and row["scope"] != "class"}
        known = ("all", "mean_of_classes")
        more = {scope: row["accuracy"] for scope, row in own.items() if scope not in known}
        rows.append({"name": name, "all": own["all"], "mean": own["mean_of_classes"], "more": more})
    return rows


def classes_table(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures by class (rows) and classifier (columns), and further ones of the best classifier."""
    names, best = classifier_names(run["metrics"]), best_classifier(run["metrics"])
    by_classifier = {name: metrics_by_class(run, name) for name in names}
    further = [name for name in ("precision", "f1") if any(name in row for row in run["metrics"])]
    rows = [
        {
            "name": name,
            "num_images": row["num_images"],
            "accuracies": [by_classifier[each][name]["accuracy"] for each in names],
            "further": [row[each] for each in further],
        }
        for name, row in _lowest(by_classifier[best])
    ]
    return {"names": names, "further": further, "rows": rows, "num_classes": len(by_classifier[best])}


def _lowest(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Choose the classes that a table has room for: all, or of very many those with the lowest accuracies."""
    rows = list(metrics.items())
    if len(rows) <= _MAX_TABLE_CLASSES:
        return rows
    return sorted(rows, key=lambda row: 2.0 if row[1]["accuracy"] is None else row[1]["accuracy"])[:_MAX_TABLE_CLASSES]


def confusion(counts: Confusion, name: str, draft: Draft) -> dict[str, Any]:
    """Return one classifier's matrix, or of many classes the most confused pairs; cells with their pictures' place."""
    places = {pair: f"pair-{number}" for number, pair in enumerate(draft.by_pair)} if name == draft.best else {}
    if name != draft.best and name in draft.wanted.classifiers:
        for number, mistake in reversed(list(enumerate(draft.found.worst(name)))):
            places[mistake.given, mistake.predicted] = f"mistake-{draft.wanted.classifiers.index(name)}-{number}"
    num_classes = len(counts.classes)
    sizes_K = np.bincount(counts.counts_3R[0], counts.counts_3R[2], num_classes)
    if num_classes > _MAX_MATRIX_CLASSES:
        labels = {each: label for label, each in enumerate(counts.classes)}
        pairs = [
            {"given": given, "predicted": predicted, "num_images": number, "place": places.get((given, predicted)),
             "share": number / sizes_K[labels[given]]}
            for given, predicted, number in counts.worst_pairs()
        ]  # fmt: skip
        return {"name": name, "classes": counts.classes, "pairs": pairs, "matrix": None}
    counts_KK = np.zeros((num_classes, num_classes), np.int64)
    counts_KK[counts.counts_3R[0], counts.counts_3R[1]] = counts.counts_3R[2]
    shares_KK = counts_KK / np.maximum(sizes_K, 1)[:, None]
    largest = (shares_KK * (1 - np.eye(num_classes))).max() or 1.0
    num_own = len(draft.run["dataset"]["classes"])
    matrix = [
        [
            {"num_images": int(counts_KK[true, label]), "is_right": true == label,
             "level": 0 if true == label else charts.level(shares_KK[true, label] / largest),
             "place": places.get((given, predicted))}
            for label, predicted in enumerate(counts.classes)
        ]
        for true, given in enumerate(counts.classes[:num_own])
    ]  # fmt: skip
    return {"name": name, "classes": counts.classes, "pairs": None, "matrix": matrix}


def shown_classes(run: Mapping[str, Any], best_metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Choose the classes of which images are shown: all, or of many those with the lowest accuracies."""
    classes: list[str] = run["dataset"]["classes"]
    if len(classes) <= _MAX_SHOWN_CLASSES:
        return classes
    accuracy = {name: best_metrics[name]["accuracy"] for name in classes}
    return sorted(classes, key=lambda name: 2.0 if accuracy[name] is None else accuracy[name])[:_MAX_SHOWN_CLASSES]


def class_images(output: Output, classes: Sequence[str]) -> tuple[dict[str, dict[str, Any]], float]:
    """Return by class its mean image and its weights as pictures, and the ends of the scale of all weights."""
    shown: dict[str, dict[str, Any]] = {name: {"name": name, "weights": None} for name in classes}
    for row in _rows_one_by_one(output, "means", classes):
        picture = charts.grey_or_colour_png(_to_image(row, "mean"))
        shown[row["class"]] |= {"mean": picture, "num_images": row["num_images"], "width": row["width"]}
    # Of colour, the sum over the channels: what a grey pixel there would weigh.
    weights = {row["class"]: _to_image(row, "weights").sum(2) for row in _rows_one_by_one(output, "weights", classes)}
    limit = max((float(np.abs(own).max()) for own in weights.values()), default=0.0)
    for name, own in weights.items():
        shown[name]["weights"] = charts.diverging_png(own, limit)
    return shown, limit


def _rows_one_by_one(output: Output, name: str, classes: Sequence[str]) -> Any:
    """Read rows of large lists, those of some classes, with the lists as arrays."""
    wanted = set(classes)
    for batch in read_batches(output, name, batch_rows=1):
        if batch["class"][0].as_py() in wanted:
            lists = ("mean", "weights")
            yield {
                column: batch[column].flatten().to_numpy() if column in lists else batch[column][0].as_py()
                for column in batch.schema.names
            }


def _to_image(row: Mapping[str, Any], column: str) -> npt.NDArray[np.float32]:
    image_HWC: npt.NDArray[np.float32] = row[column].reshape(row["height"], row["width"], row["channels"])
    return image_HWC


def example(draft: Draft, pixels_HWC: npt.NDArray[np.uint8] | None) -> dict[str, Any]:
    """Return one image as numbers, and its distances to the class means, nearest by rms first."""
    key = draft.example_key
    shown: dict[str, Any] = {"key": key, "is_chosen": draft.example is not None, "pixels": None, "decoded": None}
    shown["distances"] = None
    seen = draft.found.by_key.get(key or "") or next(
        (each for each in draft.found.worst(draft.best) if each.key == key), None
    )
    shown["seen"] = seen or (draft.found.first if draft.found.first and draft.found.first.key == key else None)
    if pixels_HWC is None:
        return shown
    if max(pixels_HWC.shape[:2]) <= _MAX_TABLE_SIDE:
        shown["pixels"] = _shaded_table(pixels_HWC)
    shown["decoded"] = charts.grey_or_colour_png(pixels_HWC / np.float32(255))
    if not has_features(draft.run):
        shown["distances"], shown["num_distances"] = _distances(draft, pixels_HWC)
    return shown


def _shaded_table(pixels_HWC: npt.NDArray[np.uint8]) -> list[list[tuple[int, str, bool]]]:
    """Return each pixel's brightness, its colour as CSS writes it, and whether white text is read best on it."""
    colours_HW3 = np.broadcast_to(pixels_HWC, (*pixels_HWC.shape[:2], 3))
    brightness_HW = np.rint(colours_HW3 @ _BRIGHTNESS).astype(int)
    share_HW3 = colours_HW3 / 255
    linear_HW3 = np.where(share_HW3 <= 0.04045, share_HW3 / 12.92, ((share_HW3 + 0.055) / 1.055) ** 2.4)
    is_dark_HW = linear_HW3 @ _LUMINANCE < _EVEN_LUMINANCE
    rows = zip(brightness_HW.tolist(), colours_HW3.tolist(), is_dark_HW.tolist(), strict=True)
    return [[(value, bytes(colour).hex(), dark) for value, colour, dark in zip(*row, strict=True)] for row in rows]


def _distances(draft: Draft, pixels_HWC: npt.NDArray[np.uint8]) -> tuple[list[tuple[str, float, float]], int]:
    image_D = pixels_HWC.reshape(-1).astype(np.float64) / 255
    rows = []
    for row in _rows_one_by_one(draft.output, "means", draft.wanted.classes):
        apart_D = image_D - row["mean"]
        rows.append((row["class"], float(np.abs(apart_D).mean()), float(np.sqrt(np.square(apart_D).mean()))))
    rows.sort(key=lambda row: row[2])
    return rows[:_NUM_DISTANCES], len(rows)


def thinned(rows: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Return at most so many rows, evenly, the first and the last among them."""
    if len(rows) <= number:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (number - 1))] for index in range(number)]


def training_charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the curves by epoch."""
    history = thinned(history, _NUM_POINTS)
    if not history:
        return []
    kinds = (
        ("Loss", "nats per image", {"training": "train_loss", "validation": "valid_loss"}),
        ("Accuracy", "share of images", {"training": "train_accuracy", "validation": "valid_accuracy"}),
        ("Gradient", "norm, mean over the steps", {"training": "gradient_norm"}),
    )
    drawn = [
        {"title": title, "unit": f"{unit}, by epoch",
         **charts.line_chart(
             [row["epoch"] for row in history],
             [(name, [row[column] for row in history]) for name, column in columns.items()],
         )}
        for title, unit, columns in kinds
    ]  # fmt: skip
    if last := history[-1].get("step_losses"):
        slope = history[-1]["step_slope"]
        # The tangent goes on as far as it is on the drawing.
        tangent = [last[0] + slope * length for length in LINE]
        num_shown = max(2, sum(value >= min(last) - (max(last) - min(last)) / 4 for value in tangent))
        chart = charts.line_chart(LINE, [("loss", last), ("slope", tangent[:num_shown])], (0, 1, 2, 4, 6, 8))
        drawn.append({"title": "Loss along the last gradient", "unit": "nats per image, by length in steps", **chart})
    return drawn


def phases(run: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return each phase with its seconds and its share of all of them."""
    spent = {name: seconds for name, seconds in run["seconds"].items() if name != "total"}
    return [(name, seconds, seconds / (run["seconds"]["total"] or 1.0)) for name, seconds in spent.items()]


def options(run: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return each option with its value, and whether it is another one than the default."""
    defaults = {each.name: each.default for each in fields(Config) if each.default is not MISSING}
    rows = []
    for name, value in run["options"].items():
        default = list(defaults[name]) if isinstance(defaults.get(name), tuple) else defaults.get(name)
        text = ("on" if value else "off") if isinstance(value, bool) else _option_text(value)
        rows.append((option_name(name), text or "-", name in defaults and value != default))
    return rows


def _option_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
