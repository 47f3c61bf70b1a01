"""Descent by one actor and by several, each in a thread with sockets of its own, as between processes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from builders import ROOT
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, linear

from pipeline.compute.class_blocks import sends_less
from pipeline.compute.classifiers import sgd_linear
from pipeline.compute.collective import Collective
from pipeline.compute.descent import Descent
from pipeline.compute.exchange import TOKEN_BYTES
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import cut_tiles, split_params
from pipeline.results.figures import LINE
from pipeline.tree import lane_ranges

pytestmark = pytest.mark.usefixtures("one_thread")
HOST, TOKEN = "127.0.0.1", bytes(TOKEN_BYTES)
# values of one image, classes, rows of each lane
STEPS = [
    (784, 10, [16] * 8),
    (64, 2, [1]),
    (75, 3, [5, 16, 1, 16, 7]),
    (64, 10, [16, 0, 3, 0]),
    (27, 37, [0, 0, 9]),
    (1, 2, [4, 4]),
    (63, 2, [2] * 4),  # whose products differ when one call makes them all
    (192, 7, [2, 33, 0, 64]),
    (783, 10, [8] * 4),
    (50, 7, [300, 300, 17, 300]),
    (3072, 100, [8] * 8),  # these are cut into tiles, in the last one many
    (1500, 600, [4, 4, 4, 3]),
    (3900, 1000, [3, 2, 1, 3, 3, 3, 3, 3]),
    (300, 300, [16] * 8),  # of many rows for so few classes
]


def draw_step(num_values, num_classes, lane_counts, seed=0):
    torch.manual_seed(seed)
    images_BD = torch.randint(0, 256, (sum(lane_counts), num_values), dtype=torch.uint8)
    labels_B = torch.randint(0, num_classes, (sum(lane_counts),))
    return torch.randn(num_classes * (num_values + 1)) / 10, images_BD, labels_B, lane_counts


def make_descent(num_values, num_classes, num_lanes, collective=None, num_threads=1, has_class_blocks=None):
    return Descent(
        num_classes,
        num_values,
        num_lanes,
        device=torch.device("cpu"),
        collective=collective or Collective(0, 1),
        threads=Threads(num_threads),
        has_class_blocks=has_blocks(num_values, num_classes) if has_class_blocks is None else has_class_blocks,
    )


def has_blocks(num_values, num_classes, batch_size=64):
    return sends_less(num_classes, num_values, batch_size, num_values, "cpu")


def walk(descent, params_P, lanes, steps, rate=0.5):
    """Make steps with some of their lanes: parameters and mean [2P], losses of each step, right ones, and the norm."""
    with torch.inference_mode():
        descent.load(params_P, params_P)
        descent.begin_epoch(len(steps), 0, rate)
        answers = []
        for images_BD, labels_B, counts in steps:
            images, labels = (torch.cat(rows.split(counts)[lanes.start : lanes.stop]) for rows in (images_BD, labels_B))
            answers.append(descent.step(images, labels, counts, 0.25))
        norm = descent.end_epoch()
        return descent.save(), *zip(*answers, strict=True), norm


def test_a_step_on_scaled_values_is_that_on_values_which_were_scaled_before():
    numbers = torch.Generator().manual_seed(0)
    features_BD, labels_B = torch.randn(24, 19, generator=numbers), torch.arange(24) % 3
    scale_D = torch.rand(19, generator=numbers) * 4 + 0.1
    params_P = torch.randn(60, generator=numbers)
    saved = []
    for images_BD, centre, scale in (
        (features_BD, torch.full((19,), 0.25), scale_D),
        ((features_BD - 0.25) * scale_D, 0.0, None),
    ):
        descent = make_descent(19, 3, 2)
        descent.load(params_P, params_P)
        descent.begin_epoch(1, 0, 0.5)
        losses_B, _ = descent.step(images_BD, labels_B, [12, 12], centre, scale)
        given = sgd_linear.log_probabilities(descent.mean, images_BD, centre, None, scale)
        saved.append((torch.from_numpy(descent.save()), losses_B, given))
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-5, atol=1e-6)


def walk_alone(params_P, steps, num_threads=1, has_class_blocks=None):
    num_values, num_lanes = steps[0][0].shape[1], len(steps[0][2])
    num_classes = len(params_P) // (num_values + 1)
    descent = make_descent(num_values, num_classes, num_lanes, None, num_threads, has_class_blocks)
    return walk(descent, params_P, range(num_lanes), steps)


def walk_together(num_actors, params_P, steps, num_threads=1, has_class_blocks=None):
    """Make the same steps with several actors; what each has to say, and the bytes that left it in a step."""
    num_values, num_lanes = steps[0][0].shape[1], len(steps[0][2])
    group = [Collective(rank, num_actors) for rank in range(num_actors)]
    addresses = [each.listen(HOST) for each in group]

    def act(rank):
        group[rank].join(TOKEN, addresses, has_own_gpu=False)
        lanes = lane_ranges(num_lanes, num_actors)[rank]
        num_classes = len(params_P) // (num_values + 1)
        descent = make_descent(num_values, num_classes, num_lanes, group[rank], num_threads, has_class_blocks)
        sent = []
        descent.end_epoch, end = lambda: sent.append(group[rank].num_bytes_sent) or end(), descent.end_epoch
        return walk(descent, params_P, lanes, steps), sent[0] / len(steps)

    # The number of threads inside torch is a thread's own.
    with ThreadPoolExecutor(num_actors, initializer=partial(torch.set_num_threads, 1)) as pool:
        answers = list(pool.map(act, range(num_actors)))
    for each in group:
        each.close()
    return answers


def autograd(params_P, images_BD, labels_B):
    """Differentiate the mean loss in float64, as torch does it."""
    params_P = params_P.double().requires_grad_()
    num_classes = len(params_P) // (images_BD.shape[1] + 1)
    logits_BK = linear(images_BD.double() / 255 - 0.25, *split_params(params_P, num_classes))
    losses_B = cross_entropy(logits_BK, labels_B, reduction="none")
    losses_B.mean().backward()
    return params_P.grad, losses_B.detach(), logits_BK.argmax(1) == labels_B


def train_on_lanes(images_ND, labels_N, num_classes, num_epochs, *, lane_rows=16, learning_rate=0.5):
    """Train on four lanes, in an order of our own; the last parameters."""
    params_P = sgd_linear.initial_params(num_classes, images_ND.shape[1])
    descent = make_descent(images_ND.shape[1], num_classes, 4)
    descent.load(params_P, params_P)
    numbers = torch.Generator().manual_seed(0)
    for _ in range(num_epochs):
        descent.begin_epoch(-(-len(images_ND) // (4 * lane_rows)), 0, learning_rate)
        for rows_B in torch.randperm(len(images_ND), generator=numbers).split(4 * lane_rows):
            counts = [len(rows) for rows in rows_B.tensor_split(4)]
            descent.step(images_ND[rows_B], labels_N[rows_B], counts, 0.0)
    return descent.params


def accuracy(params, images_ND, labels_N):
    return float((sgd_linear.log_probabilities(params, images_ND).argmax(1) == labels_N).float().mean())


@pytest.mark.parametrize("step", STEPS)
def test_a_step_goes_against_the_gradient_of_autograd(step):
    params_P, *rows = draw_step(*step)
    moved_2P, [losses_B], [is_correct_B], norm = walk_alone(params_P, [rows])
    moved_P, mean_P = moved_2P.reshape(2, -1)
    gradient_P, expected_losses, expected_correct = autograd(params_P, *rows[:2])
    np.testing.assert_allclose(moved_P, params_P - 0.5 * gradient_P, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(mean_P, moved_P)  # of one step
    np.testing.assert_allclose(losses_B, expected_losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(is_correct_B, expected_correct)
    assert norm == pytest.approx(float(gradient_P.norm()), rel=1e-4)


@pytest.mark.parametrize("step", [step for step in STEPS if step[1] < 100])
def test_the_loss_along_the_last_gradient_is_that_of_autograd(step):
    params_P, images_BD, labels_B, counts = draw_step(*step)
    descent = make_descent(*step[:2], len(counts))
    with torch.inference_mode():
        descent.load(params_P, params_P)
        descent.begin_epoch(1, 0, 0.5)
        descent.step(images_BD, labels_B, counts, 0.25)
        *losses, slope, num_images = np.sum(descent.look_along(), 0)
    gradient_P, *_ = autograd(params_P, images_BD, labels_B)
    expected = [autograd(params_P - length * 0.5 * gradient_P, images_BD, labels_B)[1].mean() for length in LINE]
    np.testing.assert_allclose(np.array(losses) / num_images, expected, rtol=1e-4, atol=1e-5)
    assert slope / num_images == pytest.approx(-0.5 * float(gradient_P.square().sum()), rel=1e-3)


def test_large_logits_lose_no_loss():
    params_P = torch.tensor([1000.0, -1000.0, 0.0, 0.0])
    descent = make_descent(1, 2, 1)
    descent.load(params_P, params_P)
    descent.begin_epoch(1, 0, 2.0)
    images_BD = torch.tensor([[255], [255]], dtype=torch.uint8)
    losses_B, is_correct_B = descent.step(images_BD, torch.tensor([0, 1]), [2], 0.0)
    assert (losses_B.tolist(), is_correct_B.tolist()) == ([0, 2000], [True, False])
    assert (params_P - torch.from_numpy(descent.save()[:4])).tolist() == [1, -1, 1, -1]


def three_steps(num_values, num_classes, counts):
    """Draw parameters and steps, the last one of fewer rows."""
    params_P = draw_step(num_values, num_classes, counts)[0]
    fewer = [-(-count // 8) for count in counts]
    return params_P, [
        draw_step(num_values, num_classes, each, seed)[1:] for seed, each in enumerate((counts, counts, fewer))
    ]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_a_bit(step, num_threads):
    steps = three_steps(*step)
    params_2P, losses, is_correct, norm = walk_alone(*steps)
    got_2P, got_losses, got_correct, got_norm = walk_alone(*steps, num_threads)
    np.testing.assert_array_equal(got_2P, params_2P)
    assert got_norm == norm
    assert all(map(torch.equal, (*got_losses, *got_correct), (*losses, *is_correct)))


@pytest.mark.parametrize("step", [step for step in STEPS if len(step[2]) > 1])
@pytest.mark.parametrize("num_actors", range(2, 9))
def test_actors_do_not_change_a_bit(step, num_actors):
    counts = step[2]
    if num_actors > len(counts):
        pytest.skip("there are more actors than lanes")
    params_P, steps = three_steps(*step)
    params_2P, losses, is_correct, norm = walk_alone(params_P, steps)
    answers = walk_together(num_actors, params_P, steps, num_threads=1 + num_actors % 2)
    for (got_2P, *_, got_norm), _ in answers:
        np.testing.assert_array_equal(got_2P, params_2P)
        assert got_norm == norm
    for place, name in ((1, losses), (2, is_correct)):
        got = [torch.cat([answer[place][number] for answer, _ in answers]) for number in range(3)]
        assert all(map(torch.equal, got, name))


@pytest.mark.parametrize("step", [step for step in STEPS if has_blocks(*step[:2])])
def test_sums_of_lanes_and_classes_of_actors_come_to_the_same(step):
    steps = three_steps(*step)
    by_class, by_lane = (walk_alone(*steps, has_class_blocks=each) for each in (True, False))
    np.testing.assert_allclose(by_class[0], by_lane[0], rtol=1e-4, atol=1e-5)
    for (got_2P, *_), _ in walk_together(3, *steps, has_class_blocks=False):
        np.testing.assert_array_equal(got_2P, by_lane[0])


@pytest.mark.parametrize(
    ("num_values", "num_classes", "batch_size", "expected"),
    [
        (12_288, 1000, 64, True),
        (12_288, 1000, 4096, True),
        (12_288, 1000, 8192, False),
        (3072, 100, 256, False),
        (3072, 300, 256, True),
        (784, 10, 64, False),
        (12_288, 10, 64, False),
        (64, 65, 64, False),
    ],
)
def test_actors_share_many_classes_of_large_images(num_values, num_classes, batch_size, expected):
    assert has_blocks(num_values, num_classes, batch_size) == expected


@pytest.mark.parametrize("shape", [(784, 10), (3072, 100), (3900, 1000)])
@pytest.mark.parametrize("num_actors", [2, 4, 8])
def test_at_most_two_and_a_half_times_the_parameters_leave_an_actor(shape, num_actors):
    params_P, *rows = draw_step(*shape, [2] * 8)
    for _, num_bytes in walk_together(num_actors, params_P, [rows]):
        assert 0 < num_bytes <= 2.5 * 4 * len(params_P)


def test_the_shapes_here_are_of_one_tile_of_some_and_of_many():
    numbers = [len(cut_tiles(num_classes, num_values, "cpu")) for num_values, num_classes, _ in STEPS]
    assert (min(numbers), sorted(numbers)[-2] > 1, max(numbers) >= 32) == (1, True, True)


_MEASURE = """
import resource, sys, torch
from test_descent import draw_step, make_descent
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
torch.set_num_threads(1)
small = make_descent(3072, 100, 8, num_threads=2)
def train(descent, images_BD, labels_B, counts):
    with torch.inference_mode():
        descent.begin_epoch(2, 0, 0.1)
        for _ in range(2):
            descent.step(images_BD, labels_B, counts, 0.5)
        descent.end_epoch()
train(small, *draw_step(3072, 100, [8] * 8)[1:])
_, *rows = draw_step(12_288, 1000, [8] * 8)
open("/proc/self/clear_refs", "w").write("5")
before = resident()
descent = make_descent(12_288, 1000, 8, num_threads=2)
train(descent, *rows)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print((peak - before) / (4 * 1000 * 12_289))
"""


def test_parameters_and_mean_are_nearly_all_that_a_descent_holds():
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert 2 < float(done.stdout) < 2.5


def test_a_separable_problem_is_learned_without_a_fault():
    torch.manual_seed(1)
    labels_N = torch.randint(0, 3, (400,))
    images_ND = (torch.randint(0, 100, (400, 12)) + 120 * (torch.arange(12) % 3 == labels_N[:, None])).to(torch.uint8)
    assert accuracy(make_descent(12, 3, 1).params, images_ND, labels_N) < 0.8
    assert accuracy(train_on_lanes(images_ND, labels_N, 3, 20), images_ND, labels_N) == 1


def test_digits_are_learned_about_as_well_as_by_scikit_learn():
    digits = load_digits()
    pixels = np.rint(digits.data * 255 / 16)
    model = LogisticRegression(max_iter=1000).fit(pixels[:898] / 255, digits.target[:898])
    images_ND, labels_N = torch.tensor(pixels, dtype=torch.uint8), torch.tensor(digits.target)
    params = train_on_lanes(images_ND[:898], labels_N[:898], 10, 20)
    expected = model.score(pixels[898:] / 255, digits.target[898:])
    assert accuracy(params, images_ND[898:], labels_N[898:]) == pytest.approx(expected, abs=0.02)


def test_many_steps_end_at_the_weights_of_scikit_learn():
    # Classes that overlap have one best model; its logits' difference is all that the loss sees.
    torch.manual_seed(2)
    labels_N = torch.arange(400) % 2
    images_ND = (torch.randint(0, 160, (400, 2)) + labels_N[:, None] * torch.tensor([60, 20])).to(torch.uint8)
    model = LogisticRegression(C=1e9, tol=1e-9).fit(images_ND.numpy() / 255, labels_N.numpy())
    params = train_on_lanes(images_ND, labels_N, 2, 3000, lane_rows=100, learning_rate=2)
    params_P = torch.empty(6)
    params.save(params_P)
    weights_KD, bias_K = split_params(params_P, 2)
    np.testing.assert_allclose((weights_KD[1] - weights_KD[0])[None], model.coef_, rtol=0.01)
    np.testing.assert_allclose((bias_K[1] - bias_K[0])[None], model.intercept_, rtol=0.01)
