import itertools

import numpy as np
import pytest
import torch
from test_tiles import SHAPES

from pipeline.compute import lane_products, tiles
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 13, 64])
def test_tensors_are_added_as_a_tree(number):
    values = np.random.default_rng(number).normal(size=(number, 50)).astype(np.float32)

    def add(first, last):
        if last - first == 1:
            return values[first]
        middle = first + (last - first + 1) // 2
        return add(first, middle) + add(middle, last)

    np.testing.assert_array_equal(lane_products.add_tree(list(torch.tensor(values))), add(0, number))


def test_eight_are_added_in_pairs_of_pairs():
    a, b, c, d, e, f, g, h = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    got = lane_products.add_tree([torch.tensor(each) for each in (a, b, c, d, e, f, g, h)])
    np.testing.assert_array_equal(got, ((a + b) + (c + d)) + ((e + f) + (g + h)))


@pytest.mark.parametrize("counts", [[3], [4, 4], [2, 0, 5], [8] * 8, [700] * 3])
def test_lanes_are_added_as_their_products_would_be(counts):
    numbers = torch.Generator().manual_seed(0)
    errors = [torch.randn(7, count, generator=numbers) for count in counts]
    inputs = [torch.randn(count, 48, generator=numbers) for count in counts]
    buffers = torch.full((4, 7, 48), torch.nan)
    lane_products.add_lanes(errors, inputs, list(buffers))
    assert torch.equal(buffers[0], lane_products.add_tree([a @ b for a, b in zip(errors, inputs, strict=True)]))


@pytest.mark.parametrize("num_lanes", [2, 3, 5, 8])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_lanes_of_as_many_rows_are_added_at_once_where_that_changes_no_bit(num_lanes, num_rows):
    numbers = torch.Generator().manual_seed(1)
    errors_KB = torch.randn(num_lanes * num_rows, 10, generator=numbers).T
    inputs_BC = torch.randn(num_lanes * num_rows, 800, generator=numbers)
    expected, got = torch.full((2, 8, 10, 800), torch.nan)
    lane_products.add_lanes(errors_KB.split(num_rows, 1), inputs_BC.split(num_rows), list(expected))
    lane_products.add_equal_lanes(errors_KB, inputs_BC, got[:num_lanes])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    if lane_products.multiplies_at_once(num_lanes, num_rows, 10, 800, "cpu"):
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_logits_are_those_of_a_plain_product_whoever_stands_beside(shape, number):
    num_classes, num_values = shape
    counts = [4, 0, 7, 4]
    params_P = torch.randn(num_classes * (num_values + 1)) / num_values**0.5
    params = Params(num_classes, num_values, torch.device("cpu"))
    params.load(params_P)
    images_BD = torch.randint(0, 256, (sum(counts), num_values), dtype=torch.uint8)
    inputs_BC = tiles.empty_inputs(sum(counts), num_values, params.device)
    tiles.fill_inputs(inputs_BC, images_BD, 0.5)
    logits_BK = torch.full((sum(counts), num_classes), torch.nan)
    lane_products.write_logits(params, inputs_BC, counts, logits_BK, Threads(number))
    weights_KD, bias_K = tiles.split_params(params_P.double(), num_classes)
    expected_BK = (images_BD.double() / 255 - 0.5) @ weights_KD.T + bias_K
    torch.testing.assert_close(logits_BK.double(), expected_BK, rtol=1e-4, atol=1e-5)
    for chosen in itertools.permutations(range(4), 2):
        some_RC, expected_RK = (torch.cat([each.split(counts)[i] for i in chosen]) for each in (inputs_BC, logits_BK))
        alone_RK = torch.empty_like(expected_RK)
        lane_products.write_logits(params, some_RC, [counts[i] for i in chosen], alone_RK, Threads())
        assert torch.equal(alone_RK, expected_RK)
