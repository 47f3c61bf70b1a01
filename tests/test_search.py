"""The nearest training images, against a plain loop in int64."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_products import pixels

from pipeline import plan
from pipeline.compute import lanes, rounded, strips
from pipeline.compute.neighbors import FAR
from pipeline.compute.search import _sort, search
from pipeline.compute.strips import TrainBlock
from pipeline.compute.threads import Threads

needs_instructions = pytest.mark.skipif(not rounded.works(), reason="needs a CPU with VNNI, and a torch with oneDNN")


def nearest_in_a_loop(images, others, rows, labels, number, own_rows=None, only_labels=None):
    """For each image the nearest others, by distance and then by row, as lists of (distance, row, label)."""
    found = []
    for index, image in enumerate(images):
        distances = ((others.astype(np.int64) - image.astype(np.int64)) ** 2).sum(1)
        order = sorted(
            (int(distance), int(row), int(label))
            for distance, row, label in zip(distances, rows, labels, strict=True)
            if (own_rows is None or row != own_rows[index]) and (only_labels is None or label == only_labels[index])
        )
        found.append(order[:number])
    return found


def in_blocks(others, rows, labels, size):
    return [
        TrainBlock(*(torch.from_numpy(each[start : start + size]) for each in (others, rows, labels)))
        for start in range(0, len(others), size)
    ]


def as_lists(found):
    columns = zip(found.distances_NJ, found.rows_NJ, found.labels_NJ, strict=True)
    return [[(int(d), int(r), int(label)) for d, r, label in zip(*row, strict=True) if d != FAR] for row in columns]


def train(number, num_values, high=256, seed=1):
    rows = np.random.default_rng(seed).permutation(number)
    return pixels(number, num_values, seed, high), rows, rows % 3


@pytest.mark.parametrize("num_neighbors", [1, 5, 40])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("high", [256, 2, 1])  # of two grey values most distances are ties, and of one all
def test_neighbors_are_those_of_a_plain_loop(monkeypatch, num_neighbors, size, high):
    monkeypatch.setattr("pipeline.compute.search._TILE_IMAGES", 8)
    images, others = pixels(20, 12, high=high), train(200, 12, high)
    found = search(torch.from_numpy(images), in_blocks(*others, size), num_neighbors, Threads(2))
    assert as_lists(found) == nearest_in_a_loop(images, *others, num_neighbors)


@pytest.mark.parametrize("most", [64, 96])
@pytest.mark.parametrize(("size", "num_neighbors"), [(700, 5), (170, 1), (33, 40)])
@pytest.mark.parametrize("high", [256, 2, 1])
@pytest.mark.parametrize("is_searched_in_all", [True, False])
def test_neighbors_are_found_in_many_strips(monkeypatch, most, size, num_neighbors, high, is_searched_in_all):
    monkeypatch.setattr("pipeline.compute.search._TILE_IMAGES", 16)
    monkeypatch.setattr("pipeline.compute.search._MAX_WAITING", 100)
    monkeypatch.setattr(strips, "STRIP", most)
    monkeypatch.setattr("pipeline.compute.search.STRIP", most)
    monkeypatch.setattr("pipeline.compute.search._PRODUCTS", {"cpu": 5 * most})
    others = train(700, 12, high)
    images = others[0][:50] if is_searched_in_all else pixels(50, 12, high=high)
    own_rows, only = (others[1][:50], None) if is_searched_in_all else (None, np.arange(50) % 3)
    found = search(
        torch.from_numpy(images),
        in_blocks(*others, size),
        num_neighbors,
        Threads(2),
        None if own_rows is None else torch.from_numpy(own_rows),
        None if only is None else torch.from_numpy(only),
    )
    assert as_lists(found) == nearest_in_a_loop(images, *others, num_neighbors, own_rows, only)


def test_a_nearer_one_counts_that_is_listed_later():
    others, rows, labels = np.array([[9], [5], [5]], np.uint8), np.arange(3), np.array([0, 0, 1])
    blocks = [*in_blocks(others[:1], rows[:1], labels[:1], 1), *in_blocks(others[1:], rows[1:], labels[1:], 2)]
    images, only = np.array([[4], [4]], np.uint8), np.array([0, 1])  # the second one finds none at first
    found = search(torch.from_numpy(images), blocks, 1, only_labels_N=torch.from_numpy(only))
    assert as_lists(found) == [[(1, 1, 0)], [(1, 2, 1)]]


def test_of_many_that_are_alike_few_are_looked_at(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 64)
    numbers = []
    monkeypatch.setattr("pipeline.compute.search._sort", lambda *keys: numbers.append(len(keys[0])) or _sort(*keys))
    others, rows = np.zeros((512, 12), np.uint8), np.arange(2048)
    blocks = [block for first in range(4) for block in in_blocks(others, rows[first::4], rows[first::4], 512)]
    found = search(torch.from_numpy(others[:20]), blocks, 5)
    assert found.rows_NJ.tolist() == [list(range(5))] * 20
    assert sum(numbers) < 20 * 128


@pytest.mark.parametrize(("num_images", "sizes"), [(1, [1]), (31, [31]), (32, [32]), (64, [64]), (65, [64, 1]),
    (200, [64, 64, 64, 8]), (230, [64, 64, 64, 32, 6])])  # fmt: skip
def test_strips_have_images_of_all_lengths_the_shortest_first(monkeypatch, num_images, sizes):
    monkeypatch.setattr(strips, "STRIP", 64)
    images, rows, labels = train(num_images, 30)
    [block] = in_blocks(images, rows, labels, num_images)
    dealt = strips.make_strips(block, None, Threads(), keeps_pixels=False)
    assert np.diff(dealt.bounds).tolist() == sizes
    assert sorted(dealt.others.rows_T.tolist()) == list(range(num_images))
    assert dealt.others.rows_T[dealt.by_row_T].tolist() == list(range(num_images))
    for start, stop in itertools.pairwise(dealt.bounds):
        lengths = dealt.others.squares_T[start:stop]
        assert (lengths.diff() >= 0).all()
        if stop - start == 64:  # no strip lacks images of some length that others have
            ranks = torch.searchsorted(dealt.others.squares_T.sort().values, lengths)
            gaps = torch.cat([torch.tensor([0]), ranks, torch.tensor([num_images - 1])]).diff()
            assert gaps.max() <= 2 * len(sizes)
    assert dealt.others.squares_T.tolist() == [
        int(((image.astype(int) - 128) ** 2).sum()) for image in images[np.argsort(rows)][dealt.others.rows_T.numpy()]
    ]


@pytest.mark.parametrize("num_values", [1, 1025, 33_000])
def test_images_of_any_size_are_compared_exactly(num_values):
    images, others = pixels(3, num_values), train(9, num_values)
    for size, number in ((4, 3), (9, 1)):  # of 9 columns, groups do not come out even
        found = search(torch.from_numpy(images), in_blocks(*others, size), number)
        assert as_lists(found) == nearest_in_a_loop(images, *others, number)


def test_the_farthest_images_are_exact():
    black, white = np.zeros((1, 40_000), np.uint8), np.full((1, 40_000), 255, np.uint8)
    found = search(torch.from_numpy(black), in_blocks(white, np.arange(1), np.arange(1), 1), 1)
    assert found.distances_NJ.tolist() == [[40_000 * 255**2]]


@pytest.mark.parametrize("size", [7, 200])
def test_an_image_is_no_neighbor_of_itself_but_its_copy_is(size):
    images, rows, labels = train(50, 6, high=3)
    images[rows == 7] = images[rows == 3]
    found = search(
        torch.from_numpy(images), in_blocks(images, rows, labels, size), 4, own_rows_N=torch.from_numpy(rows)
    )
    assert as_lists(found) == nearest_in_a_loop(images, images, rows, labels, 4, own_rows=rows)
    [place] = np.flatnonzero(rows == 7)
    assert (found.distances_NJ[place, 0], 3 in found.rows_NJ[place]) == (0, True)


def test_neighbors_of_one_class_alone():
    images, others = pixels(9, 6), train(60, 6)
    only = np.arange(9) % 4  # there is no class 3
    found = search(torch.from_numpy(images), in_blocks(*others, 16), 2, only_labels_N=torch.from_numpy(only))
    assert as_lists(found) == nearest_in_a_loop(images, *others, 2, only_labels=only)
    assert (found.distances_NJ[3] == FAR).all()


def test_without_images_there_are_no_neighbors():
    others = train(3, 5)
    assert search(torch.zeros(0, 5, dtype=torch.uint8), in_blocks(*others, 2), 2).rows_NJ.shape == (0, 2)
    assert (search(torch.from_numpy(pixels(2, 5)), [], 2).distances_NJ == FAR).all()


@pytest.mark.parametrize("are_alike", [False, True])
@pytest.mark.parametrize("number", [5, 1000])
@pytest.mark.parametrize("is_fast", [False, pytest.param(True, marks=needs_instructions)])
def test_memory_for_a_search_is_bounded_whatever_the_number_of_blocks(monkeypatch, are_alike, number, is_fast):
    monkeypatch.setattr("pipeline.compute.search.has_fast_int8", lambda device: is_fast)  # else by projections
    sizes = min(plan._REQUEST_BYTES // 2048, plan._REQUEST_NEIGHBORS // 4 // number), lanes._BLOCK_BYTES // 2048
    high = 1 if are_alike else 256
    images, block = (np.repeat(pixels(size, 32, seed, high), 64, axis=1) for seed, size in enumerate(sizes))
    blocks = (TrainBlock(torch.from_numpy(block), torch.arange(len(block)), torch.arange(len(block))) for _ in range(2))
    few, rows = block[:600], np.arange(600)
    search(torch.from_numpy(few), in_blocks(few, rows, rows, 600), 5)  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    search(torch.from_numpy(images), blocks, number, Threads(2))
    assert memory("VmHWM") - before < 256 * 2**20


def memory(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a torch built for it")
def test_a_gpu_finds_the_same_neighbors():
    images, others = pixels(700, 784), train(3000, 784)
    on_gpu = [TrainBlock(block.images_TD.cuda(), block.rows_T, block.labels_T) for block in in_blocks(*others, 512)]
    found = search(torch.from_numpy(images).cuda(), on_gpu, 5)
    assert as_lists(found) == as_lists(search(torch.from_numpy(images), in_blocks(*others, 1000), 5))
