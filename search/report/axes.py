"""Other objectives than the search file's: a run looked at along any of its recorded figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from archspec.errors import UsageError, unknown
from archspec.search.names import Direction, Objective
from archspec.search.records import Run
from archspec.search.report.figures import Column, columns_of

_WAYS: dict[str, Direction] = {"max": "maximize", "maximize": "maximize", "min": "minimize", "minimize": "minimize"}
MAX_OBJECTIVES = 6


def along(run: Run, names: Sequence[str], references: Mapping[str, float]) -> tuple[Run, list[str]]:
    """Return the run with other objectives, and those among them whose reference is the worst value known.

    Args:
        names: final scores, figures, measured costs or training-free metrics, each once; ``NAME:max`` or ``NAME:min``
            states the direction, which must be said where the run does not know it.
        references: reference points of the hypervolume, before those of the search file.

    Raises:
        UsageError: for a name that the run did not record, or a direction that is missing or no direction.
    """
    columns = {column.key: column for column in columns_of(run) if ":" not in column.key}
    known = {objective.name: objective for objective in run.objectives}
    if len(set(names)) < len(names) or not 1 <= len(names) <= MAX_OBJECTIVES:
        raise UsageError(f"--objectives {','.join(names)}: required: 1 to {MAX_OBJECTIVES} different names")
    chosen = [_objective(name, known, columns, run) for name in names]
    for name in references:
        if name not in {objective.name for objective in chosen}:
            raise UsageError(f"--reference {name}: {unknown('objective', name, [goal.name for goal in chosen])}")
    given = [replace(goal, reference=references.get(goal.name, goal.reference)) for goal in chosen]
    trials = replace(run, objectives=given).contenders
    found, worst = [], []
    for goal in given:
        values = [value for trial in trials if (value := trial.value(goal.name)) is not None]
        if goal.reference is None and values:
            worst.append(goal.name)
            goal = replace(goal, reference=max(values, key=goal.loss))
        found.append(goal)
    return replace(run, objectives=found), worst


def _objective(name: str, known: Mapping[str, Objective], columns: Mapping[str, Column], run: Run) -> Objective:
    metric, colon, said = name.partition(":")
    if colon and said not in _WAYS:
        raise UsageError(f"--objectives {name}: found direction {said!r}; required: max or min, as in {metric}:max")
    if metric not in columns:
        raise UsageError(f"{run.folder}: {unknown('recorded figure', metric, columns)}")
    base = known.get(metric, Objective(metric, metric, columns[metric].direction or "minimize"))
    if not colon and columns[metric].direction is None:
        raise UsageError(f"--objectives {metric}: which way is better is not known; write {metric}:max or {metric}:min")
    return replace(base, direction=_WAYS[said]) if colon else base
