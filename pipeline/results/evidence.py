"""Mistakes and doubtful labels, each with what speaks for it: other images, and scores in words.

Input: rows found in the predictions. Output: dictionaries of plain values for the page's templates. Invariant: what is
written is what the classifier went by, as votes, distances or probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.plan import WEIGHTED_NEIGHBORS
from pipeline.results.draft import Draft
from pipeline.results.mistakes import NUM_NEIGHBORS, Found, Mistake
from pipeline.results.texts import figure, with_minus


def has_features(run: Mapping[str, Any]) -> bool:
    """Say whether classifiers compared the features of a model, and not pixels."""
    model = run.get("model")
    return model is not None and model["output"] == "embedding"


def shown_neighbors(mistake: Mistake) -> tuple[tuple[str, str, float], ...]:
    """Return the nearest training images that are shown beside a mistake."""
    return mistake.neighbors[:NUM_NEIGHBORS]


def worst_mistakes(draft: Draft, name: str) -> dict[str, Any]:
    """Return one classifier's worst mistakes, and how many it makes."""
    total = next(row for row in draft.run["metrics"] if row["classifier"] == name and row["scope"] == "all")
    return {
        "name": name,
        "num_wrong": total["num_images"] - total["num_correct"],
        "mistakes": [
            (each, shown_neighbors(each), scores_in_words(name, each, is_weighted=has_features(draft.run)))
            for each in draft.found.worst(name)
        ],
    }


def scores_in_words(classifier: str, mistake: Mistake, *, is_weighted: bool) -> str | None:
    """Say by how much the predicted class is ahead of the given one, in the terms of the classifier.

    Args:
        classifier: Its name.
        mistake: What it gets wrong.
        is_weighted: Whether a vote of `WEIGHTED_NEIGHBORS` is weighted, so that votes are no whole numbers.
    """
    if mistake.scores is None:
        return None
    own, given = mistake.scores
    number = classifier.removeprefix("knn_")
    if number == classifier or not mistake.neighbors:
        is_distance = classifier.startswith("nearest_mean")
        kind = "distance" if is_distance else "score" if classifier == "scores" else "probability"
        return f"{kind} {with_minus(figure(own))} against {with_minus(figure(given))}"
    if number == "1":
        near = next((figure(each[2]) for each in mistake.neighbors if each[1] == mistake.given), None)
        others = f"{near} to {mistake.given}" if near else f"no {mistake.given} near"
        return f"distance {figure(mistake.neighbors[0][2])} to {mistake.predicted}, {others}"
    if is_weighted and number == str(WEIGHTED_NEIGHBORS):
        return f"{figure(own)} of the votes against {figure(given)}"
    return f"{round(own * int(number))} of {number} votes against {round(given * int(number))}"


def mistakes_by_pair(draft: Draft) -> list[dict[str, Any]]:
    """Return the best classifier's mistakes by pair of classes, the most confused pair first."""
    numbers = {(given, predicted): number for given, predicted, number in draft.confusions[draft.best].worst_pairs()}
    return [
        {"given": given, "predicted": predicted, "num_images": numbers[given, predicted], "place": f"pair-{place}",
         "shown": keys}
        for place, ((given, predicted), keys) in enumerate(draft.by_pair.items())
    ]  # fmt: skip


def counterpart(
    row: Mapping[str, Any], found: Found, exact: Sequence[tuple[int, list[dict[str, Any]]]]
) -> tuple[str, float] | None:
    """Find the image that speaks for the class that is suggested: a twin, or the nearest one; key and distance."""
    for _, rows in exact:
        twins = [other for other in rows if other["class"] == row["suggested_class"] and other["key"] != row["key"]]
        if twins and any(other["key"] == row["key"] for other in rows):
            return twins[0]["key"], 0.0
    own = found.by_key.get(row["key"])
    near = own.neighbors if own else ()
    return next(((key, distance) for key, name, distance in near if name == row["suggested_class"]), None)


def suspect(row: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Return a doubtful label beside the image that speaks for another class, if that is known."""
    return {**row, "other": counterpart(row, draft.found, draft.exact)}
