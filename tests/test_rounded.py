"""Pairs that can be near by rounded products: none is missed, and a search by them finds what a plain loop finds."""

from functools import partial

import numpy as np
import pytest
import torch
from test_products import less_128, pixels
from test_search import as_lists, in_blocks, nearest_in_a_loop, needs_instructions, train

from pipeline.compute import rounded, strips
from pipeline.compute.neighbors import FAR
from pipeline.compute.search import search
from pipeline.compute.threads import Threads


def multiply(others_TD, weights_ND, shift_N, step, off=0):
    """What oneDNN's product gives, in float64; `off` is what it may be wrong by, in steps."""
    values_TN = (others_TD.double() @ weights_ND.double().T + shift_N.double()) / step + 1 + off
    return values_TN.round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(params=["low", "high", pytest.param("oneDNN", marks=needs_instructions)])
def way(request, monkeypatch):
    """By oneDNN, where it has products that are rounded; and by float64, rounded as badly as it may be."""
    monkeypatch.setattr("pipeline.compute.search.has_fast_int8", lambda device: True)
    monkeypatch.setattr(rounded, "works", lambda: True)
    if request.param == "oneDNN":
        return
    off = {"low": -(2.0**-11), "high": 2.0**-11}[request.param]
    monkeypatch.setattr(rounded, "pack", lambda images: rounded.Packed(images, images.sum(1, dtype=torch.float64)))
    monkeypatch.setattr(rounded, "_multiply", partial(multiply, off=off))


@pytest.mark.parametrize("num_values", [1, 12, 784, 3000])
@pytest.mark.parametrize("num_others", [1, 15, 64, 160])
@pytest.mark.parametrize("high", [256, 2, 1])  # of one grey value, all lengths are one
@pytest.mark.usefixtures("way")
def test_no_pair_is_missed(monkeypatch, num_values, num_others, high):
    monkeypatch.setattr(rounded, "_MAX_PASSED", 1)
    images, others = pixels(30, num_values, high=high), pixels(num_others, num_values, seed=1, high=high)
    images[0], images[1], others[-1] = 0, 255, 255
    others = others[(less_128(others) ** 2).sum(1).argsort(kind="stable")]
    squares = (less_128(others) ** 2).sum(1)
    values = squares - 2 * less_128(images) @ less_128(others).T
    # As near as some pair, so that a pair at the very limit counts; and nearer than all.
    limits = np.sort(values, 1)[:, :: max(1, num_others // 5)]
    for limit in [*limits.T, values.min(1) - 1]:
        found = rounded.find_pairs(
            rounded.pack(torch.from_numpy(less_128(images).astype(np.int8))),
            torch.from_numpy(limit.copy()),
            torch.from_numpy(others),
            rounded.choose_scale(torch.from_numpy(squares), num_values),
        )
        assert found
        pairs = list(zip(*(each.tolist() for each in found), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) >= set(zip(*np.nonzero(values <= limit[:, None]), strict=True))


@pytest.mark.usefixtures("way")
def test_most_pairs_are_left_out():
    others = pixels(4096, 784, seed=1)
    others = others[(less_128(others) ** 2).sum(1).argsort()]
    images = others[::40] // 2 + pixels(len(others[::40]), 784) // 2
    squares = torch.from_numpy((less_128(others) ** 2).sum(1))
    values = squares - 2 * torch.from_numpy(less_128(images) @ less_128(others).T)
    limit = values.kthvalue(5, 1).values
    found = rounded.find_pairs(
        rounded.pack(torch.from_numpy(less_128(images).astype(np.int8))),
        limit,
        torch.from_numpy(others),
        rounded.choose_scale(squares, 784),
    )
    assert found
    assert 5 * len(images) <= len(found[0]) < 8 * len(images)


@pytest.mark.usefixtures("way")
def test_of_images_that_are_alike_all_are_to_be_compared():
    images, others = (torch.zeros(number, 784, dtype=torch.uint8) for number in (20, 64))
    scale = rounded.choose_scale(torch.full((64,), 784 * 2**14), 784)
    limit = torch.full((20,), -784 * 2**14)
    packed = rounded.pack((images.int() - 128).to(torch.int8))
    assert rounded.find_pairs(packed, limit, others, scale) is None
    found = rounded.find_pairs(packed, limit - 2**13, others, scale)
    assert found
    assert len(found[0]) == 0


@pytest.mark.usefixtures("way")
def test_where_many_of_a_group_can_be_near_all_are_to_be_compared(monkeypatch):
    images, others = torch.full((20, 784), 255, dtype=torch.uint8), torch.zeros(64, 784, dtype=torch.uint8)
    images[0], others[:48] = 0, 60  # the first image is near one group, and no other is
    squares = (others.int() - 128).square().sum(1)
    scale, limit = rounded.choose_scale(squares, 784), torch.full((20,), -784 * 2**14)
    packed = rounded.pack((images.int() - 128).to(torch.int8))
    assert rounded.find_pairs(packed, limit, others, scale) is None
    monkeypatch.setattr(rounded, "_MAX_PASSED", 1 / 64)
    found = rounded.find_pairs(packed, limit, others, scale)
    assert found
    assert [each.tolist() for each in found] == [[0] * 16, list(range(48, 64))]


def test_what_let_too_many_pass_is_not_tried_again_until_nearer_ones_are_known(monkeypatch):
    monkeypatch.setattr("pipeline.compute.search.has_fast_int8", lambda device: True)
    monkeypatch.setattr(rounded, "works", lambda: True)
    monkeypatch.setattr(rounded, "pack", lambda images: rounded.Packed(images, images.sum(1, dtype=torch.float64)))
    monkeypatch.setattr(strips, "STRIP", 64)
    limits = []
    monkeypatch.setattr(rounded, "find_pairs", lambda _, limit, *__: limits.append(limit.tolist()))
    images, others = pixels(30, 12), train(64 * 20, 12)
    found = search(torch.from_numpy(images), in_blocks(*others, 2000), 3)
    assert as_lists(found) == nearest_in_a_loop(images, *others, 3)
    assert 3 <= len(limits) <= 5
    assert len({tuple(limit) for limit in limits}) == len(limits)


@pytest.mark.parametrize("high", [256, 2])
@pytest.mark.parametrize("num_values", [30, 60])  # 60 become 64
@pytest.mark.parametrize("size", [300, 700])
@pytest.mark.parametrize("max_passed", [1, 1 / 64])
@pytest.mark.parametrize("max_waiting", [20, 10_000])
@pytest.mark.parametrize("is_searched_in_all", [True, False])
@pytest.mark.usefixtures("way")
def test_a_search_finds_what_a_plain_loop_finds(
    monkeypatch, high, num_values, size, max_passed, max_waiting, is_searched_in_all
):
    monkeypatch.setattr("pipeline.compute.search._TILE_IMAGES", 16)
    monkeypatch.setattr("pipeline.compute.search._MAX_WAITING", max_waiting)
    monkeypatch.setattr(rounded, "_MAX_PASSED", max_passed)
    monkeypatch.setattr(strips, "STRIP", 64)
    calls = []
    find_pairs = rounded.find_pairs
    monkeypatch.setattr(rounded, "find_pairs", lambda *arguments: calls.append(find_pairs(*arguments)) or calls[-1])
    others = train(700, num_values, high)
    images = others[0][:50] if is_searched_in_all else pixels(50, num_values, high=high)
    own_rows = others[1][:50] if is_searched_in_all else None
    find = partial(search, torch.from_numpy(images), in_blocks(*others, size), 5, Threads(2))
    found = find(own_rows_N=None if own_rows is None else torch.from_numpy(own_rows))
    assert as_lists(found) == nearest_in_a_loop(images, *others, 5, own_rows)
    assert any(each is not None for each in calls) or max_passed < 1


@pytest.mark.parametrize("number", [1, 3, 12])
@pytest.mark.usefixtures("way")
def test_fewer_others_than_neighbors_are_all_found(number):
    images, others = pixels(9, 20), train(number, 20)
    found = search(torch.from_numpy(images), in_blocks(*others, 4), 10)
    assert as_lists(found) == nearest_in_a_loop(images, *others, 10)
    assert (found.distances_NJ != FAR).sum() == 9 * min(number, 10)


@pytest.mark.parametrize(
    ("num_values", "expected"), [(1, 1), (30, 30), (60, 64), (64, 64), (784, 832), (3072, 3072), (65_535, 65_536)]
)
def test_images_are_padded_by_little(num_values, expected):
    assert rounded.padded(num_values) == expected <= rounded.MAX_VALUES


@needs_instructions
@pytest.mark.parametrize("num_values", [1, 63, 64, 784, rounded.MAX_VALUES])
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (96, 512)])
def test_products_are_rounded_as_they_may_be(num_values, shape):
    num_others, num_images = shape
    images, others = pixels(num_images, num_values), pixels(num_others, num_values, seed=1)
    images[0], others[0] = 255, 255
    images[-1], others[-1] = 0, 255
    whole = torch.from_numpy(less_128(images).astype(np.int8))
    exact = torch.from_numpy(others.astype(np.float64) @ less_128(images).T)
    shift = torch.linspace(-1.5, 1.5, num_images) * num_values * 2**14
    step = max(4 * num_values * rounded._ROUNDING, float(exact.max() - exact.min()) / 200)
    found = rounded._multiply(torch.from_numpy(others), rounded.pack(whole).weights, shift, step)
    expected = ((exact + shift.double()) / step + 1).clamp(0, 255)
    error = num_values * rounded._ROUNDING / step + rounded._LEVEL_ROUNDING
    assert ((found - expected).abs() <= 0.5 + error).all()


@pytest.mark.parametrize("name", ["pack", "_multiply"])
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_torch_without_them_is_found_out(monkeypatch, name, error):
    def have_none(*_):
        raise error("no such operation")

    monkeypatch.setattr(rounded, "pack", lambda images: rounded.Packed(images, images.sum(1, dtype=torch.float64)))
    monkeypatch.setattr(rounded, name, have_none)
    assert not rounded.works.__wrapped__()


def test_products_that_are_cut_off_are_found_out(monkeypatch):
    def multiply_in_16_bits(others, weights, shift, step):
        pairs = others.double().view(len(others), -1, 2)[:, None] * weights.double().view(len(weights), -1, 2)[None]
        sums = pairs.sum(3).clamp(-(2**15), 2**15 - 1).sum(2)
        return ((sums + shift.double()) / step + 1).round().clamp(0, 255).to(torch.uint8)

    monkeypatch.setattr(rounded, "pack", lambda images: rounded.Packed(images, images.sum(1, dtype=torch.float64)))
    monkeypatch.setattr(rounded, "_multiply", multiply_in_16_bits)
    monkeypatch.setattr(rounded, "measure", lambda way, *arguments: float(way is rounded.products))
    assert not rounded.works.__wrapped__()
    monkeypatch.setattr(rounded, "_multiply", multiply)
    assert rounded.works.__wrapped__()
