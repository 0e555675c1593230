"""Which trials of a run stand out: its front, its knee, what volume the front dominates, and how that grew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from archspec.search import pareto
from archspec.search.certainty import Standing, standings
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.trial import Trial

HISTORY_POINTS = 48


@dataclass(frozen=True)
class Moment:
    """The hypervolume after ``num_trials`` were known, ``seconds`` after the run's start (pauses included)."""

    num_trials: int
    seconds: float | None
    hypervolume: float


@dataclass(frozen=True)
class Survey:
    """What stands out among the trials with every objective known.

    Args:
        front: numbers of the trials that none beats in every objective, the baselines included.
        knee: the front member that gives up least of everything; None for fewer than three members.
        hypervolume: what the front dominates, up to the search file's reference point; None without one.
        baseline_hypervolume: the same for the baselines alone.
        trials: those compared, by number; ``run`` is theirs. What follows from them is computed when it is asked for.
    """

    front: frozenset[int]
    knee: int | None
    hypervolume: float | None
    baseline_hypervolume: float | None
    trials: Sequence[Trial] = field(repr=False)
    run: Run = field(repr=False, compare=False)

    @property
    def compared(self) -> int:
        """How many trials were compared."""
        return len(self.trials)

    @cached_property
    def history(self) -> list[Moment]:
        """How the hypervolume grew."""
        return history(self.run, trials=self.trials)

    @cached_property
    def standings(self) -> dict[int, Standing]:
        """Where each member of the front stands by the intervals."""
        return standings(self.trials, self.run.objectives, sorted(self.front))


def survey(run: Run) -> Survey:
    """Return what stands out in a run."""
    trials = run.contenders
    if not trials or not run.objectives:
        return Survey(frozenset(), None, None, None, (), run)
    losses = losses_of(trials, run.objectives)
    members = pareto.front(losses)
    knee = pareto.knee([losses[index] for index in members])
    baselines = [loss for loss, trial in zip(losses, trials, strict=True) if trial.origin == "baseline"]
    return Survey(
        frozenset(trials[index].number for index in members),
        None if knee is None else trials[members[knee]].number,
        volume([losses[index] for index in members], run.objectives),
        volume(baselines, run.objectives),
        trials,
        run,
    )


def history(run: Run, num_points: int = HISTORY_POINTS, trials: Sequence[Trial] | None = None) -> list[Moment]:
    """Return the hypervolume as trials became known, in order of their last evaluation, at ``num_points`` at most.

    Empty without a reference point.
    """
    reference = reference_of(run.objectives)
    compared = run.contenders if trials is None else trials
    trials = sorted(compared, key=lambda trial: (trial.finished or 0.0, trial.number))
    if reference is None or not trials:
        return []
    losses = losses_of(trials, run.objectives)
    count = min(num_points, len(trials))
    found, members, start = [], list[list[float]](), 0
    for end in (round(len(trials) * (index + 1) / count) for index in range(count)):
        members += losses[start:end]
        members = [members[index] for index in pareto.front(members)]
        finished = trials[end - 1].finished
        seconds = None if finished is None or run.started is None else finished - run.started
        found.append(Moment(end, seconds, pareto.hypervolume(members, reference)))
        start = end
    return found


def losses_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[list[float]]:
    """Return the objectives of trials that have them all, oriented so that less is better.

    Raises:
        ValueError: when one is missing.
    """
    rows = []
    for trial in trials:
        values = [trial.value(goal.name) for goal in objectives]
        if None in values:
            raise ValueError(f"losses_of: trial {trial.number} lacks an objective")
        rows.append([goal.loss(value) for goal, value in zip(objectives, values, strict=True) if value is not None])
    return rows


def reference_of(objectives: Sequence[Objective]) -> list[float] | None:
    """Return the reference point as losses; None unless every objective has one."""
    found = [goal.loss(goal.reference) for goal in objectives if goal.reference is not None]
    return found if len(found) == len(objectives) else None


def volume(losses: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> float | None:
    """Return the hypervolume of rows of losses; None without rows or without a reference point."""
    reference = reference_of(objectives)
    return None if not losses or reference is None else pareto.hypervolume(losses, reference)
