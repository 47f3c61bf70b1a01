"""Which predictions are worth a look, against a plain loop over all of them."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.results import mistakes
from pipeline.results.finished import with_other
from pipeline.results.mistakes import Found, Wanted
from pipeline.results.tables import NeighborColumns, choose_top, predictions_table

# One of them is called as pages call all others.
CLASSES = ("3", "7", "ä", "(another class)")
ALL = with_other(CLASSES)
NUM = 300


@pytest.fixture(params=[False, True])
def table(request):
    """Predictions by few different scores and distances, so that many are equal."""
    random = np.random.default_rng(11)
    labels_N, scores_NK = random.integers(0, 4, NUM), random.integers(0, 4, (NUM, 4)).astype(np.float32)
    near_N2 = random.integers(0, 4, (NUM, 2))
    distances_N2 = np.sort(random.integers(0, 3, (NUM, 2)).astype(np.float32), 1)
    neighbors = NeighborColumns(np.array(["k", "l", "m", "n"], object)[near_N2], near_N2, distances_N2)
    scores = choose_top(scores_NK, labels_N, are_distances=False) if request.param else scores_NK
    keys = pa.array([f"{row}.png" for row in range(NUM)])
    return predictions_table(CLASSES, keys, labels_N, {"sgd": scores_NK.argmax(1)}, {"sgd": scores}, neighbors)


def plain_order(table):
    """Return the rows of the mistakes, worst first."""
    wrong = []
    for place, row in enumerate(table.to_pylist()):
        if row["class"] == row["sgd_prediction"]:
            continue
        if "sgd_scores" in row:
            scores = dict(zip(CLASSES, row["sgd_scores"], strict=True))
        else:
            scores = {row["sgd_prediction"]: row["sgd_top_scores"][0], row["class"]: row["sgd_class_score"]}
        lead = scores[row["sgd_prediction"]] - scores[row["class"]]
        wrong.append((-lead, row["neighbor_distances"][0], place, row))
    return [row for *_, row in sorted(wrong, key=lambda each: each[:3])]


@pytest.mark.parametrize("num_rows", [1, 7, NUM])
def test_the_worst_are_those_of_a_plain_loop_however_predictions_are_parted(table, num_rows):
    parts = [table.slice(start, num_rows) for start in range(0, NUM, num_rows)]
    pairs, keys = (("3", "7"), ("ä", "3"), ("7", "7")), frozenset(("5.png", "299.png", "none.png"))
    wanted = Wanted(ALL, ("sgd",), "sgd", pairs, keys)
    found = mistakes.merge(
        [
            Found(
                mistakes.narrow(mistakes.note(part.to_batches(), ALL), wanted),
                *mistakes.look_up(part.to_batches(), wanted),
            )
            for part in parts
        ]
    )
    wrong = plain_order(table)
    assert [each.key for each in found.worst("sgd")] == [row["key"] for row in wrong[:12]]
    own = {pair: [row["key"] for row in wrong if (row["class"], row["sgd_prediction"]) == pair][:3] for pair in pairs}
    assert found.by_pair(wanted) == {pair: names for pair, names in own.items() if names}
    assert (set(found.by_key), found.first.key) == ({"5.png", "299.png"}, "0.png")
    row = table.slice(5, 1).to_pylist()[0]
    assert found.by_key["5.png"].neighbors == tuple(
        zip(row["neighbor_keys"], row["neighbor_classes"], row["neighbor_distances"], strict=True)
    )


@pytest.mark.parametrize("num_batches", [0, 1])
def test_of_no_predictions_nothing_is_noted(table, num_batches):
    wanted = Wanted(ALL, ("sgd",), "sgd", (("3", "7"),), frozenset())
    batches = [batch.slice(0, 0) for batch in table.to_batches()][:num_batches]
    found = mistakes.merge([Found(mistakes.narrow(mistakes.note(batches, ALL), wanted))])
    assert (found.worst("sgd"), found.by_pair(wanted)) == ([], {})
    assert mistakes.look_up(batches, wanted) == ({}, None)


@pytest.mark.parametrize("has_all", [True, False])
def test_a_class_that_nobody_knows_is_told_from_one_of_that_name_and_is_looked_at_last(has_all):
    names, labels_N, predicted_N = CLASSES[2:], np.array([0, 0, 0]), np.array([-1, 1, 1])
    scores_NK = np.array([[0, 9], [0, 3], [0, 4]], np.float32)
    scores = scores_NK if has_all else choose_top(scores_NK, labels_N, are_distances=False)
    table = predictions_table(names, pa.array(list("abc")), labels_N, {"own": predicted_N}, {"own": scores})
    worst = mistakes.note(table.to_batches(), with_other(names))["own"].worst
    assert [(each.key, each.predicted, each.scores) for each in worst] == [
        ("c", "(another class)", (4, 0)), ("b", "(another class)", (3, 0)), ("a", "((another class))", None),
    ]  # fmt: skip
