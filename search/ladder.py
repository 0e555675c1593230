"""Promotion: who goes on to the next rung, by a rank aggregate within bins of equal size, and by lot.

Candidates are sorted by non-embedding parameters and cut into bins, each spanning at most a factor ``bin_width``.
Within a bin of n, each metric ranks its candidates from the best, ties sharing the mean rank r; the candidate's
place is (r - 1/2) / n, and its aggregate the mean of its places. A metric that is not a number ranks last.

The random share is drawn first and from all, so that it is a fair sample of what the rung saw: rank correlations are
computed on it alone. On a later rung it is drawn from those who got there by lot, and so stays a fair sample of the
whole. It depends on (seed, round, rung) only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from archspec.search.correlation import average_ranks
from archspec.search.names import Direction
from archspec.search.settings import Promote


@dataclass(frozen=True)
class Contender:
    """A candidate as promotion sees it: its number, size, values by metric, and whether lot brought it here."""

    number: int
    size: float
    values: Mapping[str, float | None]
    by_lot: bool = True


@dataclass(frozen=True)
class Promotion:
    """The numbers promoted by rank, from the best, and at random, as drawn; and every aggregate."""

    rank: list[int]
    random: list[int]
    aggregates: dict[int, float]


def promote(
    contenders: Sequence[Contender], rule: Promote, by: Mapping[str, Direction], lot: tuple[int, ...]
) -> Promotion:
    """Return who is promoted.

    Args:
        contenders: everyone who finished the rung.
        rule: how many, how many of them at random, and the width of a bin.
        by: the metrics that rank, with directions.
        lot: what the random share is drawn from: (seed, round, rung).
    """
    ordered = sorted(contenders, key=lambda contender: contender.number)
    aggregates = aggregate(ordered, by, rule.bin_width)
    generator = random.Random("/".join(map(str, (*lot, "promotion"))))
    pool = [c.number for c in ordered if c.by_lot]
    drawn = generator.sample(pool, min(rule.num_random, len(pool)))
    rest = [c.number for c in ordered if c.number not in drawn]
    best = sorted(rest, key=lambda number: (aggregates[number], number))
    return Promotion(best[: max(0, rule.count - len(drawn))], drawn, aggregates)


def aggregate(contenders: Sequence[Contender], by: Mapping[str, Direction], bin_width: float) -> dict[int, float]:
    """Return each contender's mean place within its bin, from 0 (best) to 1."""
    found: dict[int, float] = {}
    for members in bins(contenders, bin_width):
        places = [_places(members, metric, direction) for metric, direction in by.items()]
        for index, contender in enumerate(members):
            found[contender.number] = math.fsum(place[index] for place in places) / len(places)
    return found


def bins(contenders: Sequence[Contender], bin_width: float) -> list[list[Contender]]:
    """Return the contenders in bins of equal size, from the smallest."""
    found: list[list[Contender]] = []
    for contender in sorted(contenders, key=lambda contender: (contender.size, contender.number)):
        if not found or contender.size > found[-1][0].size * bin_width:
            found.append([])
        found[-1].append(contender)
    return found


def _places(members: Sequence[Contender], metric: str, direction: Direction) -> list[float]:
    losses = []
    for contender in members:
        value = contender.values.get(metric)
        known = value is not None and math.isfinite(value)
        losses.append((value if direction == "minimize" else -value) if known and value is not None else math.inf)
    return [(rank - 0.5) / len(members) for rank in average_ranks(losses)]
