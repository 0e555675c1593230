"""Runs side by side: fronts, hypervolumes from one reference point, the best of each, and what they share.

Runs compare where a score means the same in both: the same objectives, tasks, recipe and last rung. Seeds, spaces,
samplers and lower rungs may differ; that is what one compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from archspec.errors import RunError, UsageError
from archspec.search import pareto
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.report.figures import columns_of, entries_of, interval, number, with_spread
from archspec.search.report.text import Row, Table, facts, wrapped
from archspec.search.survey import Survey, losses_of, survey
from archspec.search.trial import Trial
from archspec.yamltext import parse

SEARCH = "search.yaml"
MUST_AGREE = ("tasks", "training", "context")


@dataclass(frozen=True)
class Comparison:
    """Runs and what stands out in each, from one reference point.

    Fields:
        on_joint_front: how many of each run's trials are on the front of all runs together.
        joint_hypervolume: of all together.
        shared: hash -> the trial of each run that has it, None where one has not; only those of several runs.
    """

    runs: Sequence[Run]
    surveys: Sequence[Survey]
    reference: Sequence[float]
    on_joint_front: Sequence[int]
    joint_hypervolume: float
    shared: dict[str, list[Trial | None]]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs.

    Raises:
        RunError: when there are fewer than two, one has no trained trial, or they cannot be compared.
    """
    if len(runs) < 2 or len({run.folder.resolve() for run in runs}) < len(runs):
        raise UsageError("compare: required: two or more different runs")
    faults = [fault for run in runs[1:] for fault in _differences(runs[0], run)]
    if faults:
        shown = "\n  ".join(faults[:10])
        raise RunError(
            f"these runs cannot be compared, for their scores mean different things:\n  {shown}\n"
            "Compare runs of the same objectives, tasks, recipe and last rung."
        )
    for run in runs:
        if not run.contenders:
            raise RunError(f"{run.folder}: no trial has every objective yet; required: at least one in every run")
    reference = _reference(runs)
    goals = [replace(goal, reference=end) for goal, end in zip(runs[0].objectives, reference, strict=True)]
    equal = [replace(run, objectives=goals) for run in runs]
    surveys = [survey(run) for run in equal]
    owners = [index for index, found in enumerate(surveys) for _ in found.trials]
    losses = [row for found in surveys for row in losses_of(found.trials, goals)]
    joint = [owners[index] for index in pareto.front(losses)]
    volume = pareto.hypervolume(losses, [goal.loss(end) for goal, end in zip(goals, reference, strict=True)])
    counts = [joint.count(index) for index in range(len(runs))]
    return Comparison(equal, surveys, reference, counts, volume, _shared(surveys))


def comparison_lines(found: Comparison, width: int) -> list[Text | str]:
    """Return the comparison for a terminal."""
    columns = columns_of(found.runs[0])[: len(found.reference)]
    heads = ["run", ">seed", ">trials", ">front", ">of joint front", ">hypervolume"]
    table = Table(heads, stretch=0)
    for run, standing, joint in zip(found.runs, found.surveys, found.on_joint_front, strict=True):
        cells = [str(run.seed), str(standing.compared), str(len(standing.front)), str(joint)]
        table.rows.append(Row([run.study, *cells, number(standing.hypervolume)]))
    lines: list[Text | str] = [*table.render(width), ""]
    points = ", ".join(f"{c.label} {number(end, c.unit)}" for c, end in zip(columns, found.reference, strict=True))
    pairs = [("all together", number(found.joint_hypervolume)), ("reference point", points)]
    lines += facts([*pairs, ("shared", _shared_text(found))], width)
    for column, goal in zip(columns, found.runs[0].objectives, strict=True):
        arrow = "↑" if goal.direction == "maximize" else "↓"
        best = Table(["run", f">best {column.label} {arrow}", "95% interval", "trial"], stretch=3)
        for run, standing in zip(found.runs, found.surveys, strict=True):
            trial = _best(standing, goal)
            entry = entries_of(trial, [column]).get(column.key)
            cells = [run.study, with_spread(entry, column.unit), interval(entry, column.unit)]
            best.rows.append(Row([*cells, f"#{trial.number} {trial.name}"]))
        lines += ["", *best.render(width)]
    scored = [column for column in columns if column.key in _scores(found.runs[0])]
    if scored and all(not trial.scores[scored[0].key].get("interval") for s in found.surveys for trial in s.trials):
        lines += ["", *wrapped("One seed a score: how far runs differ by chance is not known.", width)]
    return lines


def comparison_data(found: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data."""
    goals = found.runs[0].objectives
    return {
        "objectives": [goal.as_dict() for goal in goals],
        "joint_hypervolume": found.joint_hypervolume,
        "runs": [
            {
                "study": run.study,
                "folder": str(run.folder),
                "seed": run.seed,
                "compared": standing.compared,
                "front": sorted(standing.front),
                "on_joint_front": joint,
                "hypervolume": standing.hypervolume,
                "best": {goal.name: _best(standing, goal).number for goal in goals},
            }
            for run, standing, joint in zip(found.runs, found.surveys, found.on_joint_front, strict=True)
        ],
        "shared": {code: [trial and trial.number for trial in trials] for code, trials in found.shared.items()},
    }


def _differences(first: Run, second: Run) -> Iterator[str]:
    """Yield one line per thing that gives a score of the two runs another meaning."""
    from archspec.search.searchfile import differences

    for before, after in zip(_meaning(first, second), _meaning(second, first), strict=True):
        yield from differences(before, after, first.study + " -> " + second.study)


def _meaning(run: Run, other: Run) -> Iterator[Any]:
    goals = [{key: value for key, value in goal.as_dict().items() if key != "reference"} for goal in run.objectives]
    yield {"objectives": goals, "tasks": run.tasks, "tokens of the last rung": run.rungs[-1].get("tokens")}
    if (run.folder / SEARCH).is_file() and (other.folder / SEARCH).is_file():
        document = parse((run.folder / SEARCH).read_bytes(), str(run.folder / SEARCH))
        last = {key: value for key, value in document["ladder"][-1].items() if key != "tokens"}
        yield {**{name: document.get(name) for name in MUST_AGREE}, "last rung": last}


def _reference(runs: Sequence[Run]) -> list[float]:
    """Return the runs' own reference where they agree, else the worse of theirs, else the worst value known."""
    found = []
    for at, goal in enumerate(runs[0].objectives):
        ends = [end for run in runs if (end := run.objectives[at].reference) is not None]
        known = [value for run in runs for trial in run.contenders if (value := trial.value(goal.name)) is not None]
        found.append(max(ends if len(ends) == len(runs) else known, key=goal.loss))
    return found


def _shared(surveys: Sequence[Survey]) -> dict[str, list[Trial | None]]:
    by_hash = [{trial.hash: trial for trial in found.trials if trial.hash} for found in surveys]
    codes = dict.fromkeys(code for trials in by_hash for code in trials)
    rows = {code: [trials.get(code) for trials in by_hash] for code in codes}
    return {code: row for code, row in rows.items() if sum(trial is not None for trial in row) > 1}


def _shared_text(found: Comparison) -> str:
    if not found.shared:
        return "no architecture is in more than one of these runs"
    names = [next(trial.name for trial in row if trial is not None) for row in found.shared.values()]
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{len(names)} architectures are in more than one of these runs: {shown}"


def _best(standing: Survey, goal: Objective) -> Trial:
    return min(standing.trials, key=lambda trial: (goal.loss(trial.value(goal.name) or 0.0), trial.number))


def _scores(run: Run) -> set[str]:
    return {score for task in run.tasks.values() for score in task["scores"]}
