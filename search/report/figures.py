"""The figures a report shows of each trial: their names, directions, units and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from archspec.search.names import FIGURES, Direction, Objective
from archspec.search.records import Run
from archspec.search.trial import Trial

Group = Literal[
    "Objectives",
    "Test scores",
    "Re-scored on fresh seeds",
    "Training-free",
    "Size",
    "Measured cost",
    "Validation scores",
    "Earlier rungs",
]
UNITS = {"bytes": (1024, " B", " KiB", " MiB", " GiB", " TiB"), "count": (1000, "", "k", "M", "G", "T")}
_LABELS = {"non_embedding_parameters": "non-embedding parameters", "flops_per_token": "FLOPs per token"}
_COUNTS = ("parameters", "non_embedding_parameters", "flops_per_token", "state_size", "layers")


@dataclass(frozen=True)
class Entry:
    """One figure of one trial. ``spread``, ``low``, ``high`` are None where nothing was repeated."""

    mean: float
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 1


@dataclass(frozen=True)
class Column:
    """One figure over all trials.

    Args:
        key: unique; the name by which search files and records know it.
        label: for people, without the unit.
        direction: which way is better, None where it is not stated.
        unit: ``bytes``, ``count``, ``ms``, ``nats`` or nothing.
        log: whether the figure spreads over orders of magnitude.
    """

    key: str
    label: str
    group: Group
    direction: Direction | None = None
    unit: str = ""
    log: bool = False


def columns_of(run: Run) -> list[Column]:
    """Return every figure that the run's trials have, the objectives first, each once."""
    found: dict[str, Column] = {}
    for column in _candidates(run):
        found.setdefault(column.key, column)
    return list(found.values())


def entries_of(trial: Trial, columns: list[Column]) -> dict[str, Entry]:
    """Return the trial's value of every column it has one for; numbers that are not finite are left out."""
    found = {column.key: _entry(trial, column.key) for column in columns}
    return {key: entry for key, entry in found.items() if entry is not None and math.isfinite(entry.mean)}


def _candidates(run: Run) -> Iterator[Column]:
    for objective in run.objectives:
        yield _objective(objective)
    for task in run.tasks.values():
        for name, direction in task["scores"].items():
            yield _column(name, "Test scores", direction)
    ways = {name: way for task in run.tasks.values() for name, way in task["scores"].items()}
    for name in _first_seen(trial.rechecked for trial in run):
        yield _column(f"recheck:{name}", "Re-scored on fresh seeds", ways.get(name), f"{readable(name)}, fresh seeds")
    for name, direction in run.metrics.items():
        yield _column(name, "Size" if name in FIGURES else "Training-free", direction)
    trials = list(run)
    for name in _first_seen(trial.training_free for trial in trials):
        yield _column(name, "Training-free")
    told = {objective.metric for objective in run.objectives if objective.at_length}
    for name in _first_seen(trial.figures for trial in trials):
        if name not in told:  # an objective says at which length; the bare figure beside it would only confuse
            yield _column(name, "Size", FIGURES.get(name))
    timed = ((name, value) for trial in trials for name, value in trial.cost.items())
    for name in dict.fromkeys(name for name, value in timed if isinstance(value, Mapping) and "median" in value):
        yield _column(name, "Measured cost", "minimize")
    yield from _other_fidelities(run, trials)


def _other_fidelities(run: Run, trials: list[Trial]) -> Iterator[Column]:
    directions = {name: way for task in run.tasks.values() for name, way in task["scores"].items()}
    for name in _first_seen(trial.validation for trial in trials):
        yield _column(f"validation:{name}", "Validation scores", directions.get(name), f"validation {readable(name)}")
    rungs = ((rung, name) for trial in trials for rung, scores in trial.low_fidelity.items() for name in scores)
    for rung, name in dict.fromkeys(rungs):
        label = f"{readable(name)} at rung {rung}"
        yield _column(f"rung{rung}:{name}", "Earlier rungs", directions.get(name), label)


def _objective(objective: Objective) -> Column:
    column = _column(objective.metric, "Objectives", objective.direction)
    label = f"{column.label} at {objective.at_length:,} tokens" if objective.at_length else column.label
    return Column(objective.name, label, "Objectives", objective.direction, column.unit, column.log)


def _column(name: str, group: Group, direction: Direction | None = None, label: str = "") -> Column:
    unit = "count" if name in _COUNTS else "bytes" if name.endswith("_bytes") else ""
    if name.endswith("_ms") or "_ms_" in name:
        unit = "ms"
    elif name.endswith("_nats"):
        unit = "nats"
    return Column(name, label or readable(name), group, direction, unit, log=unit not in ("", "nats"))


def readable(name: str) -> str:
    """Return a name for people: ``decode_ms_per_token`` is ``decode per token``, in ms."""
    if name in _LABELS:
        return _LABELS[name]
    words = name.replace("/", " ").replace("_", " ").replace(":", " ")
    for unit in (" ms per ", " ms", " bytes", " nats"):
        if words.endswith(unit) or unit.endswith("per "):
            words = words.replace(unit, " per " if unit.endswith("per ") else "")
    return words


def _entry(trial: Trial, key: str) -> Entry | None:
    stage, _, name = key.rpartition(":")
    if stage == "validation":
        return _measured(trial.validation.get(name))
    if stage == "recheck":
        return _measured(trial.rechecked.get(name))
    if stage.startswith("rung"):
        return _measured(trial.low_fidelity.get(int(stage[4:]), {}).get(name))
    if key in trial.scores:
        return _measured(trial.scores[key])
    cost = trial.cost.get(key)
    if key in trial.figures:
        return Entry(float(trial.figures[key]))
    if isinstance(cost, Mapping):
        return Entry(cost["median"], None, cost.get("p20"), cost.get("p80"), int(cost.get("repeats", 1)))
    return _measured(trial.training_free.get(key))


def _measured(score: Mapping[str, Any] | None) -> Entry | None:
    if score is None or score["mean"] is None:  # not a finite number when it was measured
        return None
    low, high = score.get("interval") or (None, None)
    spread = score.get("spread")
    return Entry(score["mean"], spread, low, high, int(score.get("n", 1)))


def _first_seen(mappings: Any) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def number(value: float | None, unit: str = "") -> str:
    """Return a number for people: three significant digits, bytes by 1024, counts by 1000; a dash for None."""
    if value is None:
        return "-"
    if unit in UNITS:
        step, *names = UNITS[unit]
        power = 0
        while abs(value) >= step and power < len(names) - 1:
            value, power = value / step, power + 1
        return f"{value:.3g}{names[power]}" if abs(value) < 1000 else f"{value:.0f}{names[power]}"
    size = abs(value)
    text = (
        f"{value:.2e}" if size and (size >= 1e6 or size < 1e-3) else f"{value:.0f}" if size >= 1000 else f"{value:#.3g}"
    )
    return text.rstrip(".") + (f" {unit}" if unit else "")


def with_spread(entry: Entry | None, unit: str = "") -> str:
    """Return the mean with as many decimals as its spread gives meaning to: ``0.912±0.012``."""
    if entry is None or not entry.spread:
        return number(None if entry is None else entry.mean, unit)
    if unit in UNITS:
        return f"{number(entry.mean, unit)}±{number(entry.spread, unit)}"
    decimals = min(6, max(0, 1 - math.floor(math.log10(entry.spread))))
    return f"{entry.mean:.{decimals}f}±{entry.spread:.{decimals}f}" + (f" {unit}" if unit else "")


def interval(entry: Entry | None, unit: str = "") -> str:
    """Return ``[low, high]``, or nothing where no interval is known."""
    if entry is None or entry.low is None or entry.high is None:
        return ""
    shown = unit if unit in UNITS else ""  # the mean beside it carries any other unit
    return f"[{number(entry.low, shown)}, {number(entry.high, shown)}]"
