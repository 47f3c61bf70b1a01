"""Products in whole numbers: the same from int8 and float32, at any number of values."""

import numpy as np
import pytest
import torch

from pipeline.compute import products

CPU = torch.device("cpu")


@pytest.fixture(params=["int8", "float32"])
def way(request, monkeypatch):
    monkeypatch.setattr(products, "has_fast_int8", lambda device: request.param == "int8")


def pixels(num_images, num_values, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (num_images, num_values), np.uint8)


def less_128(images):
    return images.astype(np.int64) - 128


@pytest.mark.parametrize("num_values", [1, 2, 784, 2500])
@pytest.mark.parametrize(("num_images", "num_others"), [(5, 9), (1, 3), (40, 1)])
@pytest.mark.parametrize("scratch", [None, torch.full((100,), -1, dtype=torch.int32)])
@pytest.mark.usefixtures("way")
def test_products_are_those_of_numpy(num_values, num_images, num_others, scratch):
    images, others = pixels(num_images, num_values), pixels(num_others, num_values, seed=1)
    found = products.products(*(products.to_int8(torch.from_numpy(each)) for each in (images, others)), scratch)
    np.testing.assert_array_equal(found, less_128(images) @ less_128(others).T)


@pytest.mark.parametrize("num_values", [1024, 1025, 16384, 16385, 230_400])
@pytest.mark.usefixtures("way")
def test_the_largest_products_are_exact(num_values):
    black = products.to_int8(torch.zeros(2, num_values, dtype=torch.uint8))
    white = products.to_int8(torch.full((3, num_values), 255, dtype=torch.uint8))
    assert (products.products(black, black) == num_values * 2**14).all()
    assert (products.products(black, white) == -num_values * 128 * 127).all()


def test_pixels_less_128_are_int8():
    values = torch.arange(256, dtype=torch.uint8)[None]
    np.testing.assert_array_equal(products.to_int8(values), less_128(values.numpy()))


@pytest.mark.parametrize(("num_images", "num_values"), [(0, 1500), (1, 1), (300, 784), (300, 1025), (3, 300_000)])
def test_squares_are_those_of_numpy(num_images, num_values):
    images = pixels(num_images, num_values)
    found = products.squares(products.to_int8(torch.from_numpy(images)))
    np.testing.assert_array_equal(found, (less_128(images) ** 2).sum(1))


def test_which_way_is_faster_is_measured_once():
    assert products.has_fast_int8(CPU) is products.has_fast_int8(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a torch built for it")
@pytest.mark.parametrize("num_values", [784, 1501, 12288])
def test_a_gpu_gives_the_same_products(num_values):
    both = [products.to_int8(torch.from_numpy(pixels(number, num_values))) for number in (37, 113)]
    found = products.products(*(each.cuda() for each in both))
    assert torch.equal(found.cpu(), products.products(*both))


@pytest.mark.parametrize("num_values", [1, 1025])
def test_products_of_pairs_are_exact_and_unheard(num_values):
    images, others = pixels(5, num_values), pixels(40, num_values, seed=1)
    random = np.random.default_rng(2)
    image_C, column_C = np.sort(random.integers(0, 5, 3000)), random.integers(0, 40, 3000)
    found_C = products.pair_products(
        *(products.to_int8(torch.from_numpy(each)) for each in (images, others)),
        torch.from_numpy(image_C),
        torch.from_numpy(column_C),
    )
    assert found_C.tolist() == (less_128(images)[image_C] * less_128(others)[column_C]).sum(1).tolist()


def test_of_no_pairs_there_are_no_products():
    nothing, images = torch.zeros(0, dtype=torch.int64), products.to_int8(torch.from_numpy(pixels(2, 3)))
    assert products.pair_products(images, images, nothing, nothing).tolist() == []
