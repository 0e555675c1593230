"""Promotion: who goes on to the next rung, by a rank aggregate within bins of equal size, and by lot.

Candidates are sorted by non-embedding parameters and cut into bins, each spanning at most a factor ``bin_width``.
Within a bin of n, each metric ranks its candidates from the best, ties sharing the mean rank r; the candidate's
place is (r - 1/2) / n, and its aggregate the mean of its places. A metric that is not a number ranks last.

The random share is drawn first and from all, so that it is a fair sample of what the rung saw: rank correlations are
computed on it alone. On a later rung it is drawn from those who got there by lot, and so stays a fair sample of the
whole. It depends on (seed, round, rung) only.

The asynchronous ladder decides each time that a candidate finishes a rung (after Li et al., "A System for Massively
Parallel Hyperparameter Tuning", arXiv:1810.05934), by the same aggregate over all who have finished the rung so far:

    lot     a candidate goes on if a number drawn from (seed, rung, trial) is below fraction x random: known before
            anything is measured, and so as fair a sample. On a later rung only those whom lot brought take part, with
            the odds raised by their share.
    rank    of n who finished, floor(fraction (1 - random) n) are promoted by rank: each time that number grows, the
            best who is not yet promoted goes on. (The paper promotes whoever is in the top share at the time, which
            promotes more than the share.)

So decisions are a function of the order in which candidates finish, which the log keeps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from archspec.search.consistency import promotion_metrics, rankable
from archspec.search.correlation import average_ranks
from archspec.search.names import Direction
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Promote, Settings
from archspec.search.trial import Trial


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
    count, lots = rule.numbers(len(ordered))
    drawn = generator.sample(pool, min(lots, len(pool)))
    rest = [c.number for c in ordered if c.number not in drawn]
    best = sorted(rest, key=lambda number: (aggregates[number], number))
    return Promotion(best[: max(0, count - len(drawn))], drawn, aggregates)


@dataclass(frozen=True)
class Decision:
    """One candidate goes on from a rung, by rank or by lot."""

    number: int
    rung: int
    how: Literal["rank", "random"]


class Halving:
    """The asynchronous ladder of one round: hears who finished which rung, in order, and says who goes on.

    Args:
        recorded: rung -> who was promoted from it by rank before a restart, in order: it need not be found out again.
    """

    def __init__(self, search: SearchFile, recorded: Mapping[int, Sequence[int]] | None = None) -> None:
        settings = search.settings
        self._seed, self._recorded = settings.seed, recorded or {}
        self._shares = expected_shares(settings)
        self._by = [ranking(settings, rung) for rung in range(len(self._shares))]
        rules = [rung.promote for rung in settings.ladder if rung.promote is not None]
        self._finished = [Pool(by, rule.bin_width) for by, rule in zip(self._by, rules, strict=True)]
        self._by_rank: list[set[int]] = [set() for _ in self._shares]
        self._by_lot: list[set[int]] = [set() for _ in self._shares]

    def finish(self, trial: Trial, rung: int) -> list[Decision]:
        """Return the promotions that are due because this candidate finished this rung."""
        if rung >= len(self._shares):
            return []
        fraction, random_share, odds = self._shares[rung]
        came_by_lot = rung == 0 or trial.number in self._by_lot[rung - 1]
        finished = self._finished[rung]
        finished.add(contender(trial, rung, self._by[rung], came_by_lot))
        found: list[Decision] = []
        if came_by_lot and _lot(self._seed, rung, trial.number) < odds:
            self._by_lot[rung].add(trial.number)
            found.append(Decision(trial.number, rung, "random"))
        promoted = self._by_rank[rung]
        due = math.floor(fraction * (1 - random_share) * len(finished) + 1e-9) - len(promoted)
        if due > 0:
            best = list(self._recorded.get(rung, ())[len(promoted) : len(promoted) + due])
            if len(best) < due:
                best += finished.best(due - len(best), promoted.union(best, self._by_lot[rung]))
            promoted.update(best)
            found += [Decision(number, rung, "rank") for number in best]
        return found


def expected_shares(settings: Settings) -> list[tuple[float, float, float]]:
    """Return, by rung: the fraction that goes on, the random share of it, and the odds of one who takes part in it."""
    found: list[tuple[float, float, float]] = []
    arriving, share_by_lot = float(settings.candidates), 1.0
    for rung in settings.ladder:
        if rung.promote is not None:
            fraction, random_share = rung.promote.shares(max(1, round(arriving)))
            odds = min(1.0, fraction * random_share / share_by_lot) if share_by_lot else 0.0
            found.append((fraction, random_share, odds))
            arriving, share_by_lot = arriving * fraction, random_share
    return found


def ranking(settings: Settings, rung: int) -> dict[str, Direction]:
    """Return the metrics that rank on a rung, with directions."""
    directions = rankable(settings, settings.ladder[rung])
    return {name: directions[name] for name in promotion_metrics(settings, rung)}


def contender(trial: Trial, rung: int, by: Mapping[str, Direction], by_lot: bool) -> Contender:
    """Return a candidate as promotion from a rung sees it."""
    measured = {**trial.training_free, **trial.low_fidelity.get(rung, {})}
    values = {name: measured[name]["mean"] if name in measured else trial.figures.get(name) for name in by}
    return Contender(trial.number, trial.figures["non_embedding_parameters"], values, by_lot)


def _lot(seed: int, rung: int, number: int) -> float:
    return random.Random(f"{seed}/{rung}/{number}/lot").random()


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
    losses = [_loss(contender, metric, direction) for contender in members]
    return [(rank - 0.5) / len(members) for rank in average_ranks(losses)]


def _loss(contender: Contender, metric: str, direction: Direction) -> float:
    value = contender.values.get(metric)
    if value is None or not math.isfinite(value):
        return math.inf
    return value if direction == "minimize" else -value


class Pool:
    """Contenders who arrive one by one, and the best of them by the same aggregate, over tables."""

    def __init__(self, by: Mapping[str, Direction], bin_width: float) -> None:
        self._by, self._bin_width, self._count = by, bin_width, 0
        self._table: NDArray[np.float64] = np.empty((64, 2 + len(by)))  # a row: size, number, a loss for each metric

    def __len__(self) -> int:
        return self._count

    def add(self, contender: Contender) -> None:
        """Add one contender."""
        if self._count == len(self._table):
            self._table = np.concatenate([self._table, np.empty_like(self._table)])
        losses = [_loss(contender, metric, direction) for metric, direction in self._by.items()]
        self._table[self._count] = [contender.size, contender.number, *losses]
        self._count += 1

    def best(self, count: int, without: Set[int]) -> list[int]:
        """Return the numbers of the best, from the best, ``without`` those."""
        table = self._table[: self._count]
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        aggregates = self._aggregates(table)
        left = ~np.isin(table[:, 1], np.fromiter(without, dtype=np.float64, count=len(without)))
        numbers, aggregates = table[left, 1], aggregates[left]
        return [int(number) for number in numbers[np.lexsort((numbers, aggregates))[:count]]]

    def _aggregates(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean place of every row within its bin; the rows are in order of size and number."""
        places = np.empty((len(table), len(self._by)))
        start = 0
        while start < len(table):
            end = int(np.searchsorted(table[:, 0], table[start, 0] * self._bin_width, side="right"))
            for column in range(len(self._by)):
                ranks = _average_ranks(table[start:end, 2 + column])
                places[start:end, column] = (ranks - 0.5) / (end - start)
            start = end
        return np.array([math.fsum(row) for row in places.tolist()]) / len(self._by)


def _average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what ``average_ranks`` does, of a table's column."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((2 * starts + 1 + lengths) / 2, lengths)
    return ranks
