"""What several actors found is merged to what one finds."""

import pytest
import torch
from test_products import pixels
from test_search import as_lists, in_blocks, nearest_in_a_loop, train

from pipeline.compute.neighbors import merge, stack
from pipeline.compute.search import search


@pytest.mark.parametrize("num_actors", [1, 2, 3, 5])
def test_what_actors_find_is_merged_to_what_one_finds(num_actors):
    images, others = pixels(30, 5, high=4), train(100, 5, high=4)
    found = [
        search(torch.from_numpy(images), in_blocks(*(each[rank::num_actors] for each in others), 9), 6)
        for rank in range(num_actors)
    ]
    assert as_lists(merge(found, 6)) == nearest_in_a_loop(images, *others, 6)


def test_columns_that_no_actor_can_fill_are_left_out():
    images, others = pixels(4, 5), train(3, 5)
    found = merge([search(torch.from_numpy(images), in_blocks(*others, 2), 5)], 5)
    assert found.distances_NJ.shape == (4, 3)


def test_what_was_found_is_stacked():
    nothing = search(torch.from_numpy(pixels(2, 5)), [], 3)
    assert stack([nothing, nothing]).distances_NJ.shape == (4, 3)
    assert stack([nothing, nothing], axis=1).distances_NJ.shape == (2, 6)
