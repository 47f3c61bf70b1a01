"""The arithmetic on a GPU against the same on the CPU; runs wherever torch and NumPy are, without Ray."""

import numpy as np
import pytest
import torch
from models import save_bytes
from torch import nn

from pipeline.compute import features, lane_products, tiles
from pipeline.compute.classifiers import nearest_mean, sgd_linear
from pipeline.compute.collective import Collective
from pipeline.compute.descent import Descent
from pipeline.compute.program import Runner, load_program, prepare
from pipeline.compute.scoring import confusion
from pipeline.compute.search import search
from pipeline.compute.strips import TrainBlock
from pipeline.compute.threads import Threads
from pipeline.model import Model, ModelInput
from pipeline.tree import lane_ranges

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a torch that was built for it"),
]
DEVICE = torch.device("cuda")
# images, values of one image, classes
SHAPES = [(1, 1, 2), (500, 784, 10), (33, 75, 37), (2, 786_432, 3), (20_000, 784, 2)]


def draw_tensors(num_images, num_values, num_classes, seed=0):
    random = np.random.default_rng(seed)
    images_ND = torch.from_numpy(random.integers(0, 256, (num_images, num_values), np.uint8))
    labels_N = torch.from_numpy(random.integers(0, num_classes, num_images))
    return images_ND, labels_N, torch.from_numpy(random.random((num_classes, num_values), np.float32))


def random_params(num_classes, num_values):
    return torch.randn(num_classes * num_values + num_classes, generator=torch.Generator().manual_seed(0)) / 100


def to_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def make_descent(params_P, num_values, num_lanes):
    """A descent of one actor where the parameters are, that begins with them."""
    num_classes, alone = len(params_P) // (num_values + 1), Collective(0, 1)
    descent = Descent(num_classes, num_values, num_lanes, device=params_P.device, collective=alone, threads=Threads())
    descent.load(params_P, params_P)
    return descent


def train_on_lanes(params_P, images_ND, labels_N, num_epochs):
    """Train on four lanes where the tensors are; the moved parameters with their mean, and the last losses."""
    descent = make_descent(params_P, images_ND.shape[1], 4)
    numbers = torch.Generator().manual_seed(0)
    for epoch in range(num_epochs):
        batches = torch.randperm(len(images_ND), generator=numbers).split(64)
        descent.begin_epoch(len(batches), epoch * len(batches), 0.2)
        for rows_B in batches:
            counts = [len(rows) for rows in rows_B.tensor_split(4)]
            rows_B = rows_B.to(params_P.device)
            losses_B, _ = descent.step(images_ND[rows_B], labels_N[rows_B], counts, 0.0)
    return torch.from_numpy(descent.save()), losses_B


@pytest.mark.parametrize("shape", SHAPES)
def test_class_sums_are_exactly_those_of_the_cpu(shape):
    images_ND, labels_N, _ = draw_tensors(*shape)
    on_cpu = nearest_mean.class_sums(images_ND, labels_N, shape[2])
    on_gpu = nearest_mean.class_sums(*to_device(images_ND, labels_N), shape[2])
    for expected, got in zip(on_cpu, on_gpu, strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got.cpu(), expected)


def test_class_sums_are_exact_beyond_what_float32_counts():
    images_ND = torch.full((70_000, 3), 255, dtype=torch.uint8)
    sums_KD, counts_K = nearest_mean.class_sums(*to_device(images_ND, torch.zeros(70_000, dtype=torch.int64)), 2)
    assert (sums_KD.tolist(), counts_K.tolist()) == ([[255 * 70_000] * 3, [0] * 3], [70_000, 0])


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_those_of_the_cpu(shape):
    images_ND, _, means_KD = draw_tensors(*shape)
    on_cpu = nearest_mean.distances(images_ND, means_KD)
    on_gpu = nearest_mean.distances(*to_device(images_ND, means_KD))
    for expected_NK, got_NK in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(got_NK.cpu(), expected_NK, atol=1e-6, rtol=0)


def test_means_are_exactly_those_of_the_cpu():
    sums_KD, counts_K = torch.tensor([[0, 255, 1000], [7, 3, 255]]), torch.tensor([13, 1])
    expected_KD = nearest_mean.class_means(sums_KD, counts_K)
    assert torch.equal(nearest_mean.class_means(*to_device(sums_KD, counts_K)).cpu(), expected_KD)


def test_the_same_distances_come_out_again():
    tensors = to_device(*draw_tensors(500, 784, 10)[::2])
    first, second = nearest_mean.distances(*tensors), nearest_mean.distances(*tensors)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("num_bytes", [2**16, 2**24])
def test_the_size_of_blocks_changes_no_more_than_rounding(monkeypatch, num_bytes):
    tensors = to_device(*draw_tensors(500, 784, 10)[::2])
    before = nearest_mean.distances(*tensors)
    monkeypatch.setattr(nearest_mean, "_BLOCK_BYTES", {DEVICE.type: num_bytes})
    for expected_NK, got_NK in zip(before, nearest_mean.distances(*tensors), strict=True):
        torch.testing.assert_close(got_NK, expected_NK, atol=1e-6, rtol=0)


def test_a_tie_goes_to_the_first_class():
    distances_NK = torch.tensor([[1.0, 2, 1], [2, 1, 1], [1, 1, 1]] * 100, device=DEVICE)
    assert nearest_mean.nearest(distances_NK).tolist() == [0, 1, 0] * 100


def test_confusion_is_that_of_the_cpu():
    labels_N, predictions_N = draw_tensors(5000, 1, 12)[1], draw_tensors(5000, 1, 12, seed=1)[1]
    expected_KK = confusion(labels_N, predictions_N, 12)
    assert torch.equal(confusion(*to_device(labels_N, predictions_N), 12).cpu(), expected_KK)


@pytest.mark.parametrize(
    ("num_values", "num_classes", "lane_counts"),
    [(784, 10, [16] * 8), (75, 37, [5, 16, 0, 7]), (786_432, 2, [2, 2]), (3072, 6000, [4] * 8)],
)
def test_a_step_is_that_of_the_cpu(num_values, num_classes, lane_counts):
    images_BD, labels_B, _ = draw_tensors(sum(lane_counts), num_values, num_classes)
    params_P = random_params(num_classes, num_values)
    moved, answers, norms = [], [], []
    for tensors in ([params_P, images_BD, labels_B], to_device(params_P, images_BD, labels_B)):
        descent = make_descent(tensors[0], num_values, len(lane_counts))
        descent.begin_epoch(1, 0, 0.1)
        answers.append(descent.step(*tensors[1:], lane_counts, 0.0))
        norms.append(descent.end_epoch())
        moved.append(descent.save())
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[1][0].cpu(), answers[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(answers[1][1].cpu(), answers[0][1])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("shape", [(784, 10), (3072, 100), (12_288, 1000)])
def test_lanes_grouped_otherwise_have_the_same_bits(shape):
    num_values, num_classes = shape
    numbers = torch.Generator(DEVICE).manual_seed(0)
    inputs_BC = torch.rand(8 * 16, tiles.count_columns(num_values), device=DEVICE, generator=numbers)
    errors_KB = torch.rand(8 * 16, num_classes, device=DEVICE, generator=numbers).T
    params = tiles.Params(num_classes, num_values, DEVICE)
    params.stored_S.uniform_(-1, 1, generator=numbers)
    inputs, errors = inputs_BC.split(16), errors_KB.split(16, 1)
    whole = torch.empty(4, num_classes, inputs_BC.shape[1], device=DEVICE)
    lane_products.add_lanes(errors, inputs, list(whole))
    logits_BK = torch.empty(8 * 16, num_classes, device=DEVICE)
    lane_products.write_logits(params, inputs_BC, [16] * 8, logits_BK, Threads())
    for num_actors in (2, 4, 8):
        parts = []
        for lanes in lane_ranges(8, num_actors):
            own = slice(lanes.start, lanes.stop)
            buffers = torch.empty_like(whole)
            lane_products.add_lanes(errors[own], inputs[own], list(buffers))
            parts.append(buffers[0])
            rows = slice(16 * lanes.start, 16 * lanes.stop)
            own_BK = torch.empty(16 * len(lanes), num_classes, device=DEVICE)
            lane_products.write_logits(params, inputs_BC[rows], [16] * len(lanes), own_BK, Threads())
            assert torch.equal(own_BK, logits_BK[rows])
        assert torch.equal(lane_products.add_tree(parts), whole[0])


def test_training_goes_as_on_the_cpu_and_the_same_again():
    images_ND, labels_N, _ = draw_tensors(300, 64, 3)
    images_ND[torch.arange(300), labels_N] = 255
    tensors = [random_params(3, 64), images_ND, labels_N]
    expected_P, losses_B = train_on_lanes(*tensors, 3)
    first, second = train_on_lanes(*to_device(*tensors), 3), train_on_lanes(*to_device(*tensors), 3)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first[0], expected_P, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first[1].cpu(), losses_B, rtol=1e-3, atol=1e-5)


def test_probabilities_are_those_of_the_cpu():
    images_ND, _, _ = draw_tensors(3000, 784, 10)
    params_P = random_params(10, 784) * 10
    on_cpu, on_gpu = tiles.Params(10, 784, torch.device("cpu")), tiles.Params(10, 784, DEVICE)
    on_cpu.load(params_P)
    on_gpu.load(params_P.to(DEVICE))
    expected_NK = sgd_linear.log_probabilities(on_cpu, images_ND)
    got_NK = sgd_linear.log_probabilities(on_gpu, images_ND.to(DEVICE))
    torch.testing.assert_close(got_NK.cpu(), expected_NK, rtol=1e-4, atol=1e-5)


def test_a_model_on_a_gpu_answers_as_on_the_cpu_in_any_batches():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    content, model = save_bytes(net), Model("", "logits", ModelInput(8, 8, "L"), (0.5,), (0.5,), 32, 10)
    images_ND = draw_tensors(500, 64, 10)[0]
    answers = []
    for pieces in ([500], [7] * 71 + [3]):
        runner, taken = Runner(load_program(content, DEVICE), model, DEVICE, Threads()), []
        for piece in images_ND.split(pieces):
            runner.put(piece, taken.append)
        runner.flush()
        answers.append(torch.cat(taken).cpu())
    assert torch.equal(*answers)
    with torch.inference_mode():
        expected_NO = net(prepare(images_ND, (8, 8, 1), (0.5,), (0.5,), 500))
    torch.testing.assert_close(answers[0], expected_NO, rtol=1e-2, atol=1e-2)  # TF32 in convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_added_and_searched_exactly_as_on_the_cpu(dtype):
    numbers = torch.Generator().manual_seed(0)
    kept_ND = features.to_features(torch.randn(700, 96, generator=numbers) * 5, dtype)
    labels_N, rows_T = torch.arange(700) % 3, torch.arange(600)
    sums = [nearest_mean.class_sums(each, labels_N.to(each.device), 3)[0].cpu() for each in (kept_ND, kept_ND.cuda())]
    assert torch.equal(*sums)
    assert torch.equal(features.to_unit_vectors(kept_ND.cuda()).cpu(), features.to_unit_vectors(kept_ND))
    found = [search(each[600:], [TrainBlock(each[:600], rows_T, rows_T % 3)], 20) for each in (kept_ND, kept_ND.cuda())]
    for expected, got in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
        np.testing.assert_array_equal(got, expected)
