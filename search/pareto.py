"""Pareto fronts: non-dominated sorting, exact hypervolume, knee. Everything is minimised: a row is a loss vector.

A point dominates another if it is at least as good everywhere and better somewhere. The hypervolume is the measure
of what a set dominates below a reference point (Zitzler and Thiele, 1998). In two and three dimensions it is a
sweep, in four a sweep of sweeps; beyond, it is computed by WFG: the sum over points of what each adds to those after
it (While, Bradstreet and Barone, "A fast way of calculating exact hypervolumes", IEEE TEVC 16(1), 2012).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Losses = Sequence[float]


def dominates(first: Losses, second: Losses) -> bool:
    """Say whether ``first`` is nowhere worse than ``second`` and somewhere better."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and tuple(first) != tuple(second)


def front(losses: Sequence[Losses]) -> list[int]:
    """Return the indices of the rows that no row dominates, in order; equal rows stand or fall together.

    Whatever dominates a row stands before it in lexicographic order, and is kept or dominated by one that is. So one
    pass decides: in two and three dimensions against the staircase of what came before (O(n log n)), beyond against
    every row kept.
    """
    order = sorted(range(len(losses)), key=lambda index: tuple(losses[index]))
    if order and len(losses[order[0]]) in (1, 2, 3):
        return sorted(_swept(losses, order))
    return sorted(_compared(losses, order))


def _swept(losses: Sequence[Losses], order: Sequence[int]) -> list[int]:
    kept: list[int] = []
    staircase: list[tuple[float, float]] = []  # undominated in all losses but the first, by the second
    for index in order:
        row = tuple(losses[index])
        twin = bool(kept) and tuple(losses[kept[-1]]) == row
        _, second, third = (*row, 0.0, 0.0)[:3]
        if twin or not _is_covered(staircase, (second, third)):
            kept.append(index)
            _insert(staircase, (second, third))
    return kept


def _compared(losses: Sequence[Losses], order: Sequence[int]) -> list[int]:
    import numpy as np  # whole columns at a time: with four losses and more, fronts hold a large share of the rows

    kept: list[int] = []
    rows = np.empty((len(order), len(losses[order[0]]) if order else 0))
    for index in order:
        row, above = np.asarray(losses[index], dtype=float), rows[: len(kept)]
        if not ((above <= row).all(1) & (above < row).any(1)).any():
            rows[len(kept)] = row
            kept.append(index)
    return kept


def _is_covered(staircase: Sequence[tuple[float, float]], point: tuple[float, float]) -> bool:
    """Say whether a step is nowhere above the point."""
    place = bisect_right(staircase, point)
    return place > 0 and staircase[place - 1][1] <= point[1]


def ranks(losses: Sequence[Losses]) -> list[int]:
    """Return each row's front: 0 for the first, 1 for the front of the rest, and so on."""
    found = [0] * len(losses)
    left, rank = list(range(len(losses))), 0
    while left:
        members = {left[index] for index in front([losses[index] for index in left])}
        for index in members:
            found[index] = rank
        left = [index for index in left if index not in members]
        rank += 1
    return found


def hypervolume(losses: Sequence[Losses], reference: Losses) -> float:
    """Return the volume dominated by the rows and dominating ``reference``; rows not below it add nothing.

    Raises:
        ValueError: when a row's length is not the reference's.
    """
    for row in losses:
        if len(row) != len(reference):
            raise ValueError(f"hypervolume: a row has {len(row)} losses and the reference {len(reference)}")
    inside = [tuple(row) for row in losses if all(loss < limit for loss, limit in zip(row, reference, strict=True))]
    points = sorted({inside[index] for index in front(inside)})
    if not points or not reference:
        return 0.0
    if len(reference) == 1:
        return reference[0] - points[0][0]
    if len(reference) == 2:
        return _area(points, reference)
    if len(reference) == 3:
        return _volume(points, reference)
    if len(reference) == 4:
        return _sliced(points, reference)
    return _wfg(points, reference)


def knee(losses: Sequence[Losses]) -> int | None:
    """Return the index of the row farthest below the plane through the front's extremes (Das, 1999).

    With every objective scaled to [0, 1] over the rows, that is the row with the least sum. Ties go to the first;
    None for fewer than three rows, which have no bend.
    """
    if len(losses) < 3:
        return None
    columns = list(zip(*losses, strict=True))
    scales = [(min(column), (max(column) - min(column)) or 1.0) for column in columns]
    sums = [sum((loss - low) / width for loss, (low, width) in zip(row, scales, strict=True)) for row in losses]
    return min(range(len(losses)), key=lambda index: (sums[index], index))


def _area(points: Sequence[Losses], reference: Losses) -> float:
    """Sum the strips of a front sorted by its first loss."""
    bounds = [*(point[0] for point in points[1:]), reference[0]]
    return math.fsum(
        (right - point[0]) * (reference[1] - point[1]) for point, right in zip(points, bounds, strict=True)
    )


def _volume(points: Sequence[Losses], reference: Losses) -> float:
    """Sweep the third loss upwards over the area of the points below it."""
    order = sorted(points, key=lambda point: point[2])
    staircase: list[tuple[float, float]] = []  # undominated in the first two losses, by the first
    slabs = []
    for index, point in enumerate(order):
        _insert(staircase, (point[0], point[1]))
        above = order[index + 1][2] if index + 1 < len(order) else reference[2]
        if above > point[2]:
            slabs.append(_area(staircase, reference[:2]) * (above - point[2]))
    return math.fsum(slabs)


def _sliced(points: Sequence[Losses], reference: Losses) -> float:
    """Sweep the fourth loss upwards over the volume of the points below it."""
    order = sorted(points, key=lambda point: point[3])
    below: list[Losses] = []
    slabs = []
    for index, point in enumerate(order):
        below.append(tuple(point[:3]))
        above = order[index + 1][3] if index + 1 < len(order) else reference[3]
        if above > point[3]:
            below = [below[kept] for kept in front(below)]
            slabs.append(_volume(below, reference[:3]) * (above - point[3]))
    return math.fsum(slabs)


def _insert(staircase: list[tuple[float, float]], point: tuple[float, float]) -> None:
    place = bisect_left(staircase, point)
    if place and staircase[place - 1][1] <= point[1]:
        return
    end = place
    while end < len(staircase) and staircase[end][1] >= point[1]:
        end += 1
    staircase[place:end] = [point]


def _wfg(points: Sequence[Losses], reference: Losses) -> float:
    total = []
    for index, point in enumerate(points):
        box = math.prod(limit - loss for loss, limit in zip(point, reference, strict=True))
        worse = [tuple(map(max, point, other)) for other in points[index + 1 :]]
        total.append(box - (hypervolume(worse, reference) if worse else 0.0))
    return math.fsum(total)
