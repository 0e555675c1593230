"""Fronts, hypervolumes against closed forms, knees."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from archspec.search import pareto

# Sums of a few products of numbers near 1: a handful of roundings of 2^-53 each.
CLOSE = 1e-12


def test_front_keeps_what_nothing_beats_and_equal_rows_together() -> None:
    losses = [(1, 3), (2, 2), (3, 1), (2, 3), (3, 3), (2, 2)]
    assert pareto.front(losses) == [0, 1, 2, 5]
    assert pareto.ranks(losses) == [0, 0, 0, 1, 2, 0]


def test_front_agrees_with_the_definition_on_random_points() -> None:
    generator = random.Random(3)
    for dims in (1, 2, 3, 4):
        points = [tuple(generator.randint(0, 6) for _ in range(dims)) for _ in range(60)]
        expected = [i for i, p in enumerate(points) if not any(pareto.dominates(q, p) for q in points)]
        assert pareto.front(points) == expected


@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5])
def test_the_hypervolume_of_one_point_is_its_box(dims: int) -> None:
    point = [0.25 * (axis + 1) / dims for axis in range(dims)]
    expected = math.prod(1 - loss for loss in point)
    assert pareto.hypervolume([point], [1.0] * dims) == pytest.approx(expected, rel=CLOSE)


def test_the_hypervolume_of_a_staircase_is_a_triangular_number() -> None:
    steps = 20
    points = [(i / steps, 1 - (i + 1) / steps) for i in range(steps)]
    expected = sum(range(1, steps + 1)) / steps**2
    assert pareto.hypervolume(points, (1.0, 1.0)) == pytest.approx(expected, rel=CLOSE)


def test_three_boxes_by_inclusion_and_exclusion() -> None:
    points = [(0.1, 0.5, 0.6), (0.4, 0.2, 0.7), (0.7, 0.6, 0.1)]

    def box(*members: tuple[float, ...]) -> float:
        return float(math.prod(1 - max(axis) for axis in zip(*members, strict=True)))

    expected = sum(
        (-1) ** (size + 1) * sum(box(*chosen) for chosen in itertools.combinations(points, size)) for size in (1, 2, 3)
    )
    assert pareto.hypervolume(points, (1, 1, 1)) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_the_hypervolume_counts_the_cells_of_a_grid(dims: int) -> None:
    """On integer points the volume is the number of unit cells that some point dominates."""
    generator = random.Random(dims)
    for _ in range(5):
        points = [tuple(generator.randint(0, 7) for _ in range(dims)) for _ in range(8)]
        cells = sum(
            any(all(x <= c for x, c in zip(point, cell, strict=True)) for point in points)
            for cell in itertools.product(range(6), repeat=dims)
        )
        assert pareto.hypervolume(points, [6] * dims) == pytest.approx(cells, rel=CLOSE)


def test_points_outside_the_reference_and_repeated_ones_add_nothing() -> None:
    inside = [(0.5, 0.5)]
    assert pareto.hypervolume([*inside, (0.5, 0.5), (0.1, 1.0), (2.0, 0.0)], (1.0, 1.0)) == 0.25
    assert pareto.hypervolume([(1.0, 0.0)], (1.0, 1.0)) == 0.0
    assert pareto.hypervolume([], (1.0, 1.0)) == 0.0


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row has 2 losses and the reference 3"):
        pareto.hypervolume([(1, 2)], (3, 3, 3))


def test_the_knee_is_where_the_front_bends_whatever_the_units() -> None:
    losses = [(0.0, 10.0), (1.0, 2.0), (5.0, 1.0), (10.0, 0.0)]
    assert pareto.knee(losses) == 1
    assert pareto.knee([(1e6 * x, y / 1e3) for x, y in losses]) == 1
    assert pareto.knee(losses[:2]) is None


def test_ten_thousand_rows_take_a_sweep_and_agree_with_comparing_all() -> None:
    generator = random.Random(11)
    for dims in (2, 3):
        rows = [tuple(round(generator.gauss(0, 1), 2) for _ in range(dims)) for _ in range(10_000)]
        order = sorted(range(len(rows)), key=lambda index: rows[index])
        assert pareto.front(rows) == sorted(pareto._compared(rows, order))


def test_four_dimensions_by_slices_agree_with_the_sum_of_exclusive_parts() -> None:
    generator = random.Random(5)
    points = sorted({tuple(generator.random() for _ in range(4)) for _ in range(30)})
    members = [points[index] for index in pareto.front(points)]
    reference = (1.0, 1.0, 1.0, 1.0)
    assert pareto.hypervolume(points, reference) == pytest.approx(pareto._wfg(members, reference), rel=CLOSE)
