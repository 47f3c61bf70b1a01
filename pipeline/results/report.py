"""The page that shows a finished run: what it holds, which pictures it wants, and the file itself.

Input: the result tables and `run.json`, and pictures that somebody else fetches. Output: one HTML file. Invariant:
every figure on it is one of the tables; the same tables and pictures give the same page but for its date; all that it
shows is a bounded number of rows, so that it stays below 5 MB.

The steps: `draft.open_draft`, `mistakes.find` for each part of the predictions, `picture_keys`, and `render`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.decoding.images import Fault
from pipeline.decoding.thumbnails import Picture
from pipeline.results import charts, sections
from pipeline.results.draft import GUESSING, Draft, classifiers_of
from pipeline.results.terminal import STOPS

if TYPE_CHECKING:
    from markupsafe import Markup

# What all pictures together may take as files; base64 makes them a third larger, and the rest is left to text.
_PICTURES_BYTES = 2_400_000
_MAX_PICTURE_BYTES = 8_000
_NUM_EPOCHS = 200
# Categories of Unicode: controls, formats, halves of surrogate pairs, private or no characters, ends of lines.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_TEMPLATES = Path(__file__).with_name("page")


def picture_keys(draft: Draft) -> Counter[str]:
    """Count how often the page shows each image."""
    keys: Counter[str] = Counter()
    for mistakes in draft.found.worst.values():
        for mistake in mistakes:
            keys[mistake.key] += 1
            keys.update(key for key, _, _ in sections.shown_neighbors(mistake))
    keys.update(mistake.key for mistakes in draft.found.by_pair.values() for mistake in mistakes)
    for row in draft.suspects:
        keys[row["key"]] += 1
        if (other := sections.counterpart(row, draft.found, draft.exact)) is not None:
            keys[other[0]] += 1
    keys.update(row["key"] for _, rows in draft.exact for row in rows)
    keys.update(row["key"] for rows in draft.near for row in rows)
    if draft.example_key is not None:
        keys[draft.example_key] += 1
    return keys


def picture_bytes(keys: Counter[str]) -> int:
    """Return what each picture may take, so that all of them fit the page."""
    return min(_MAX_PICTURE_BYTES, _PICTURES_BYTES // max(1, keys.total()))


def render(
    draft: Draft,
    pictures: Mapping[str, Picture | Fault],
    pixels: npt.NDArray[np.uint8] | None,
    made: str,
) -> str:
    """Fill the template.

    Args:
        draft: What the page shows.
        pictures: Of its images, by key, or why there are none.
        pixels: Of the image that is shown as numbers, uint8 [H, W, C]; None if it cannot be decoded any more.
        made: When the page is made.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "count": "{:,}".format,
        "seconds": "{:.1f}".format,
        "breakable": breakable,
    }
    run = draft.run
    best_metrics = sections.metrics_by_class(run, draft.best)
    shown_classes = sections.shown_classes(run, best_metrics)
    suggested = [row["suggested_class"] for row in draft.suspects]
    pictured = [] if sections.has_features(run) else list(dict.fromkeys([*shown_classes, *suggested]))
    images, limit = sections.class_images(draft.output, pictured)
    page = {
        "run": run,
        "made": made,
        "has_features": sections.has_features(run),
        "dataset_name": sections.dataset_name(run),
        "best": draft.best,
        "guessing": GUESSING,
        "headline": sections.headline(run),
        "accuracies": sections.accuracies(run),
        "classes": sections.classes_table(run),
        "confusions": [sections.confusion(draft.confusions[name], name, draft) for name in classifiers_of(run)],
        "mistakes": [sections.worst_mistakes(draft, name) for name in draft.wanted.classifiers],
        "pairs": sections.mistakes_by_pair(draft),
        "suspects": [sections.suspect(row, draft) for row in draft.suspects],
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
        "pictures": {key: sections.picture(found) for key, found in pictures.items()},
    }
    return environment.get_template("report.html.j2").render(page)


def visible(text: str) -> str:
    r"""Spell what cannot be seen in a text, or turns the text around it, as `\u202e` and the like."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(each) if unicodedata.category(each) in _UNSEEN else each for each in text)


def _spelled(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def breakable(name: str) -> Markup:
    """Let a narrow column break a classifier's name after an underscore."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in visible(name).split("_"))


def figure(value: float | None) -> str:
    """Write a figure with four decimals, as everywhere in this program."""
    return "-" if value is None else f"{value:.4f}"
