"""Fronts under uncertainty: a trial is dominated only where the intervals say so.

With every objective as a loss, a trial's value lies in [low, high]:

    final scores    the 95% t-interval over seeds: the fresh ones where it was re-scored, else those it was found by;
                    one seed says nothing about its spread: (-inf, inf)
    measured costs  the 20th to 80th percentile of the repeats
    training-free   mean -/+ spread over initialisations
    figures         exact

A surely dominates B where high_A <= low_B on every axis and high_A < low_B on one. A may dominate B where
low_A <= high_B on every axis and low_A < high_B on one. So a trial is ``dominated`` if another surely dominates it, on
the ``front`` if none may, and ``undecided`` between. Intervals are one by one, not joint: with many trials some of them
miss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.trial import Trial

Verdict = Literal["front", "undecided", "dominated"]
Interval = tuple[float, float]
UNKNOWN: Interval = (-math.inf, math.inf)


@dataclass(frozen=True)
class Standing:
    """Where a trial stands, and against whom: who surely dominates it, or else who may, by number."""

    verdict: Verdict
    rivals: tuple[int, ...]


def loss_interval(trial: Trial, goal: Objective) -> Interval:
    """Return the interval of an objective's loss, low end first."""
    low, high = _interval(trial, goal)
    return (low, high) if goal.direction == "minimize" else (-high, -low)


def standings(trials: Sequence[Trial], objectives: Sequence[Objective], of: Sequence[int]) -> dict[int, Standing]:
    """Return where the trials numbered ``of`` stand among ``trials``, each of which has every objective."""
    import numpy as np  # one member against ten thousand trials at a time

    if not of:
        return {}
    numbers = [trial.number for trial in trials]
    bounds = np.array([[loss_interval(trial, goal) for goal in objectives] for trial in trials], dtype=float)
    low, high = bounds[..., 0].T.copy(), bounds[..., 1].T.copy()  # [objective, trial]

    def beaten_by(ends: np.ndarray, mine: np.ndarray, number: int) -> tuple[int, ...]:
        everywhere, somewhere = np.ones(len(numbers), bool), np.zeros(len(numbers), bool)
        for end, own in zip(ends, mine, strict=True):
            everywhere &= end <= own
            somewhere |= end < own
        return tuple(numbers[at] for at in np.flatnonzero(everywhere & somewhere).tolist() if numbers[at] != number)

    standing = {}
    places = {number: at for at, number in enumerate(numbers)}
    for number in of:
        at = places[number]
        sure, maybe = beaten_by(high, low[:, at], number), beaten_by(low, high[:, at], number)
        standing[number] = Standing("dominated" if sure else "undecided" if maybe else "front", sure or maybe)
    return standing


def check_facts(run: Run, members: Mapping[int, Standing]) -> list[tuple[str, str]]:
    """Return whether a front is final, and how its members stand by their intervals."""
    scores = {score for task in run.tasks.values() for score in task["scores"]}
    if not members or not any(goal.metric in scores for goal in run.objectives):
        return []
    done = [number for number in members if run.trials[number].rechecked]
    failed = [number for number in members if run.trials[number].recheck_failed]
    verdicts = [standing.verdict for standing in members.values()]
    words = {"front": "surely on it", "undecided": "undecided", "dominated": "surely dominated"}
    counted = ", ".join(f"{verdicts.count(key)} {word}" for key, word in words.items() if key in verdicts)  # type: ignore[arg-type]
    if len(done) + len(failed) == len(members):
        state = f"final: every one of its {len(members)} members is re-scored on fresh seeds"
    elif done:
        state = f"provisional: {len(done)} of its {len(members)} members are re-scored on fresh seeds"
    else:
        state = "provisional: no member is re-scored on fresh seeds ('recheck: {seeds: 3}' in the search file does it)"
    lost = f"; {len(failed)} failed on them" if failed else ""
    return [("this front is", state + lost), ("by intervals", counted)]


def _interval(trial: Trial, goal: Objective) -> Interval:
    if trial.recheck_failed and goal.metric in trial.scores:
        return UNKNOWN
    score = trial.rechecked.get(goal.metric) or trial.scores.get(goal.metric)
    if score is not None:
        return (score["interval"][0], score["interval"][1]) if score.get("interval") else UNKNOWN
    if goal.name in trial.figures:
        return trial.figures[goal.name], trial.figures[goal.name]
    cost = trial.cost.get(goal.metric)
    if isinstance(cost, Mapping):
        return cost.get("p20", cost["median"]), cost.get("p80", cost["median"])
    metric = trial.training_free.get(goal.metric)
    if metric is not None and metric["mean"] is not None:
        spread = metric.get("spread") or 0.0
        return metric["mean"] - spread, metric["mean"] + spread
    return UNKNOWN
