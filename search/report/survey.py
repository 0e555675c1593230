"""Which trials of a run stand out: its front, its knee, and what volume the front dominates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from archspec.search import pareto
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.trial import Trial


@dataclass(frozen=True)
class Survey:
    """What stands out among the trained trials.

    Args:
        front: numbers of the trials that none beats in every objective, the baselines included.
        knee: the front member that gives up least of everything; None for fewer than three members.
        hypervolume: what the front dominates, up to the search file's reference point; None without one.
        baseline_hypervolume: the same for the baselines alone.
    """

    front: frozenset[int]
    knee: int | None
    hypervolume: float | None
    baseline_hypervolume: float | None


def survey(run: Run) -> Survey:
    """Return what stands out in a run, from its trained trials with every objective known."""
    trials = [trial for trial in run.trained if run.objective_values(trial) is not None]
    if not trials or not run.objectives:
        return Survey(frozenset(), None, None, None)
    losses = losses_of(trials, run)
    members = pareto.front(losses)
    knee = pareto.knee([losses[index] for index in members])
    baselines = [loss for loss, trial in zip(losses, trials, strict=True) if trial.origin == "baseline"]
    return Survey(
        frozenset(trials[index].number for index in members),
        None if knee is None else trials[members[knee]].number,
        _hypervolume(losses, run.objectives),
        _hypervolume(baselines, run.objectives),
    )


def losses_of(trials: Sequence[Trial], run: Run) -> list[list[float]]:
    """Return the objectives of trained trials, oriented so that less is better."""
    rows = [run.objective_values(trial) or [] for trial in trials]
    return [[goal.loss(value) for goal, value in zip(run.objectives, row, strict=True)] for row in rows]


def _hypervolume(losses: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> float | None:
    reference = [goal.loss(goal.reference) for goal in objectives if goal.reference is not None]
    if not losses or len(reference) < len(objectives):
        return None
    return pareto.hypervolume(losses, reference)
