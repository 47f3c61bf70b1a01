"""Pairs left out by projections: never one that counts, against a plain product."""

import numpy as np
import pytest
import torch
from test_search import as_lists, in_blocks, nearest_in_a_loop

from pipeline.compute import pruning
from pipeline.compute.search import _Tile, search
from pipeline.compute.threads import Threads


def smooth(number, side=24, seed=0):
    """Images of a few waves, which few axes describe well, with a little noise."""
    random = np.random.default_rng(seed)
    places = np.arange(side) / side * np.pi
    waves = np.stack([np.outer(np.cos(a * places), np.cos(b * places)).ravel() for a in range(5) for b in range(5)])
    values = 128 + random.normal(0, 12, (number, 25)) @ waves + random.normal(0, 3, (number, side * side))
    return values.clip(0, 255).astype(np.uint8)


def noise(number, side=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, side * side), np.uint8)


def equal(number, side=24, seed=0):
    return np.full((number, side * side), 200, np.uint8)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Without instructions for int8, and for as few images as a plain loop can search."""
    monkeypatch.setattr("pipeline.compute.search.has_fast_int8", lambda device: False)
    monkeypatch.setattr("pipeline.compute.search._MIN_PRUNED", 1)
    monkeypatch.setattr("pipeline.compute.search._PRUNED_TILE_IMAGES", 16)


@pytest.fixture
def tried(monkeypatch):
    """Whether each trial left few enough pairs."""
    results = []
    find_pairs = _Tile._find_pairs
    monkeypatch.setattr(_Tile, "_find_pairs", lambda *given: (results.append(found := find_pairs(*given)), found)[1])
    return results


def searched(images, others, number, size=2000, **options):
    rows, labels = np.random.default_rng(1).permutation(len(others)), np.arange(len(others)) % 4
    found = search(torch.from_numpy(images), in_blocks(others, rows, labels, size), number, Threads(2), **options)
    own, only = (
        None if given is None else given.numpy() for given in (options.get("own_rows_N"), options.get("only_labels_N"))
    )
    return as_lists(found), nearest_in_a_loop(images, others, rows, labels, number, own, only)


@pytest.mark.parametrize(("draw", "is_pruned"), [(smooth, True), (noise, False), (equal, False)])
@pytest.mark.parametrize("num_neighbors", [1, 5])
def test_neighbors_are_those_of_a_plain_loop_whatever_is_left_out(tried, draw, is_pruned, num_neighbors):
    found, expected = searched(draw(12, seed=5), draw(2303), num_neighbors)
    assert found == expected
    if num_neighbors < 10:
        assert (None not in tried) == is_pruned


def test_where_too_many_are_left_a_later_block_is_tried(monkeypatch):
    numbers = []
    take_near = _Tile._take_near
    monkeypatch.setattr(_Tile, "_take_near", lambda *given: (numbers.append(given[2]), take_near(*given))[1])
    found, expected = searched(noise(12, seed=5), noise(9000), 1, size=450)
    assert found == expected
    assert numbers == [0, 4]


@pytest.mark.parametrize(
    "options", [{"own_rows_N": torch.arange(12)}, {"only_labels_N": torch.arange(12) % 5}], ids=["own", "classes"]
)
def test_what_is_no_neighbor_is_left_out_too(tried, options):
    found, expected = searched(smooth(12, seed=5), smooth(2003), 3, **options)
    assert found == expected
    assert tried


def test_an_image_is_found_among_its_copies():
    images = smooth(1500)
    images[1000:1040] = images[:40]
    found, expected = searched(images[:40], images, 2)
    assert found == expected
    assert all(distance == 0 for row in found for distance, _, _ in row)


@pytest.mark.parametrize("draw", [smooth, noise])
def test_projections_never_say_farther_than_it_is(draw):
    images, others = draw(20, seed=3), draw(900)
    projection = pruning.Projection(torch.from_numpy(others))
    own, theirs = (projection.apply(torch.from_numpy(each)) for each in (images, others))
    true_NT = ((images[:, None].astype(np.int64) - others[None]) ** 2).sum(2)
    values_NT = own.as_searched().first_NP @ theirs.first_NP.T
    longest = float(theirs.squares_N.max())
    for column in range(0, 900, 90):
        limit_N = projection.limits(own, longest, torch.from_numpy(true_NT[:, column]).double())
        assert (values_NT[:, column] <= limit_N).all()
