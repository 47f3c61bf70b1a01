import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, linear, log_softmax

from pipeline.compute.classifiers import sgd_linear

pytestmark = pytest.mark.usefixtures("one_thread")
# values of one image, classes, rows of each lane
STEPS = [
    (784, 10, [16] * 8),
    (64, 2, [1]),
    (75, 3, [5, 16, 1, 16, 7]),
    (64, 10, [16, 0, 3, 0]),
    (27, 37, [0, 0, 9]),
    (1, 2, [4, 4]),
    (192, 7, [2, 33, 0, 64]),
    (147, 5, [8] * 8),
    (783, 10, [8] * 4),
    (50, 7, [300, 300, 17, 300]),  # not all of them go through the operations at once
    (33, 3, [700, 1, 600]),
]


def draw_step(num_values, num_classes, lane_counts, seed=0):
    torch.manual_seed(seed)
    images_BD = torch.randint(0, 256, (sum(lane_counts), num_values), dtype=torch.uint8)
    labels_B = torch.randint(0, num_classes, (sum(lane_counts),))
    return torch.randn(num_classes * (num_values + 1)) / 10, images_BD, labels_B, lane_counts


def lane_gradients(params_P, images_BD, labels_B, lane_counts):
    gradients_ZP = sgd_linear.empty_gradients(len(lane_counts), len(params_P), params_P.device).fill_(torch.nan)
    return gradients_ZP, *sgd_linear.lane_gradients(params_P, images_BD, labels_B, lane_counts, gradients_ZP)


def autograd(params_P, images_BD, labels_B):
    """Differentiate the loss of one lane in float64, as torch does it."""
    params_P = params_P.double().requires_grad_()
    num_classes = len(params_P) // (images_BD.shape[1] + 1)
    logits_BK = linear(images_BD.double() / 255, params_P[:-num_classes].view(num_classes, -1), params_P[-num_classes:])
    losses_B = cross_entropy(logits_BK, labels_B, reduction="none")
    losses_B.sum().backward()
    return params_P.grad, losses_B.detach(), logits_BK.argmax(1) == labels_B


def train_on_lanes(images_ND, labels_N, num_classes, num_epochs, *, lane_rows=16, learning_rate=0.5):
    """Train on four lanes, in an order of our own."""
    params_P = sgd_linear.initial_params(num_classes, images_ND.shape[1])
    gradients_LP = torch.zeros(4, len(params_P))
    numbers = torch.Generator().manual_seed(0)
    for _ in range(num_epochs):
        order = torch.randperm(len(images_ND), generator=numbers)
        for rows_B in order.split(4 * lane_rows):
            counts = [len(rows) for rows in rows_B.tensor_split(4)]
            sgd_linear.lane_gradients(params_P, images_ND[rows_B], labels_N[rows_B], counts, gradients_LP)
            sgd_linear.step(params_P, gradients_LP, len(rows_B), learning_rate)
    return params_P


def accuracy(params_P, images_ND, labels_N, num_classes):
    return float((sgd_linear.log_probabilities(params_P, images_ND, num_classes).argmax(1) == labels_N).float().mean())


@pytest.mark.parametrize("step", STEPS)
def test_each_lanes_gradient_is_that_of_autograd(step):
    params_P, images_BD, labels_B, lane_counts = draw_step(*step)
    gradients_ZP, losses_B, is_correct_B = lane_gradients(params_P, images_BD, labels_B, lane_counts)
    lanes = zip(*(tensor.split(lane_counts) for tensor in (images_BD, labels_B, losses_B, is_correct_B)), strict=True)
    for gradient_P, (images, labels, losses, is_correct) in zip(gradients_ZP, lanes, strict=True):
        expected_P, expected_losses, expected_correct = autograd(params_P, images, labels)
        torch.testing.assert_close(gradient_P.double(), expected_P, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-6)
        assert torch.equal(is_correct, expected_correct)


def test_a_lane_without_rows_has_the_gradient_zero():
    gradients_ZP, losses_B, _ = lane_gradients(*draw_step(64, 3, [0, 4, 0]))
    assert gradients_ZP[[0, 2]].count_nonzero() == 0
    assert gradients_ZP[1].count_nonzero() > 0
    assert len(losses_B) == 4


def test_large_logits_lose_no_loss():
    params_P = torch.tensor([1000.0, -1000.0, 0.0, 0.0])
    gradients_ZP, losses_B, is_correct_B = lane_gradients(
        params_P, torch.tensor([[255], [255]], dtype=torch.uint8), torch.tensor([0, 1]), [2]
    )
    assert (losses_B.tolist(), is_correct_B.tolist()) == ([0, 2000], [True, False])
    assert gradients_ZP.tolist() == [[1, -1, 1, -1]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("num_beside", [1, 2, 3])
def test_a_lane_has_the_same_bits_whichever_lanes_stand_beside_it(step, num_beside):
    params_P, images_BD, labels_B, lane_counts = draw_step(*step)
    together_ZP, together_B, _ = lane_gradients(params_P, images_BD, labels_B, lane_counts)
    lanes = list(zip(*(rows.split(lane_counts) for rows in (images_BD, labels_B, together_B)), strict=True))
    for chosen in itertools.permutations(range(len(lanes)), min(num_beside, len(lanes))):
        images, labels, losses = (torch.cat(column) for column in zip(*(lanes[lane] for lane in chosen), strict=True))
        alone_ZP, alone_B, _ = lane_gradients(params_P, images, labels, [lane_counts[lane] for lane in chosen])
        assert torch.equal(alone_ZP, together_ZP[list(chosen)])
        assert torch.equal(alone_B, losses)


def test_one_thread_gives_its_bits_again_after_others_computed():
    step = draw_step(3000, 10, [64] * 8)
    before_ZP, *_ = lane_gradients(*step)
    torch.set_num_threads(2)
    between_ZP, *_ = lane_gradients(*step)
    torch.set_num_threads(1)
    after_ZP, *_ = lane_gradients(*step)
    assert torch.equal(before_ZP, after_ZP)
    torch.testing.assert_close(between_ZP, after_ZP, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_lanes", [1, 2, 8])
def test_a_step_is_the_plain_formula(num_lanes):
    random = np.random.default_rng(0)
    params_P, gradients_LP = random.normal(size=30), random.normal(size=(num_lanes, 30))
    moved_P = torch.tensor(params_P, dtype=torch.float32)
    norm = sgd_linear.step(moved_P, torch.tensor(gradients_LP, dtype=torch.float32), 50, 0.3)
    mean_P = gradients_LP.sum(0) / 50
    np.testing.assert_allclose(moved_P, params_P - 0.3 * mean_P, atol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(mean_P), rtol=1e-5)


@pytest.mark.parametrize("num_lanes", [8, 64, 1000])
def test_a_step_adds_lanes_one_after_another_and_leaves_them(num_lanes):
    gradients_LP = np.random.default_rng(1).normal(size=(num_lanes, 300)).astype(np.float32)
    params_P, given_LP = torch.zeros(300), torch.tensor(gradients_LP)
    sgd_linear.step(params_P, given_LP, 1, 1.0)
    total_P = np.zeros(300, np.float32)
    for gradient_P in gradients_LP:
        total_P += gradient_P
    np.testing.assert_array_equal(params_P, -total_P)
    np.testing.assert_array_equal(given_LP, gradients_LP)


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
    weights_KD, bias_K = sgd_linear.split_params(params_P, 2)
    assert (weights_KD.tolist(), bias_K.tolist()) == ([[0, 1, 2], [3, 4, 5]], [6, 7])
    weights_KD[1, 0] = 9
    assert params_P[3] == 9


@pytest.mark.parametrize("num_images", [0, 1, 1023, 1024, 1025, 3000])
def test_log_probabilities_are_those_of_torch(num_images):
    params_P, images_ND, _, _ = draw_step(64, 10, [num_images])
    got_NK = sgd_linear.log_probabilities(params_P, images_ND, 10)
    expected_NK = log_softmax(linear(images_ND / 255, params_P[:640].view(10, 64), params_P[640:]), 1)
    assert got_NK.shape == (num_images, 10)
    torch.testing.assert_close(got_NK, expected_NK)
    torch.testing.assert_close(got_NK.exp().sum(1), torch.ones(num_images))


def test_a_separable_problem_is_learned_without_a_fault():
    torch.manual_seed(1)
    labels_N = torch.randint(0, 3, (400,))
    images_ND = (torch.randint(0, 100, (400, 12)) + 120 * (torch.arange(12) % 3 == labels_N[:, None])).to(torch.uint8)
    assert accuracy(sgd_linear.initial_params(3, 12), images_ND, labels_N, 3) < 0.8
    assert accuracy(train_on_lanes(images_ND, labels_N, 3, 20), images_ND, labels_N, 3) == 1


def test_digits_are_learned_about_as_well_as_by_scikit_learn():
    digits = load_digits()
    pixels = np.rint(digits.data * 255 / 16)
    model = LogisticRegression(max_iter=1000).fit(pixels[:898] / 255, digits.target[:898])
    images_ND, labels_N = torch.tensor(pixels, dtype=torch.uint8), torch.tensor(digits.target)
    params_P = train_on_lanes(images_ND[:898], labels_N[:898], 10, 20)
    expected = model.score(pixels[898:] / 255, digits.target[898:])
    assert accuracy(params_P, images_ND[898:], labels_N[898:], 10) == pytest.approx(expected, abs=0.02)


def test_many_steps_end_at_the_weights_of_scikit_learn():
    # Classes that overlap have one best model; its logits' difference is all that the loss sees.
    torch.manual_seed(2)
    labels_N = torch.arange(400) % 2
    images_ND = (torch.randint(0, 160, (400, 2)) + labels_N[:, None] * torch.tensor([60, 20])).to(torch.uint8)
    model = LogisticRegression(C=1e9, tol=1e-9).fit(images_ND.numpy() / 255, labels_N.numpy())
    params_P = train_on_lanes(images_ND, labels_N, 2, 3000, lane_rows=100, learning_rate=2)
    weights_KD, bias_K = sgd_linear.split_params(params_P, 2)
    np.testing.assert_allclose((weights_KD[1] - weights_KD[0])[None], model.coef_, rtol=0.01)
    np.testing.assert_allclose((bias_K[1] - bias_K[0])[None], model.intercept_, rtol=0.01)
