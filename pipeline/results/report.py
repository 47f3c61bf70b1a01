"""The page that shows a finished run: what it holds, which pictures it wants, and the file itself.

Input: the result tables and `run.json`, and pictures that somebody else fetches. Output: one HTML file. Invariant:
every figure on it is one of the tables; the same tables and pictures give the same page but for its date; all that it
shows is a bounded number of rows, so that it stays below 5 MB.

The steps: `draft.open_draft`, `mistakes.find` for each part of the predictions, `picture_keys`, and `render`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import Picture
from pipeline.results import charts, evidence, pages, sections
from pipeline.results.draft import GUESSING, Draft
from pipeline.results.figures import classifier_names
from pipeline.results.summary import STOPS

_NUM_EPOCHS = 200
_CONTENTS = (
    ("headline", "Headline"), ("accuracies", "Accuracies"), ("confusion", "Confusion"), ("mistakes", "Worst mistakes"),
    ("doubtful", "Doubtful labels"), ("duplicates", "Duplicates"), ("means", "Means and weights"),
    ("numbers", "One image as numbers"), ("training", "Training"), ("skipped", "Skipped images"),
    ("time", "Where the time went"), ("options", "Options and versions"),
)  # fmt: skip


def picture_keys(draft: Draft) -> Counter[str]:
    """Count how often the page shows each image."""
    keys: Counter[str] = Counter()
    for name in draft.wanted.classifiers:
        for mistake in draft.found.worst(name):
            keys[mistake.key] += 1
            keys.update(key for key, _, _ in evidence.shown_neighbors(mistake))
    keys.update(key for own in draft.by_pair.values() for key in own)
    for row in draft.suspects:
        keys[row["key"]] += 1
        if (other := evidence.counterpart(row, draft.found, draft.exact)) is not None:
            keys[other[0]] += 1
    keys.update(row["key"] for _, rows in draft.exact for row in rows)
    keys.update(row["key"] for rows in draft.near for row in rows)
    if draft.example_key is not None:
        keys[draft.example_key] += 1
    return keys


def render(draft: Draft, pictures: Mapping[str, Picture | Fault], pixels: npt.NDArray[np.uint8] | None) -> bytes:
    """Fill the template.

    Args:
        draft: What the page shows.
        pictures: Of its images, by key, or why there are none.
        pixels: Of the image that is shown as numbers, uint8 [H, W, C]; None if it cannot be decoded any more.
    """
    run, names = draft.run, classifier_names(draft.run["metrics"])
    best_metrics = sections.metrics_by_class(run, draft.best)
    shown_classes = sections.shown_classes(run, best_metrics)
    suggested = [row["suggested_class"] for row in draft.suspects]
    pictured = [] if evidence.has_features(run) else list(dict.fromkeys([*shown_classes, *suggested]))
    images, limit = sections.class_images(draft.output, pictured)
    page = {
        "contents": _CONTENTS,
        "tabs": [(letter, len(names)) for letter in ("c", "m")],
        "version": run["version"],
        "run": run,
        "has_features": evidence.has_features(run),
        "dataset_name": pages.dataset_name(run),
        "best": draft.best,
        "guessing": GUESSING,
        "headline": sections.headline(run),
        "accuracies": sections.accuracies(run),
        "classes": sections.classes_table(run),
        "confusions": [sections.confusion(draft.confusions[name], name, draft) for name in names],
        "mistakes": [evidence.worst_mistakes(draft, name) for name in draft.wanted.classifiers],
        "pairs": evidence.mistakes_by_pair(draft),
        "suspects": [evidence.suspect(row, draft) for row in draft.suspects],
        "exact": draft.exact,
        "near": draft.near,
        "shown_classes": shown_classes,
        "class_images": images,
        "weights_limit": limit,
        "example": sections.example(draft, pixels),
        "history": draft.history,
        "why_ended": STOPS.get(run["stopped_by"]),
        "shown_history": sections.thinned(draft.history, _NUM_EPOCHS),
        "charts": sections.training_charts(draft.history),
        "skipped": draft.skipped,
        "phases": sections.phases(run),
        "options": sections.options(run),
        "chart": {name: getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")},
    }
    return pages.render("report.html.j2", page, pictures)
