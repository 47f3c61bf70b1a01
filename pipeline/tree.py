"""The tree in which lanes are added, and how it is cut among actors.

Input: numbers of lanes and of actors. Output: which lanes an actor has. Invariant: an actor has one whole subtree, so
that what it adds by itself is what any other actor would have added, bit for bit.

A node of n lanes is the sum of its first ⌈n/2⌉ lanes and of the others: ((0+1)+(2+3))+((4+5)+(6+7)).
"""

from __future__ import annotations


def halve(number: int) -> int:
    """Return how many of a node's lanes, or actors, belong to its first half."""
    return (number + 1) // 2


def lane_ranges(num_lanes: int, num_actors: int) -> list[range]:
    """Cut the tree into subtrees of neighbouring lanes, one an actor, by rank.

    Lanes and actors are halved together, so that actors are themselves added as a tree of `num_actors` leaves. Where
    their number is no power of two, some have up to twice as many lanes as others.

    Args:
        num_lanes: Lanes, at least one.
        num_actors: Actors, at least one; those above the number of lanes have none.
    """
    ranges = _cut(0, num_lanes, min(num_lanes, num_actors))
    return ranges + [range(num_lanes, num_lanes)] * (num_actors - len(ranges))


def _cut(first: int, num_lanes: int, num_actors: int) -> list[range]:
    if num_actors == 1:
        return [range(first, first + num_lanes)]
    num_left, num_left_actors = halve(num_lanes), halve(num_actors)
    left = _cut(first, num_left, num_left_actors)
    return left + _cut(first + num_left, num_lanes - num_left, num_actors - num_left_actors)
