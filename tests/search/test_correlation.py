"""Rank correlations against closed forms, and intervals that cover the truth as often as they say."""

from __future__ import annotations

import math
import random

import pytest

from archspec.search import correlation


def test_ranks_share_the_mean_of_ties() -> None:
    assert correlation.average_ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_rho_by_the_sum_of_squared_rank_differences() -> None:
    first, second = [1.0, 2, 3, 4, 5, 6], [2.0, 1, 4, 3, 6, 5]
    n, squares = 6, 6
    # Six products of half-integers: exact up to the square root's rounding.
    assert correlation.spearman(first, second) == pytest.approx(1 - 6 * squares / (n * (n * n - 1)), rel=1e-12)
    assert correlation.spearman(first, [-x for x in second]) == pytest.approx(-0.8285714285714286, rel=1e-12)


def test_no_rho_of_two_pairs_or_of_a_constant() -> None:
    assert correlation.spearman([1, 2], [1, 2]) is None
    assert correlation.spearman([1, 2, 3], [5, 5, 5]) is None
    with pytest.raises(ValueError, match="must pair up"):
        correlation.spearman([1, 2, 3], [1, 2])


def test_the_interval_is_fishers_with_bonett_and_wrights_variance() -> None:
    rho, n = 0.5, 28
    half = 1.959963984540054 * math.sqrt((1 + 0.125) / 25)
    bounds = correlation.interval(rho, n)
    assert bounds == pytest.approx((math.tanh(math.atanh(0.5) - half), math.tanh(math.atanh(0.5) + half)), rel=1e-12)
    assert correlation.interval(rho, 4) is None


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = random.Random(0)
    r = 0.6
    truth = 6 / math.pi * math.asin(r / 2)  # Spearman's rho of a normal pair with correlation r
    hits, tries = 0, 600
    for _ in range(tries):
        first = [generator.gauss(0, 1) for _ in range(20)]
        second = [r * x + math.sqrt(1 - r * r) * generator.gauss(0, 1) for x in first]
        bounds = correlation.interval(correlation.spearman(first, second), 20)
        assert bounds is not None
        hits += bounds[0] <= truth <= bounds[1]
    # A binomial proportion of 600 with p = 0.95 has standard deviation 0.009: four of them, and the approximation's
    # own error at n = 20, which is below 0.01.
    assert abs(hits / tries - 0.95) < 0.046


def test_a_verdict_needs_sixteen_architectures_and_an_interval_beside_zero() -> None:
    assert correlation.verdict((0.2, 0.8), 16) == "predicts"
    assert correlation.verdict((-0.8, -0.2), 16) == "misleads"
    assert correlation.verdict((0.2, 0.8), 15) == "not enough evidence"
    assert correlation.verdict((-0.1, 0.8), 40) == "not enough evidence"
    assert correlation.verdict(None, 40) == "not enough evidence"


def test_holding_size_fixed_removes_what_size_explains() -> None:
    generator = random.Random(1)
    size = [generator.gauss(0, 1) for _ in range(400)]
    proxy = [x + generator.gauss(0, 0.5) for x in size]
    score = [x + generator.gauss(0, 0.5) for x in size]
    plain, held = correlation.spearman(proxy, score), correlation.partial(proxy, score, size)
    assert plain is not None
    assert plain > 0.7
    assert held is not None
    assert abs(held) < 0.2  # four standard deviations of 1 / sqrt(400)
    assert correlation.partial(proxy, score, [1.0] * 400) == plain
