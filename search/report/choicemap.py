"""Heat maps of two choices at a time: how trials with each pair of them did, and whether the cells differ at all.

A trial whose mixers make several pairs counts in each of their cells. Whether cells differ is asked of whole trials,
grouped by the pairs they hold, as ``influence`` asks it of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from archspec.search.influence import known_for, share_and_p, verdict
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.report.coordinates import mixers_of

PAIRS = (("bias", "retention"), ("memory", "update"))
ENOUGH_IN_A_CELL = 3


@dataclass(frozen=True)
class Cell:
    """The trials with one pair of choices: how many, their mean and their best, in the figure's own sign."""

    row: str
    column: str
    n: int
    mean: float
    best: float


@dataclass(frozen=True)
class ChoiceMap:
    """Two choices against each other.

    Fields:
        rows, columns: their values, the most frequent first.
        n: trials in all; ``p`` and ``verdict``: whether cells differ more than shuffled ones.
    """

    axes: tuple[str, str]
    rows: list[str]
    columns: list[str]
    cells: list[Cell]
    n: int
    p: float | None
    verdict: str

    def cell(self, row: str, column: str) -> Cell | None:
        """Return the cell of a pair; None where no trial has it."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


def choice_maps(run: Run, goal: Objective) -> list[ChoiceMap]:
    """Return the map of every pair of axes, over the sampled trials with the figure."""
    known = known_for(run, goal)
    mixers = [mixers_of(trial) for trial, _ in known]
    losses = [loss for _, loss in known]
    found = []
    for axes in PAIRS:
        held = [sorted({(getattr(item, axes[0]), getattr(item, axes[1])) for item in items}) for items in mixers]
        found.append(_map(axes, held, losses, goal))
    return found


def _map(
    axes: tuple[str, str], held: Sequence[Sequence[tuple[str, str]]], losses: Sequence[float], goal: Objective
) -> ChoiceMap:
    by_pair: dict[tuple[str, str], list[float]] = {}
    for pairs, loss in zip(held, losses, strict=True):
        for pair in pairs:
            by_pair.setdefault(pair, []).append(loss)
    _, p = share_and_p([tuple(pairs) for pairs in held], losses)
    cells = [
        Cell(*pair, len(found), goal.loss(fmean(found)), goal.loss(min(found)))
        for pair, found in sorted(by_pair.items())
    ]
    rows, columns = (_frequent(by_pair, axis) for axis in (0, 1))
    differs = "cells differ" if verdict(p, len(losses), len(PAIRS)) == "matters" else "not enough evidence"
    return ChoiceMap(axes, rows, columns, cells, len(losses), p, differs)


def _frequent(by_pair: dict[tuple[str, str], list[float]], axis: int) -> list[str]:
    counts: dict[str, int] = {}
    for pair, found in by_pair.items():
        counts[pair[axis]] = counts.get(pair[axis], 0) + len(found)
    return sorted(counts, key=lambda name: (-counts[name], name))
