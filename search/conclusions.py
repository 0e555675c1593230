"""What a run says at its end: the hypervolume of its front, and how well each figure ranked the final scores.

Correlations are over the randomly promoted trials of every run that shares this one's space, tasks, recipe and
ladder: each leaves a small file per architecture in the cache, so that evidence adds up from run to run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from archspec.search.correlation import interval, partial, spearman, verdict
from archspec.search.dispatch import Emit
from archspec.search.files import write_json
from archspec.search.names import Direction
from archspec.search.records import Correlation, Run
from archspec.search.requests import Prepared, fingerprint
from archspec.search.rundir import RunFolder
from archspec.search.survey import survey
from archspec.search.trial import Trial

CONTROL = "non_embedding_parameters"
Pair = Mapping[str, Any]


def conclude(run: Run, prepared: Prepared, folder: RunFolder, emit: Emit) -> None:
    """Compute and log what the run shows so far; nothing while no trial is trained."""
    if not run.trained:
        return
    pairs = share(run, folder.cache / "pairs" / fingerprint(prepared))
    found = correlations(pairs, run)
    emit("concluded", hypervolume=survey(run).hypervolume, correlations=[asdict(item) for item in found])


def share(run: Run, folder: Path) -> list[Pair]:
    """Leave this run's randomly promoted trials in the cache, and return those of all runs, one per architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    for trial in run.trained:
        if trial.promoted_by == "random":
            write_json(folder / f"{trial.hash}.json", _pair(trial, run))
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]


def correlations(pairs: Sequence[Pair], run: Run) -> list[Correlation]:
    """Return how well every figure and metric ranked every score, the control first."""
    outcomes: dict[str, Direction] = {task["primary"]: task["scores"][task["primary"]] for task in run.tasks.values()}
    predictors = dict.fromkeys([CONTROL, *run.metrics, *(name for pair in pairs for name in pair["predictors"])])
    return [_correlation(name, score, direction, pairs) for score, direction in outcomes.items() for name in predictors]


def _correlation(metric: str, against: str, direction: Direction, pairs: Sequence[Pair]) -> Correlation:
    rows = [
        (pair["predictors"][metric], pair["outcomes"][against], pair["predictors"][CONTROL], pair["study"])
        for pair in pairs
        if pair["predictors"].get(metric) is not None and pair["outcomes"].get(against) is not None
    ]
    n = len(rows)
    values = [row[0] for row in rows]
    goodness = [row[1] if direction == "maximize" else -row[1] for row in rows]
    rho = spearman(values, goodness)
    held = None if metric == CONTROL else partial(values, goodness, [row[2] for row in rows])
    bounds = interval(rho, n)
    return Correlation(
        metric=metric,
        against=against,
        n=n,
        rho=rho,
        interval=bounds,
        partial=held,
        partial_interval=interval(held, n, num_fixed=1),
        verdict=verdict(bounds, n),
        runs=len({row[3] for row in rows}),
    )


def _pair(trial: Trial, run: Run) -> dict[str, Any]:
    predictors = {name: trial.figures[name] for name in (CONTROL, "flops_per_token", "state_bytes")}
    predictors |= {name: entry["mean"] for name, entry in trial.training_free.items()}
    for rung, scores in trial.low_fidelity.items():
        predictors |= {f"{name} on rung {rung + 1}": entry["mean"] for name, entry in scores.items()}
    outcomes = {name: entry["mean"] for name, entry in trial.scores.items() if math.isfinite(entry["mean"] or math.nan)}
    return {"study": run.study, "hash": trial.hash, "predictors": predictors, "outcomes": outcomes}
