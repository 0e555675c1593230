"""Points of a space: its parameters, uniform draws, draws from given coordinates, and every point in turn.

A point is a mapping from parameter to value, as the space's nodes are called (``space``); of conditional parameters
it holds those that its other values make active.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from archspec.search.space import Range, Space, label
from archspec.yamltext import LocatedMap

Coordinates = dict[str, Any]
Values = tuple[str, ...] | Range
DIGITS = 12  # significant digits by which two numbers are the same coordinate


class Uniform:
    """Draws uniformly; logarithmic ranges on their logarithm."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def choose(self, name: str, options: Sequence[str]) -> str:
        """Return one of the options."""
        return self._generator.choice(list(options))

    def number_in(self, name: str, limits: Range) -> float | int:
        """Return a number within the limits."""
        if limits.log:
            value = float(limits.low * (limits.high / limits.low) ** self._generator.random())
            return round(value) if limits.whole else value
        if limits.num_values is not None:
            return value_of(limits, self._generator.randrange(limits.num_values))
        return self._generator.uniform(limits.low, limits.high)


@dataclass
class Genes:
    """Decides by coordinates, uniformly where they are silent or not allowed; notes what was decided and among what.

    Fields:
        given: parameter -> value.
        seed: names the uniform draws, each by its parameter, so that one does not depend on the others.
        coordinates: what was decided; ``values``: parameter -> what could have been.
    """

    given: Mapping[str, Any]
    seed: str
    coordinates: Coordinates = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)

    def choose(self, name: str, options: Sequence[str]) -> str:
        """Return the given option, or one at random."""
        self.values[name] = tuple(options)
        found = self.given.get(name)
        if found not in options:
            found = self._uniform(name).choose(name, options)
        self.coordinates[name] = found
        return str(found)

    def number_in(self, name: str, limits: Range) -> float | int:
        """Return the given number, or one at random."""
        self.values[name] = limits
        found = self.given.get(name)
        if not isinstance(found, int | float) or not limits.low <= found <= limits.high:
            found = self._uniform(name).number_in(name, limits)
        self.coordinates[name] = found
        return found

    def _uniform(self, name: str) -> Uniform:
        return Uniform(random.Random(f"{self.seed}/{name}"))


@dataclass
class _Trail:
    """Walks through all points: decides by the places given, then takes the first value everywhere."""

    places: list[int]
    names: list[str] = field(default_factory=list)
    values: list[Sequence[Any]] = field(default_factory=list)

    def choose(self, name: str, options: Sequence[str]) -> str:
        return str(self._next(name, options))

    def number_in(self, name: str, limits: Range) -> float | int:
        found: float | int = self._next(name, [value_of(limits, place) for place in range(limits.num_values or 1)])
        return found

    def _next(self, name: str, values: Sequence[Any]) -> Any:
        self.names.append(name)
        self.values.append(values)
        if len(self.places) < len(self.names):
            self.places.append(0)
        return values[self.places[len(self.names) - 1]]

    @property
    def coordinates(self) -> Coordinates:
        return {name: values[place] for name, values, place in zip(self.names, self.values, self.places, strict=True)}


def express(space: Space, given: Mapping[str, Any], seed: str) -> tuple[LocatedMap, Genes]:
    """Return the document at these coordinates, the missing ones drawn uniformly, and the point that it is."""
    genes = Genes(given, seed)
    return space.draw(genes), genes


def points(space: Space) -> Iterator[Coordinates]:
    """Yield every point of a space without continuous parameters, the last parameter varying fastest."""
    places: list[int] = []
    while True:
        trail = _Trail(places)
        space.draw(trail)
        yield trail.coordinates
        while places and places[-1] + 1 == len(trail.values[len(places) - 1]):
            places.pop()
        if not places:
            return
        places[-1] += 1


def parameters(space: Space) -> dict[str, Values]:
    """Return every parameter with its values, conditional ones included."""
    found: dict[str, Values] = {}
    queue: list[dict[str, Any]] = [{}]
    while queue:
        given = queue.pop()
        noted = _First(given)
        space.draw(noted)
        for name, values in noted.values.items():
            if name not in found:
                found[name] = values
                options = values if isinstance(values, tuple) else ()
                queue.extend({**noted.coordinates, name: option} for option in options[1:])
    return found


class _First(Genes):
    """Decides by coordinates, else takes the first option or the lower end."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(given, "")

    def choose(self, name: str, options: Sequence[str]) -> str:
        return super().choose(name, options) if name in self.given else self._take(name, tuple(options), options[0])

    def number_in(self, name: str, limits: Range) -> float | int:
        found: float | int = self._take(name, limits, value_of(limits, 0))
        return found

    def _take(self, name: str, values: Values, value: Any) -> Any:
        self.values[name], self.coordinates[name] = values, value
        return value


def value_of(limits: Range, place: int) -> float | int:
    """Return the value at a place, from 0, of a range; a continuous one has its lower end only."""
    value = limits.low + (limits.step or 1) * place
    return int(value) if limits.whole else value


def key_of(coordinates: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what two equal points have in common."""
    return tuple(
        sorted(
            (name, float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)
            for name, value in coordinates.items()
        )
    )


def known_coordinates(space: Space, among: Mapping[str, Values], point: str | Mapping[str, Any]) -> Coordinates:
    """Return the coordinates of a known point: ``base``, or values by parameter over the base.

    Raises:
        KeyError: for an unknown parameter; ValueError for a value that it does not have.
    """
    given: Coordinates = {}
    for name, value in point.items() if isinstance(point, Mapping) else ():
        values = among[name]
        given[name] = option_named(value, values) if isinstance(values, tuple) else value
        allowed = isinstance(values, tuple) or (
            isinstance(value, int if values.whole else (int, float)) and values.low <= value <= values.high
        )
        if given[name] is None or not allowed:
            raise ValueError(name)
    noted = _First(given)
    space.draw(noted)
    return noted.coordinates


def option_named(value: Any, options: Sequence[str]) -> str | None:
    """Return the option that a value stands for: an option's whole name, or its label; None when there is none."""
    text = label(value)
    return next((option for option in options if text in (option, option.partition(":")[2])), None)
