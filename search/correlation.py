"""Rank correlations with intervals: how well something cheap to know ranked something dear to know.

rho is Spearman's, ties by average ranks. Its 95% interval is by Fisher's z with the variance of Bonett and Wright
(Psychometrika 65, 2000): atanh(rho) -/+ 1.96 sqrt((1 + rho^2 / 2) / (n - 3)). The partial correlation holds a third
ranking fixed, r = (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)), and loses one degree of freedom.

They are computed over the randomly promoted trials only. Among those selected by a figure, that figure's rank
correlation is far from the true one, often of the wrong sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ENOUGH = 16  # below this many architectures no verdict is given, whatever the interval
NORMAL_95 = 1.959963984540054

Interval = tuple[float, float]


def average_ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks from 1, equal values sharing the mean of theirs."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            found[index] = (start + 1 + end) / 2
        start = end
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rho; None below 3 pairs, or when either side is constant."""
    if len(first) != len(second):
        raise ValueError(f"spearman: {len(first)} and {len(second)} values; they must pair up")
    if len(first) < 3:
        return None
    return _pearson(average_ranks(first), average_ranks(second))


def partial(first: Sequence[float], second: Sequence[float], fixed: Sequence[float]) -> float | None:
    """Return the rank correlation of two with a third held fixed.

    None below 4 triples, when either is constant, or when the third determines one of them. A constant third
    changes nothing: the plain rho is returned.
    """
    if len(first) < 4:
        return None
    both = spearman(first, second)
    with_first, with_second = spearman(first, fixed), spearman(second, fixed)
    if both is None or with_first is None or with_second is None:
        return both
    left = (1 - with_first**2) * (1 - with_second**2)
    if left < 1e-12:
        return None
    return max(-1.0, min(1.0, (both - with_first * with_second) / math.sqrt(left)))


def interval(rho: float | None, n: int, num_fixed: int = 0) -> Interval | None:
    """Return the 95% interval of a rank correlation over ``n`` pairs; None below 5 + num_fixed pairs."""
    degrees = n - 3 - num_fixed
    if rho is None or degrees < 2:
        return None
    if abs(rho) == 1.0:
        rho = math.copysign(1 - 1e-9, rho)  # atanh is infinite there; the interval still touches the end
    half = NORMAL_95 * math.sqrt((1 + rho**2 / 2) / degrees)
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def verdict(bounds: Interval | None, n: int) -> str:
    """Say what an interval shows: "predicts", "misleads", or "not enough evidence"."""
    if bounds is None or n < ENOUGH or bounds[0] <= 0 <= bounds[1]:
        return "not enough evidence"
    return "predicts" if bounds[0] > 0 else "misleads"


def _pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    mean_first, mean_second = math.fsum(first) / len(first), math.fsum(second) / len(second)
    left = [value - mean_first for value in first]
    right = [value - mean_second for value in second]
    norm = math.sqrt(math.fsum(x * x for x in left) * math.fsum(y * y for y in right))
    if norm == 0:
        return None
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in zip(left, right, strict=True)) / norm))
