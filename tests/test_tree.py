import itertools

import pytest

from pipeline.plan import LaneAssignment
from pipeline.tree import lane_ranges


def subtrees(lanes):
    """List every node of the tree over these lanes, as a tuple of lanes."""
    if len(lanes) < 2:
        return {lanes}
    middle = (len(lanes) + 1) // 2
    return {lanes} | subtrees(lanes[:middle]) | subtrees(lanes[middle:])


@pytest.mark.parametrize(
    ("num_lanes", "num_actors", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (8, 3, [2, 2, 4]),
        (8, 5, [1, 1, 2, 2, 2]),
        (8, 6, [1, 1, 2, 1, 1, 2]),
        (8, 7, [1, 1, 1, 1, 1, 1, 2]),
        (8, 8, [1] * 8),
        (3, 2, [2, 1]),
        (2, 3, [1, 1, 0]),
    ],
)
def test_actors_have_so_many_lanes(num_lanes, num_actors, sizes):
    assert [len(lanes) for lanes in lane_ranges(num_lanes, num_actors)] == sizes


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5, 8, 13, 64])
def test_every_actor_has_a_whole_subtree_and_every_lane_an_actor(num_lanes):
    nodes = subtrees(tuple(range(num_lanes)))
    for num_actors in range(1, num_lanes + 1):
        ranges = lane_ranges(num_lanes, num_actors)
        assert list(itertools.chain(*ranges)) == list(range(num_lanes))
        assert {tuple(lanes) for lanes in ranges} <= nodes


@pytest.mark.parametrize("num_actors", range(1, 9))
def test_owners_are_those_of_the_ranges(num_actors):
    owners_L = LaneAssignment(1000, 8).owners(num_actors)
    for rank, lanes in enumerate(lane_ranges(8, num_actors)):
        assert all(owners_L[lane] == rank for lane in lanes)
