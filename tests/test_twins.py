"""Near-duplicates: the same image, changed a little, and no other."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_search import in_blocks, memory

from pipeline.compute.search import search
from pipeline.compute.twins import choose_twins, find_candidates, sign, signatures

SHAPES = [(28, 28, 1), (20, 30, 3)]


def drawings(number, shape, seed=0):
    """Soft blobs on black, away from the edge."""
    height, width, channels = shape
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:height, :width]
    images = np.zeros((number, *shape))
    for image in images:
        for _ in range(4):
            centre, radius = random.uniform(0.35, 0.65, 2) * (height, width), random.uniform(1, 3)
            blob = np.exp(-((down - centre[0]) ** 2 + (across - centre[1]) ** 2) / radius**2)
            image += blob[:, :, None] * random.uniform(60, 200, channels)
    return np.clip(images, 0, 255).astype(np.uint8)


def move(images, down, across):
    return np.roll(images, (down, across), (1, 2))


def add_noise(images):
    noise = np.random.default_rng(5).integers(-8, 9, images.shape)
    return np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)


def as_jpeg(images):
    def reencode(image):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "JPEG", quality=50)
        return np.asarray(Image.open(buffer)).reshape(image.shape)

    return np.stack([reencode(image) for image in images])


def twins_of(images, others, shape):
    flat, flat_others = images.reshape(len(images), -1), others.reshape(len(others), -1)
    rows = np.arange(len(others))
    blocks = in_blocks(flat_others, rows, rows * 0, 16)
    searched = torch.from_numpy(flat)
    plain = search(searched, blocks, 5)
    found = find_candidates(
        searched,
        plain,
        shape,
        [sign(block, shape) for block in blocks],
        lambda rows: torch.from_numpy(flat_others[rows]),
    )
    return plain, choose_twins([found], plain, searched.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "change",
    [lambda x: move(x, 1, 0), lambda x: move(x, -1, 1), lambda x: add_noise(move(x, 0, 1)), add_noise, as_jpeg],
)
def test_a_changed_image_is_found_near(shape, change):
    others = drawings(60, shape)
    plain, twins = twins_of(change(others[:20]), others, shape)
    is_found = (twins.rows_NJ[:, 0] == np.arange(20)) & (twins.distances_NJ[:, 0] < 0.25 * plain.distances_NJ[:, 4])
    assert is_found.sum() >= 19  # where noise turns the rounding of a centre of mass, one is missed


@pytest.mark.parametrize("shape", SHAPES)
def test_a_moved_image_is_at_no_distance(shape):
    others = drawings(30, shape)
    _, twins = twins_of(move(others, 1, -1), others, shape)
    assert not twins.distances_NJ.any()


def test_memory_for_large_images_is_bounded():
    shape = 224, 224, 3
    others = np.random.default_rng(0).integers(0, 256, (64, *shape), np.uint8)
    _, twins = twins_of(others[:2], others[:8], shape)  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    _, twins = twins_of(others, others, shape)
    assert twins.rows_NJ[:, 0].tolist() == list(range(64))
    assert memory("VmHWM") - before < 128 * 2**20


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1), (3, 2, 3), (8, 8, 1)])
def test_another_image_is_as_near_as_its_nearest_neighbor_at_most(shape):
    images, others = drawings(15, shape, seed=1), drawings(40, shape)
    plain, twins = twins_of(images, others, shape)
    assert (twins.distances_NJ <= plain.distances_NJ[:, :1]).all()
    assert (twins.distances_NJ[:, 0] >= 0.2 * plain.distances_NJ[:, 0]).all()


@pytest.mark.parametrize("num_actors", [2, 4])
def test_twins_are_the_same_however_many_actors_have_the_training_images(num_actors):
    shape, others = (12, 12, 1), drawings(400, (12, 12, 1))
    images, flat = drawings(200, shape, seed=1).reshape(200, -1), others.reshape(400, -1)
    plain, whole = twins_of(images.reshape(200, *shape), others, shape)
    found = []
    for actor in range(num_actors):
        rows = np.arange(actor, 400, num_actors)
        blocks, searched = in_blocks(flat[rows], rows, rows * 0, 16), torch.from_numpy(images)
        own = search(searched, blocks, 5)
        found.append(
            find_candidates(
                searched,
                own,
                shape,
                [sign(block, shape) for block in blocks],
                lambda rows: torch.from_numpy(flat[rows]),
            )
        )
    twins = choose_twins(found, plain, images.shape[1])
    assert (whole.rows_NJ != plain.rows_NJ[:, :1]).any()
    np.testing.assert_array_equal(twins.rows_NJ, whole.rows_NJ)
    np.testing.assert_array_equal(twins.distances_NJ, whole.distances_NJ)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_inverted", [False, True])
def test_a_move_does_not_change_a_signature(shape, is_inverted):
    images = drawings(10, shape)
    both = [255 - each if is_inverted else each for each in (images, move(images, 1, 1))]
    one, other = (signatures(torch.from_numpy(each.reshape(10, -1)), shape) for each in both)
    assert torch.equal(one, other)
    assert len(one.unique(dim=0)) == 10


def test_signatures_of_no_images():
    assert signatures(torch.zeros(0, 784, dtype=torch.uint8), (28, 28, 1)).shape[0] == 0
