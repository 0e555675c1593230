"""Confidence intervals of means by Student's t, for a handful of seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return the two-sided interval of the mean, mean -/+ t * s / sqrt(n) with n - 1 degrees of freedom.

    None for fewer than two values: one run says nothing about its spread.
    """
    if len(values) < 2:
        return None
    half = t_quantile(level, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(level: float, degrees: int) -> float:
    """Return the t with P(|X| <= t) = level for Student's distribution, to 1e-12 relative.

    Raises:
        ValueError: unless 0 < level < 1 and degrees >= 1.
    """
    if not 0 < level < 1 or degrees < 1:
        raise ValueError(f"t_quantile: level={level}, degrees={degrees}; required: 0 < level < 1 and degrees >= 1")
    low, high = 0.0, 1.0
    while _central_mass(high, degrees) < level:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _central_mass(t: float, degrees: int) -> float:
    """Return P(|X| <= t): Abramowitz and Stegun, 26.7.3 (odd degrees) and 26.7.4 (even degrees)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    if degrees == 1:
        return 2 * angle / math.pi
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, degrees - 1, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
