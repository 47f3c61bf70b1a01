"""Which predictions are worth a look, against a plain loop over all of them."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.results import mistakes
from pipeline.results.mistakes import Found, Wanted
from pipeline.results.tables import NeighborColumns, choose_top, predictions_table

CLASSES = ("3", "7", "ä", "x")
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
    wanted = Wanted(CLASSES, ("sgd",), "sgd", pairs, keys)
    found = mistakes.merge(
        [
            Found(
                mistakes.narrow(mistakes.note(part.to_batches(), CLASSES), wanted),
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
    wanted = Wanted(CLASSES, ("sgd",), "sgd", (("3", "7"),), frozenset())
    batches = [batch.slice(0, 0) for batch in table.to_batches()][:num_batches]
    found = mistakes.merge([Found(mistakes.narrow(mistakes.note(batches, CLASSES), wanted))])
    assert (found.worst("sgd"), found.by_pair(wanted)) == ([], {})
    assert mistakes.look_up(batches, wanted) == ({}, None)
