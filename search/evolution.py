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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archspec.search.points import Coordinates, Uniform, Values, key_of, value_of
from archspec.search.space import Range

CROSSED = 0.5  # share of the children that have two parents


class Parents:
    """The finished trials of a study, ranked."""

    def __init__(self, population: int) -> None:
        self._population = population
        self._numbers: list[int] = []
        self._points: list[Coordinates] = []
        self._excess: list[float] = []
        self._losses: NDArray[np.float64] = np.empty((0, 0))
        self._dominators: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._best: list[int] | None = None

    def add(self, number: int, point: Mapping[str, Any], losses: Sequence[float], excess: float = 0.0) -> None:
        """Add a finished trial: its losses (less is better) and by how much it breaks soft constraints in all."""
        if number in self._numbers:
            return
        row, count = np.asarray(losses, dtype=np.float64), len(self._numbers)
        if count == len(self._dominators):  # grow by doubling
            size = max(64, 2 * count)
            self._losses = np.concatenate([self._losses.reshape(count, len(row)), np.empty((size - count, len(row)))])
            self._dominators = np.concatenate([self._dominators, np.zeros(size - count, dtype=np.int64)])
        before = self._losses[:count]
        self._dominators[:count] += (row <= before).all(1) & (row < before).any(1)
        self._dominators[count] = ((before <= row).all(1) & (before < row).any(1)).sum()
        self._losses[count] = row
        self._numbers.append(number)
        self._points.append(dict(point))
        self._excess.append(excess)
        self._best = None

    def __len__(self) -> int:
        return len(self._numbers)

    def best(self) -> list[Coordinates]:
        """Return the points of the population, from the best."""
        if self._best is None:
            order = sorted(range(len(self)), key=lambda i: (self._excess[i], self._dominators[i], self._numbers[i]))
            self._best = order[: self._population]
        return [self._points[index] for index in self._best]

    def child(self, generator: random.Random, parameters: Mapping[str, Values]) -> Coordinates:
        """Return a child's coordinates; those that it needs and no parent has are left out."""
        best = self.best()

        def parent() -> Coordinates:
            return best[min(generator.randrange(len(best)), generator.randrange(len(best)))]

        first = parent()
        if generator.random() < CROSSED:
            second = parent()
            made = crossed(first, second, generator)
            if key_of(made) not in (key_of(first), key_of(second)):
                return made
        return mutated(first, generator, parameters)


def crossed(first: Mapping[str, Any], second: Mapping[str, Any], generator: random.Random) -> Coordinates:
    """Return a point that takes each outermost node, with all below it, from either parent."""
    nodes = dict.fromkeys(name.partition("/")[0] for name in (*first, *second))
    source = {node: first if generator.random() < 0.5 else second for node in nodes}
    merged = {**second, **first}
    return {name: source[name.partition("/")[0]][name] for name in merged if name in source[name.partition("/")[0]]}


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
