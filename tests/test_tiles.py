import itertools

import numpy as np
import pytest
import torch

from pipeline.compute import tiles
from pipeline.compute.tiles import Params

pytestmark = pytest.mark.usefixtures("one_thread")
# classes, values of an image; the last ones are cut
SHAPES = [(2, 1), (10, 784), (3, 75), (37, 27), (100, 3072), (1000, 300), (700, 1537), (2, 60_000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_tiles_hold_every_weight_once_and_stay_small(shape, device_type):
    num_classes, num_values = shape
    count_KC = np.zeros((num_classes, tiles.count_columns(num_values)), int)
    end = 0
    for tile in tiles.cut_tiles(num_classes, num_values, device_type):
        count_KC[tile.classes, tile.columns] += 1
        assert (tile.start, tile.start % 16, tile.columns.start % 16, tile.classes.start % 16) == (end, 0, 0, 0)
        assert tile.unit_size % 64 == 0
        assert tile.shape[0] * tile.shape[1] <= min(tile.size, 2**17 if device_type == "cpu" else 2**24)
        assert tile.size - tile.shape[0] * tile.shape[1] < max(512, tile.unit_size)
        end = tile.start + tile.size
    assert (count_KC == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_come_out_as_they_went_in(shape):
    num_classes, num_values = shape
    params_P = torch.randn(num_classes * (num_values + 1))
    params = Params(num_classes, num_values, torch.device("cpu"))
    params.load(params_P)
    saved_P = torch.zeros_like(params_P)
    params.save(saved_P)
    assert torch.equal(saved_P, params_P)
    assert int(params.stored_S.count_nonzero()) == int(params_P.count_nonzero())


@pytest.mark.parametrize("num_values", [64, 1024, 2**14, 2**14 + 64])
def test_a_unit_has_one_sum_of_squares_whoever_steps_its_neighbours(num_values):
    units_UM = torch.randn(8, num_values)
    sums_U = units_UM.square().sum(1)
    for first, last in itertools.combinations(range(9), 2):
        assert torch.equal(units_UM[first:last].square().sum(1), sums_U[first:last])
