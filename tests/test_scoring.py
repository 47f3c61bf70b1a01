import numpy as np
import pytest
import torch

from pipeline.compute.scoring import count_in_top


def naive_count(scores_NK, labels_N):
    order_NK = [sorted(range(len(row)), key=lambda label: (-row[label], label)) for row in scores_NK.tolist()]
    return sum(label in order[:5] for order, label in zip(order_NK, labels_N.tolist(), strict=True))


@pytest.mark.parametrize("num_values", [2, 5, 1000])
def test_the_top_5_are_those_of_a_sort_that_keeps_the_order_of_classes(num_values):
    random = np.random.default_rng(num_values)  # of few values many are equal
    scores_NK = torch.from_numpy(random.integers(0, num_values, (500, 20)).astype(np.float32) / num_values)
    labels_N = torch.from_numpy(random.integers(0, 20, 500))
    assert count_in_top(scores_NK, labels_N) == naive_count(scores_NK, labels_N)
    assert count_in_top(-scores_NK, labels_N) == naive_count(-scores_NK, labels_N)


def test_no_image_is_in_the_top_of_no_images():
    assert count_in_top(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64)) == 0
