import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, log_softmax

from pipeline.compute.classifiers import nearest_mean, sgd_linear
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params, split_params

pytestmark = pytest.mark.usefixtures("one_thread")


def test_streams_of_neighbours_have_nothing_in_common_and_come_again():
    keys = list(itertools.product((0, 1, 2**63 - 1), (1, 2, 12), ("weights", "order")))
    seeds = [sgd_linear.derive_seed(*key) for key in keys]
    assert len({seed >> 32 for seed in seeds}) == len(keys)
    assert [sgd_linear.derive_seed(*key) for key in keys] == seeds
    assert 0 <= min(seeds) <= max(seeds) < 2**63  # what torch takes


def test_training_begins_at_zero():
    params_P = sgd_linear.initial_params(10, 784)
    assert (params_P.shape, params_P.dtype, int(params_P.count_nonzero())) == ((7850,), torch.float32, 0)


@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_the_mean_weighs_steps_by_the_square_of_their_number(num_steps):
    steps = np.random.default_rng(0).standard_normal((num_steps, 5)).astype(np.float32)
    mean_P = torch.full((5,), 1e30)
    for number, params_P in enumerate(steps, start=1):
        sgd_linear.average(mean_P, torch.from_numpy(params_P), number)
    # The recursion of Shamir and Zhang, unrolled: (t + 1 choose 2) for step t.
    weights = [math.comb(number + 1, 2) for number in range(1, num_steps + 1)]
    np.testing.assert_allclose(mean_P, np.average(steps, axis=0, weights=weights), rtol=1e-4, atol=1e-5)


def test_params_are_weights_class_by_class_then_biases():
    params_P = torch.arange(8.0)
    weights_KD, bias_K = split_params(params_P, 2)
    assert (weights_KD.tolist(), bias_K.tolist()) == ([[0, 1, 2], [3, 4, 5]], [6, 7])
    weights_KD[1, 0] = 9
    assert params_P[3] == 9


def draw_model(num_images, num_values=64, num_classes=10):
    """A model as parameters and as tiles, and images."""
    torch.manual_seed(0)
    params_P = torch.randn(num_classes * (num_values + 1)) / 10
    model = Params(num_classes, num_values, torch.device("cpu"))
    model.load(params_P)
    return params_P, model, torch.randint(0, 256, (num_images, num_values), dtype=torch.uint8)


@pytest.mark.parametrize("num_images", [0, 1, 1023, 1024, 1025, 3000])
def test_log_probabilities_are_those_of_torch(num_images):
    params_P, model, images_ND = draw_model(num_images)
    got_NK = sgd_linear.log_probabilities(model, images_ND, 0.25)
    expected_NK = log_softmax(linear(images_ND / 255 - 0.25, *split_params(params_P, 10)), 1)
    assert got_NK.shape == (num_images, 10)
    torch.testing.assert_close(got_NK, expected_NK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_NK.exp().sum(1), torch.ones(num_images))


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_no_bit_of_log_probabilities(num_threads):
    _, model, images_ND = draw_model(1000, 3072, 100)
    expected_NK = sgd_linear.log_probabilities(model, images_ND)
    assert torch.equal(sgd_linear.log_probabilities(model, images_ND, threads=Threads(num_threads)), expected_NK)


def test_the_centre_is_the_mean_image_and_the_rate_fits_the_images():
    torch.manual_seed(0)
    images_ND, labels_N = torch.randint(0, 256, (500, 30), dtype=torch.uint8), torch.randint(0, 3, (500,))
    means_KD = nearest_mean.class_means(*nearest_mean.class_sums(images_ND, labels_N, 4))
    centre = sgd_linear.find_centre(labels_N.bincount(minlength=4), means_KD, nearest_mean.sum_squares(images_ND))
    pixels_ND = images_ND.double() / 255
    torch.testing.assert_close(centre.centre_D, pixels_ND.mean(0), rtol=1e-6, atol=0)
    expected = 4 / (float((pixels_ND - pixels_ND.mean(0)).square().sum(1).mean()) + 1)
    assert centre.safe_rate == pytest.approx(expected, rel=1e-6)


def test_the_scale_of_features_is_that_of_their_variances_and_the_rate_that_of_their_largest_eigenvalue():
    random = np.random.default_rng(0)
    features_ND = random.normal(size=(300, 40)) @ random.normal(size=(40, 40)) * np.geomspace(1e-3, 1e3, 40)
    features_ND[:, 7] = 5
    centre_D = features_ND.mean(0)
    scale = sgd_linear.find_scale(torch.from_numpy(features_ND), torch.from_numpy(centre_D), 16)
    variance_D = features_ND.var(0)
    squares_D = 1 / (variance_D + 0.1 * variance_D.mean())
    np.testing.assert_allclose(scale.scale_D.square().numpy(), squares_D, rtol=1e-9)
    scaled_ND = (features_ND - centre_D) * np.sqrt(squares_D)
    largest = np.linalg.eigvalsh(scaled_ND.T @ scaled_ND / 300)[-1]
    expected = 4 * 16 / (15 * max(1, largest) + scaled_ND.var(0).sum() + 1)
    assert scale.safe_rate == pytest.approx(expected, rel=0.02)
    same = sgd_linear.find_scale(torch.ones(3, 40), torch.ones(40, dtype=torch.float64), 16)
    assert np.isfinite([*same.scale_D, same.safe_rate]).all()
