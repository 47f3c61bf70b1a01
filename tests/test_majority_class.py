"""The most frequent training class, for every image."""

import pytest
import torch

from pipeline.compute.block import Block, Trained
from pipeline.compute.classifiers import majority_class


@pytest.mark.parametrize(("counts", "expected"), [((3, 9, 4), 1), ((5, 2, 5), 0), ((0, 7, 7), 1)])
@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_the_first_of_the_most_frequent_classes_is_predicted(counts, expected, num_images):
    nothing = torch.empty(0)
    trained = Trained(torch.tensor(counts), torch.zeros(3, 4), None, nothing)
    scores_NK, predictions_N = majority_class.score(Block(torch.zeros(num_images, 4, dtype=torch.uint8), trained))
    assert scores_NK is None
    assert (predictions_N.dtype, predictions_N.tolist()) == (torch.int64, [expected] * num_images)
