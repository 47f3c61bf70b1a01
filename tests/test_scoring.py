from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.compute.classifiers import CLASSIFIERS
from pipeline.compute.scoring import count_in_top, rank


def naive_count(scores_NK, labels_N):
    order_NK = [sorted(range(len(row)), key=lambda label: (-row[label], label)) for row in scores_NK.tolist()]
    pairs = enumerate(zip(order_NK, labels_N.tolist(), strict=True))
    return sum(label in order[:5] and scores_NK[row, label] > -torch.inf for row, (order, label) in pairs)


@pytest.mark.parametrize("num_values", [2, 5, 1000])
def test_the_top_5_are_those_of_a_sort_that_keeps_the_order_of_classes(num_values):
    random = np.random.default_rng(num_values)  # of few values many are equal
    scores_NK = torch.from_numpy(random.integers(0, num_values, (500, 20)).astype(np.float32) / num_values)
    labels_N = torch.from_numpy(random.integers(0, 20, 500))
    assert count_in_top(scores_NK, labels_N) == naive_count(scores_NK, labels_N)
    assert count_in_top(-scores_NK, labels_N) == naive_count(-scores_NK, labels_N)
    scores_NK[:, 3:] = -torch.inf  # no scores of most classes
    assert count_in_top(scores_NK, labels_N) == naive_count(scores_NK, labels_N) == int((labels_N < 3).sum())


def test_no_image_is_in_the_top_of_no_images():
    assert count_in_top(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64)) == 0


def test_classes_that_a_model_does_not_know_are_not_ranked_beside_those_of_probability_0():
    model = SimpleNamespace(places=(2, 0, 3), missing_classes=("b",))
    trained, scores_NK = SimpleNamespace(own_model=model), torch.tensor([[0.25, 0, 0, 0.75]])
    own, other = (next(each for each in CLASSIFIERS if each.name == name) for name in ("model", "knn_1"))
    assert rank(own, scores_NK, trained).tolist() == [[0.25, -np.inf, 0, 0.75]]
    assert rank(other, scores_NK, trained).tolist() == scores_NK.tolist()
