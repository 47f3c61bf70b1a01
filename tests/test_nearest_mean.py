import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.compute.classifiers import nearest_mean
from pipeline.compute.scoring import confusion
from pipeline.compute.threads import Threads

pytestmark = pytest.mark.usefixtures("one_thread")
# images, values of one image, classes; the last is an image large enough for torch to share among threads
SHAPES = [(1, 1, 1), (1, 784, 2), (7, 3, 1), (40, 64, 10), (33, 75, 37), (70, 130, 64), (5, 784, 300), (3, 40_000, 2)]
BLOCKS = [4, 2**12, 2**16, 2**30]


def draw(num_images, num_values, num_classes, seed=0):
    random = np.random.default_rng(seed)
    images_ND = random.integers(0, 256, (num_images, num_values), np.uint8)
    labels_N = random.integers(0, num_classes, num_images)
    means_KD = random.random((num_classes, num_values), np.float32)
    return images_ND, labels_N, means_KD


def class_sums(images_ND, labels_N, num_classes):
    return [t.numpy() for t in nearest_mean.class_sums(torch.tensor(images_ND), torch.tensor(labels_N), num_classes)]


def distances(images_ND, means_KD, num_threads=1):
    return [
        t.numpy() for t in nearest_mean.distances(torch.tensor(images_ND), torch.tensor(means_KD), Threads(num_threads))
    ]


def sum_in_a_loop(images_ND, labels_N, num_classes):
    sums_KD = np.zeros((num_classes, images_ND.shape[1]), np.int64)
    for image_D, label in zip(images_ND, labels_N, strict=True):
        sums_KD[label] += image_D
    return sums_KD


def measure_in_a_loop(images_ND, means_KD):
    l1_NK, rms_NK = np.empty((2, len(images_ND), len(means_KD)))
    for row, image_D in enumerate(images_ND):
        for label, mean_D in enumerate(means_KD.astype(np.float64)):
            l1_NK[row, label] = np.abs(image_D / 255 - mean_D).mean()
            rms_NK[row, label] = np.sqrt(((image_D / 255 - mean_D) ** 2).mean())
    return l1_NK, rms_NK


@pytest.mark.parametrize("shape", [*SHAPES, (1023, 5, 3), (1024, 5, 3), (1025, 5, 3), (3000, 5, 3)])
def test_class_sums_are_those_of_a_loop(shape):
    images_ND, labels_N, _ = draw(*shape)
    sums_KD, counts_K = class_sums(images_ND, labels_N, shape[2])
    assert (sums_KD.dtype, counts_K.dtype) == (np.int64, np.int64)
    np.testing.assert_array_equal(sums_KD, sum_in_a_loop(images_ND, labels_N, shape[2]))
    np.testing.assert_array_equal(counts_K, np.bincount(labels_N, minlength=shape[2]))


@pytest.mark.parametrize("num_images", [65_793, 65_794, 200_001])
def test_class_sums_are_exact_beyond_what_float32_counts(num_images):
    images_ND = np.full((num_images, 3), 255, np.uint8)
    images_ND[-1] = [254, 1, 0]
    sums_KD, counts_K = class_sums(images_ND, np.ones(num_images, np.int64), 2)
    first = 255 * (num_images - 1)
    assert sums_KD.tolist() == [[0, 0, 0], [first + 254, first + 1, first]]
    assert counts_K.tolist() == [0, num_images]


@pytest.mark.parametrize("num_rows", [1, 7, 60_000])
def test_class_sums_do_not_depend_on_the_size_of_blocks(monkeypatch, num_rows):
    images_ND, labels_N, _ = draw(3000, 5, 3)
    before = class_sums(images_ND, labels_N, 3)
    monkeypatch.setattr(nearest_mean, "_SUM_ROWS", num_rows)
    np.testing.assert_array_equal(class_sums(images_ND, labels_N, 3)[0], before[0])


def test_no_images_add_up_to_nothing():
    sums_KD, counts_K = class_sums(*draw(0, 4, 3)[:2], 3)
    assert (sums_KD.tolist(), counts_K.tolist()) == ([[0] * 4] * 3, [0] * 3)


@pytest.mark.parametrize("shape", [(50, 64, 3), (3000, 5, 10)])
def test_means_are_those_of_numpy(shape):
    images_ND, labels_N, _ = draw(*shape)
    means_KD = nearest_mean.class_means(*map(torch.tensor, class_sums(images_ND, labels_N, shape[2]))).numpy()
    expected_KD = [(images_ND[labels_N == label] / 255).mean(0) for label in range(shape[2])]
    assert means_KD.dtype == np.float32
    np.testing.assert_allclose(means_KD, expected_KD, rtol=1.2e-7)  # one step of float32


def test_means_of_black_and_white_are_exactly_0_and_1():
    sums_KD = torch.tensor([[0], [255 * 10**12]])
    assert nearest_mean.class_means(sums_KD, torch.tensor([3, 10**12])).tolist() == [[0], [1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_those_of_a_loop(shape):
    images_ND, _, means_KD = draw(*shape)
    for got_NK, expected_NK in zip(distances(images_ND, means_KD), measure_in_a_loop(images_ND, means_KD), strict=True):
        assert (got_NK.dtype, got_NK.shape) == (np.float32, (shape[0], shape[2]))
        np.testing.assert_allclose(got_NK, expected_NK, rtol=2e-6)


def test_black_and_white_are_at_distance_1():
    images_ND = np.array([[0] * 784, [255] * 784], np.uint8)
    for got_NK in distances(images_ND, (images_ND / 255).astype(np.float32)):
        assert got_NK.tolist() == [[0, 1], [1, 0]]


def test_an_image_of_all_greys_is_at_distance_0_from_itself():
    image_D = np.arange(256, dtype=np.uint8)
    for got_NK in distances(image_D[None], image_D[None] / np.float32(255)):
        assert got_NK.tolist() == [[0]]


@pytest.mark.parametrize("num_values", [5, 784, 12_288, 40_000])
def test_images_that_equal_a_mean_are_at_distance_0_from_it(num_values):
    images_ND, _, _ = draw(7, num_values, 2)
    for got_NK in distances(images_ND, images_ND / np.float32(255)):
        assert (got_NK.diagonal().tolist(), int((got_NK == 0).sum())) == ([0] * 7, 7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_bytes", BLOCKS)
def test_the_size_of_blocks_does_not_change_a_bit(monkeypatch, shape, num_bytes):
    images_ND, _, means_KD = draw(*shape)
    before = distances(images_ND, means_KD)
    monkeypatch.setattr(nearest_mean, "_BLOCK_BYTES", {"cpu": num_bytes})
    np.testing.assert_array_equal(distances(images_ND, means_KD), before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [2, 3, 16])
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch, shape, num_threads):
    monkeypatch.setattr(nearest_mean, "_BLOCK_BYTES", {"cpu": 4096})
    images_ND, _, means_KD = draw(*shape)
    np.testing.assert_array_equal(distances(images_ND, means_KD, num_threads), distances(images_ND, means_KD))


@pytest.mark.parametrize("width", [8, 24, 256])
def test_the_width_of_tables_does_not_change_a_bit(monkeypatch, width):
    images_ND, _, means_KD = draw(40, 130, 70)
    before = distances(images_ND, means_KD)
    monkeypatch.setattr(nearest_mean, "_TABLE_CLASSES", width)
    np.testing.assert_array_equal(distances(images_ND[5:9], means_KD), np.array(before)[:, 5:9])


def test_threads_work_where_nothing_is_to_be_differentiated(monkeypatch):
    images_ND, _, means_KD = draw(40, 64, 10)
    monkeypatch.setattr(nearest_mean, "_BLOCK_BYTES", {"cpu": 4096})
    with torch.inference_mode():
        got = distances(images_ND, means_KD, 2)
    np.testing.assert_array_equal(got, distances(images_ND, means_KD))


def test_what_fails_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(nearest_mean, "_BLOCK_BYTES", {"cpu": 64})
    with pytest.raises(RuntimeError, match="size of tensor"):
        nearest_mean.distances(torch.zeros(9, 16, dtype=torch.uint8), torch.zeros(3, 8), Threads(2))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_alone_has_the_bits_that_it_has_among_others(shape):
    images_ND, _, means_KD = draw(*shape)
    together = np.array(distances(images_ND, means_KD))
    for row in range(len(images_ND)):
        np.testing.assert_array_equal(distances(images_ND[row : row + 1], means_KD), together[:, row : row + 1])


def test_a_class_has_the_bits_that_it_has_among_others():
    images_ND, _, means_KD = draw(20, 75, 12)
    together = np.array(distances(images_ND, means_KD))
    for label in range(12):
        np.testing.assert_array_equal(distances(images_ND, means_KD[label, None]), together[:, :, label, None])


def test_no_images_have_no_distances():
    images_ND, _, means_KD = draw(0, 784, 3)
    assert [got_NK.shape for got_NK in distances(images_ND, means_KD)] == [(0, 3), (0, 3)]


def test_distances_leave_images_and_means_as_they_are():
    images_ND, _, means_KD = draw(9, 16, 3)
    images, means = torch.tensor(images_ND), torch.tensor(means_KD)
    nearest_mean.distances(images, means)
    np.testing.assert_array_equal(images, images_ND)
    np.testing.assert_array_equal(means, means_KD)


@pytest.mark.parametrize(
    ("row", "label"), [([1, 2, 3], 0), ([2, 1, 1], 1), ([3, 2, 1], 2), ([1, 1, 1], 0), ([0.5] * 300, 0)]
)
def test_a_tie_goes_to_the_first_class(row, label):
    assert nearest_mean.nearest(torch.tensor([row] * 5)).tolist() == [label] * 5


def test_classes_with_one_mean_tie():
    images_ND, _, means_KD = draw(50, 64, 3)
    for got_NK in distances(images_ND, means_KD[[2, 0, 0, 2]]):
        assert set(nearest_mean.nearest(torch.tensor(got_NK)).tolist()) == {0, 1}


@pytest.mark.parametrize(("num_images", "num_classes"), [(0, 2), (1, 1), (500, 2), (2000, 12)])
def test_confusion_counts_as_a_loop_does(num_images, num_classes):
    labels_N, predictions_N = np.random.default_rng(3).integers(0, num_classes, (2, num_images))
    counts_KK = confusion(torch.tensor(labels_N), torch.tensor(predictions_N), num_classes).numpy()
    expected_KK = np.zeros((num_classes, num_classes), np.int64)
    for label, prediction in zip(labels_N, predictions_N, strict=True):
        expected_KK[label, prediction] += 1
    assert counts_KK.dtype == np.int64
    np.testing.assert_array_equal(counts_KK, expected_KK)


def test_two_classes_give_the_notebooks_is_3():
    # "Deep Learning for Coders with fastai and PyTorch", chapter 4, word for word.
    def mnist_distance(a, b):
        return (a - b).abs().mean((-1, -2))

    def is_3(x):
        return mnist_distance(x, mean3) < mnist_distance(x, mean7)

    images_ND, _, means_KD = draw(400, 784, 2)
    mean3, mean7 = torch.tensor(means_KD).view(2, 28, 28)
    valid_tens = torch.tensor(images_ND).view(-1, 28, 28).float() / 255
    l1_NK, _ = distances(images_ND, means_KD)
    predictions_N = nearest_mean.nearest(torch.tensor(l1_NK))
    assert 100 < predictions_N.sum() < 300
    assert torch.equal(predictions_N == 0, is_3(valid_tens))


@pytest.fixture(scope="module")
def sample(mnist_sample):
    """Every image of mnist_sample, read by plain Pillow."""
    paths = sorted(mnist_sample.rglob("*.png"))
    return {path.relative_to(mnist_sample).as_posix(): np.asarray(Image.open(path)).ravel() for path in paths}


@pytest.fixture(scope="module")
def sample_means(sample):
    images_ND, labels_N = stack(sample, "train")
    return nearest_mean.class_means(*map(torch.tensor, class_sums(images_ND, labels_N, 2))).numpy()


def stack(sample, split):
    groups = [[image for name, image in sample.items() if name.startswith(f"{split}/{label}/")] for label in (3, 7)]
    return np.concatenate(groups), np.repeat([0, 1], [len(group) for group in groups])


@pytest.mark.data
@pytest.mark.parametrize(
    ("classifier", "num_correct", "accuracies", "mean"),
    [(0, [926, 1013], [0.9168, 0.9854], 0.9511), (1, [968, 1001], [0.9584, 0.9737], 0.9661)],
)
def test_mnist_sample_gives_the_published_accuracies(sample, sample_means, classifier, num_correct, accuracies, mean):
    images_ND, labels_N = stack(sample, "valid")
    predictions_N = nearest_mean.nearest(torch.tensor(distances(images_ND, sample_means)[classifier]))
    counts_KK = confusion(torch.tensor(labels_N), predictions_N, 2).numpy()
    shares_K = np.diag(counts_KK) / counts_KK.sum(1)
    assert counts_KK.sum(1).tolist() == [1010, 1028]
    assert np.diag(counts_KK).tolist() == num_correct
    assert shares_K.round(4).tolist() == accuracies
    assert round(shares_K.mean(), 4) == mean


@pytest.mark.data
@pytest.mark.parametrize(
    ("index", "name", "l1", "rms"),
    [(1, "train/3/10000.png", [0.1114, 0.1586], [0.2021, 0.3021]), (69, None, [0.1573, 0.1683], [0.2822, 0.3170])],
)
def test_known_images_have_the_published_distances(sample, sample_means, index, name, l1, rms):
    threes = sorted(name for name in sample if name.startswith("train/3/"))
    assert name in (threes[index], None)
    got = distances(sample[threes[index]][None], sample_means)
    np.testing.assert_array_equal(np.round(got, 4)[:, 0], np.array([l1, rms], np.float32))


@pytest.mark.data
def test_the_mean_three_is_that_of_a_plain_stack(sample, sample_means):
    images_ND, labels_N = stack(sample, "train")
    assert np.bincount(labels_N).tolist() == [6131, 6265]
    for label in range(2):
        expected_D = (images_ND[labels_N == label] / 255).mean(0)
        np.testing.assert_allclose(sample_means[label], expected_D, atol=3e-8)
