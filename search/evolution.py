"""Evolution on the points of a space: the best finished trials are parents, crossed and mutated.

A trial's rank is the number of finished trials that dominate it (Fonseca and Fleming, "Genetic Algorithms for
Multiobjective Optimization: Formulation, Discussion and Generalization", ICGA 1993); one that breaks a soft
constraint ranks behind all that break none, by how much it breaks. The ``population`` best are parents, each chosen
as the better of two drawn at random. Half of the children take every node of the space, with what is written below
it, from either of two parents; the others, and those that would be a copy, change one value of one parent.

Ranks depend on which trials have finished, not on their order, and a child on (seed, trial number) and the ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archspec.search.points import Coordinates, Uniform, Values, value_of
from archspec.search.space import Range

CROSSED = 0.5  # share of the children that have two parents


class Parents:
    """The finished trials of a study, ranked."""

    def __init__(self, population: int) -> None:
        self._population = population
        self._places: dict[int, int] = {}  # trial number -> row of the tables below
        self._points: list[Coordinates] = []
        self._numbers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._excess: NDArray[np.float64] = np.empty(0)
        self._losses: NDArray[np.float64] = np.empty((0, 0))
        self._dominators: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._best: list[Coordinates] | None = None

    def add(self, number: int, point: Mapping[str, Any], losses: Sequence[float], excess: float = 0.0) -> None:
        """Add a finished trial: its losses (less is better) and by how much it breaks soft constraints in all."""
        if number in self._places:
            return
        row, count = np.asarray(losses, dtype=np.float64), len(self._places)
        if count == len(self._numbers):
            self._grow(max(64, 2 * count), len(row))
        before = self._losses[:count]
        self._dominators[:count] += (row <= before).all(1) & (row < before).any(1)
        self._dominators[count] = ((before <= row).all(1) & (before < row).any(1)).sum()
        self._losses[count], self._numbers[count], self._excess[count] = row, number, excess
        self._places[number] = count
        self._points.append(dict(point))
        self._best = None

    def _grow(self, size: int, width: int) -> None:
        """Give the tables ``size`` rows, those there are first."""
        count = len(self._numbers)
        self._losses = np.concatenate([self._losses.reshape(count, width), np.empty((size - count, width))])
        self._numbers, self._excess, self._dominators = (
            np.concatenate([table, np.zeros(size - count, dtype=table.dtype)])
            for table in (self._numbers, self._excess, self._dominators)
        )

    def __len__(self) -> int:
        return len(self._places)

    def best(self) -> list[Coordinates]:
        """Return the points of the population, from the best."""
        if self._best is None:
            rows = self._eligible()
            order = np.lexsort((self._numbers[rows], self._dominators[rows], self._excess[rows]))
            self._best = [self._points[row] for row in rows[order][: self._population]]
        return self._best

    def _eligible(self) -> NDArray[np.int64]:
        """Return rows among which the population is: by excess, then by dominators. To sort all would take longer."""
        rows, wanted = np.arange(len(self)), self._population
        if len(rows) <= wanted:
            return rows
        excess = self._excess[: len(rows)]
        last = np.partition(excess, wanted - 1)[wanted - 1]
        ahead, level = rows[excess < last], rows[excess == last]
        dominators = self._dominators[level]
        last = np.partition(dominators, wanted - len(ahead) - 1)[wanted - len(ahead) - 1]
        return np.concatenate([ahead, level[dominators <= last]])

    def child(self, generator: random.Random, parameters: Mapping[str, Values]) -> Coordinates:
        """Return a child's coordinates; those that it needs and no parent has are left out."""
        best = self.best()

        def parent() -> Coordinates:
            return best[min(generator.randrange(len(best)), generator.randrange(len(best)))]

        first = parent()
        if generator.random() < CROSSED:
            second = parent()
            made = crossed(first, second, generator)
            if made not in (first, second):
                return made
        return mutated(first, generator, parameters)


def crossed(first: Mapping[str, Any], second: Mapping[str, Any], generator: random.Random) -> Coordinates:
    """Return a point that takes each outermost node, with all below it, from either parent."""
    merged = {**second, **first}
    nodes = dict.fromkeys(map(_node, (*first, *second)))
    source = {node: first if generator.random() < 0.5 else second for node in nodes}
    return {name: taken[name] for name in merged if name in (taken := source[_node(name)])}


@cache
def _node(name: str) -> str:
    """Return the outermost node that a parameter is written below."""
    return name.partition("/")[0]


def mutated(point: Mapping[str, Any], generator: random.Random, parameters: Mapping[str, Values]) -> Coordinates:
    """Return the point with one value changed, and without what is written below that value's node."""
    free = sorted(name for name in point if name in parameters and _has_others(parameters[name]))
    if not free:
        return dict(point)
    name = generator.choice(free)
    kept = {other: value for other, value in point.items() if not other.startswith(f"{name}/")}
    return {**kept, name: another(parameters[name], point[name], generator)}


def another(values: Values, value: Any, generator: random.Random) -> Any:
    """Return one of the other values; in a continuous range, any."""
    if isinstance(values, tuple):
        return generator.choice([option for option in values if option != value])
    if values.num_values is None or values.log:
        return Uniform(generator).number_in("", values)
    found = value_of(values, generator.randrange(values.num_values - 1))
    return value_of(values, values.num_values - 1) if found == value else found


def _has_others(values: Values) -> bool:
    return len(values) > 1 if isinstance(values, tuple) else isinstance(values, Range) and values.num_values != 1
