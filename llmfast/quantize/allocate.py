"""Which bits and block size each layer gets: the least damage under a size, or the smallest size under a damage.

Each layer has options with a size and an estimated damage, and damages add up. From the smallest options on, the
step that saves most damage per byte is taken next, along each layer's lower convex hull. That is the optimum of
the relaxed problem (Everett 1963, generalized Lagrange multipliers), and at most one step of one layer off.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """A way to store one layer.

    Attributes:
        choice: what it stands for.
        num_bytes: its size.
        damage: what it is estimated to cost.
    """

    choice: Any
    num_bytes: int
    damage: float


def allocate(
    layers: Sequence[Sequence[Option]], max_bytes: float = math.inf, max_damage: float = 0.0
) -> list[Option] | None:
    """Choose an option for each layer.

    Args:
        layers: the options of each layer.
        max_bytes: the size that must not be exceeded.
        max_damage: the damage that is low enough; steps stop there.

    Returns:
        An option per layer; None when the smallest ones do not fit.
    """
    hulls = [lower_hull(options) for options in layers]
    taken = [0] * len(hulls)
    size = sum(hull[0].num_bytes for hull in hulls)
    damage = sum(hull[0].damage for hull in hulls)
    if size > max_bytes:
        return None
    steps = [(_gain(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps and damage > max_damage:
        _, index = heapq.heappop(steps)
        now, following = hulls[index][taken[index]], hulls[index][taken[index] + 1]
        if size + following.num_bytes - now.num_bytes > max_bytes:
            continue  # a smaller step of another layer may still fit
        size += following.num_bytes - now.num_bytes
        damage += following.damage - now.damage
        taken[index] += 1
        if taken[index] + 1 < len(hulls[index]):
            heapq.heappush(steps, (_gain(hulls[index], taken[index]), index))
    return [hull[place] for hull, place in zip(hulls, taken, strict=True)]


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Return the options worth taking, by rising size: each step saves less damage per byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda one: (one.num_bytes, one.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, other: Option) -> float:
    return (other.damage - one.damage) / (other.num_bytes - one.num_bytes)


def _gain(hull: list[Option], place: int) -> float:
    return _slope(hull[place], hull[place + 1])
