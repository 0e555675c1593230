"""What the report's page shows, as plain data: every text is already for people, every number still a number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from archspec.search.certainty import check_facts
from archspec.search.records import Correlation, Run
from archspec.search.report.analysis import report_analysis
from archspec.search.report.coordinates import mixers_of
from archspec.search.report.figures import Column, columns_of, entries_of, number, readable
from archspec.search.report.liveness import status_of
from archspec.search.report.spectext import spec_text
from archspec.search.survey import Survey, survey
from archspec.search.trial import Trial

MAX_TRIALS = 2000  # in one page; beyond it the least telling trials are left out, and the page says so
MAX_DETAILED = 400  # of these with their specs, curves and kernels


def report_data(run: Run, found: Survey | None = None) -> dict[str, Any]:
    """Return everything the page shows of a run; ``found`` where the run is surveyed already."""
    found = survey(run) if found is None else found
    columns = columns_of(run)
    shown, left_out = _shown(run, found)
    detailed = {trial.number for trial in sorted(shown, key=_interest(run, found))[:MAX_DETAILED]}
    trials = [_trial(trial, run, found, columns, detailed) for trial in shown]
    keys = {key for trial in trials for key in trial["values"]}
    return {
        "study": run.study or run.folder.name,
        "file_stem": re.sub(r"[^A-Za-z0-9._-]+", "-", run.study) or "study",
        "status": {"text": status_of(run), "finished": run.status in ("finished", "exhausted")},
        "summary": _summary(run),
        "command": run.command,
        "counts": _counts(run, found),
        "rejected": _reasons(run, "rejected"),
        "failed": _reasons(run, "failed"),
        "objectives": [
            {"key": objective.name, "direction": objective.direction, "reference": objective.reference}
            for objective in run.objectives
        ],
        "columns": [asdict(column) for column in columns if column.key in keys],
        "families": _families(trials),
        "trials": trials,
        "plot_note": _plot_note(run),
        "trials_note": left_out,
        "correlation_note": correlation_note(run),
        "correlations": [_correlation(item) for item in run.correlations],
        "certainty": check_facts(run, found.standings),
        "hypervolume": hypervolume_facts(run, found),
        "analysis": report_analysis(run),
        "history": [list(vars(moment).values()) for moment in found.history],
        "environment": flattened(run.environment),
    }


def family_of(trial: Trial) -> str:
    """Return the rule families of a trial as one name, such as ``delta + softmax``."""
    return " + ".join(trial.families) or "unknown"


def marks_of(trial: Trial, found: Survey) -> list[str]:
    """Return how a trial stands out: knee, front, baseline."""
    marks = ["knee"] if trial.number == found.knee else ["front"] if trial.number in found.front else []
    return [*marks, "baseline"] if trial.origin == "baseline" else marks


def choices_of(trial: Trial) -> list[tuple[str, str]]:
    """Return what was drawn, as (place, value); a value is stored under its key, as in ``bias:l2``."""
    found = []
    for place, value in trial.coordinates.items():
        text, key = str(value), re.split(r"[./]", place)[-1]
        found.append((place, text.removeprefix(f"{key}:")))
    return found


def flattened(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (name, text) pairs in their order."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(item, Mapping):
            pairs += flattened(item, name)
        elif item not in (None, "", [], {}):
            pairs.append((name, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return pairs


def duration(seconds: float) -> str:
    """Return a length of time for people: ``41 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(seconds: float | None) -> str:
    """Return a time of the epoch as ``2026-01-12 14:02 UTC``."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def correlation_note(run: Run) -> str:
    """Return how the correlations are to be read, the number of trials behind them included."""
    if not run.correlations:
        return "No correlation yet: they are computed when a search ends, from randomly promoted trials."
    runs = max(item.runs for item in run.correlations)
    where = "this run" if runs == 1 else f"{runs} runs that share their recipe"
    return (
        "Spearman's rank correlation over the randomly promoted trials only, since selected ones would flatter the "
        f"metric that selected them; from {where}. Positive means that the metric predicts quality; intervals are "
        "95%, by Fisher's z. A metric is worth its name only where it beats the parameter count."
    )


def hypervolume_facts(run: Run, found: Survey) -> list[tuple[str, str]]:
    """Return the hypervolume, the baselines' own, and the reference point they are measured from."""
    labels = {column.key: column for column in columns_of(run)}
    points = [(labels[item.name], item.reference) for item in run.objectives]
    facts = [
        ("hypervolume", "-" if found.hypervolume is None else number(found.hypervolume)),
        ("baselines alone", "-" if found.baseline_hypervolume is None else number(found.baseline_hypervolume)),
    ]
    known = [f"{column.label} {number(value, column.unit)}" for column, value in points if value is not None]
    if len(known) < len(points):
        return [("hypervolume", "none: the search file gives no reference for every objective")]
    return [*facts, ("reference point", ", ".join(known))]


def _interest(run: Run, found: Survey) -> Callable[[Trial], tuple[bool, bool, bool, float, int]]:
    """Return what sorts trials by how much they tell: the front, baselines, then the best trained, then the others."""
    goal = run.objectives[0] if run.objectives else None

    def key(trial: Trial) -> tuple[bool, bool, bool, float, int]:
        value = None if goal is None else trial.value(goal.name)
        loss = math.inf if goal is None or value is None else goal.loss(value)
        return trial.number not in found.front, trial.origin != "baseline", trial.state != "trained", loss, trial.number

    return key


def _shown(run: Run, found: Survey) -> tuple[list[Trial], str]:
    """Return the trials that a page holds, in order of their numbers, and what it says of those it leaves out."""
    alive = [trial for trial in run if trial.state != "rejected"]
    trained = sorted((trial for trial in alive if _is_kept_first(trial)), key=_interest(run, found))
    kept = [*trained, *(trial for trial in alive if not _is_kept_first(trial))][:MAX_TRIALS]
    numbers = {trial.number for trial in kept}
    dropped = [trial for trial in alive if trial.number not in numbers]
    counts = {"untrained": sum(not _is_kept_first(t) for t in dropped), "trained": sum(map(_is_kept_first, dropped))}
    words = " and ".join(f"{count:,} {sort}" for sort, count in counts.items() if count)
    return [t for t in alive if t.number in numbers], f"{words} trials are left out of this page." if words else ""


def _is_kept_first(trial: Trial) -> bool:
    return trial.state == "trained" or trial.origin == "baseline"


def _trial(trial: Trial, run: Run, found: Survey, columns: list[Column], detailed: set[int]) -> dict[str, Any]:
    return {
        "number": trial.number,
        "name": trial.name,
        "hash": trial.hash,
        "baseline": trial.origin == "baseline",
        "state": trial.state,
        "promoted": {"rank": "promoted by rank", "random": "promoted at random"}.get(trial.promoted_by or ""),
        "reason": trial.reason,
        "note": trial.note,
        "family": family_of(trial),
        "front": trial.number in found.front,
        "knee": trial.number == found.knee,
        "values": {key: dict(vars(entry)) for key, entry in entries_of(trial, columns).items()},
        "choices": choices_of(trial),
        "cost": _cost(trial),
        **_details(trial, run, trial.number in detailed),
        "export_command": f"archspec export {run.folder} {trial.number} -o {_folder_name(trial)}"
        if trial.state == "trained"
        else "",
    }


def _details(trial: Trial, run: Run, is_detailed: bool) -> dict[str, Any]:
    """Return what is read from a trial's own files, or how to see it."""
    if not is_detailed:
        elsewhere = f"archspec show {run.folder} {trial.number}"
        return {"coordinates": [], "curves": [], "kernels": [], "spec": "", "elsewhere": elsewhere}
    return {
        "coordinates": [asdict(item) for item in mixers_of(trial)],
        "curves": _curves(trial, run),
        "kernels": [_kernel(item) for item in trial.plan],
        "spec": trial.spec_file() or (spec_text(trial.spec) if trial.spec else ""),
        "elsewhere": "",
    }


def _folder_name(trial: Trial) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", trial.name).strip("-.") or f"trial-{trial.number}"


def _curves(trial: Trial, run: Run) -> list[dict[str, Any]]:
    if trial.state not in ("trained", "failed"):
        return []
    return [
        {
            "task": task,
            "score": "validation "
            + str(run.tasks.get(task, {}).get("primary", "score")).split("/")[-1].replace("_", " "),
            "points": [[point["tokens"], point["train_loss"], point["score"]] for point in curve],
        }
        for task, curve in trial.curves.items()
    ]


def _cost(trial: Trial) -> list[tuple[str, str]]:
    settings = {name: value for name, value in trial.cost.items() if not isinstance(value, Mapping)}
    facts = flattened(settings)
    return [*facts, ("evaluation took", duration(trial.wall_s))] if trial.wall_s else facts


def _kernel(item: Mapping[str, Any]) -> dict[str, str]:
    name = "/".join(str(item[part]) for part in ("family", "form", "kernel") if item.get(part))
    return {"name": name, "where": str(item.get("where", "")), "reason": str(item.get("reason", ""))}


def _counts(run: Run, found: Survey) -> list[tuple[str, str]]:
    counts = run.counts
    pairs = [
        ("sampled", counts.sampled),
        ("rejected", sum(counts.rejected.values())),
        ("duplicates", counts.duplicates),
        ("baselines", counts.baselines),
        ("evaluated", counts.evaluated),
        ("trained", counts.trained),
        ("failed", counts.failed),
        ("on the front", len(found.front)),
    ]
    return [(label, f"{value:,}") for label, value in pairs]


def _reasons(run: Run, state: str) -> list[tuple[str, int]]:
    found = [trial for trial in run if trial.state == state and trial.rule != "duplicate"]
    counted = Counter((f"{trial.rule}: {trial.reason}" if trial.rule else trial.reason) for trial in found)
    most = counted.most_common(20)
    rest = sum(counted.values()) - sum(count for _, count in most)
    return [*most, ("other reasons", rest)] if rest else most


def _families(trials: list[dict[str, Any]]) -> list[str]:
    """Order families by how often they were trained, so that those in the figure get the first colours."""
    counted = Counter({trial["family"]: 0 for trial in trials})
    for trial in trials:
        counted[trial["family"]] += 1000 if trial["state"] == "trained" else 1
    return [family for family, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]


def _correlation(item: Correlation) -> dict[str, Any]:
    low, high = item.interval or (None, None)
    return {
        "metric": readable(item.metric),
        "score": readable(item.against),
        "rho": item.rho,
        "low": low,
        "high": high,
        "partial": item.partial,
        "n": item.n,
        "evidence": item.verdict != "not enough evidence",
        "verdict": item.verdict,
    }


def _summary(run: Run) -> str:
    arrows = {"maximize": "\u2191", "minimize": "\u2193"}
    labels = {column.key: column.label for column in columns_of(run)}
    goals = ", ".join(f"{labels[item.name]} {arrows[item.direction]}" for item in run.objectives)
    spent = "" if run.started is None or run.updated is None else f" {duration(run.updated - run.started)} in all."
    return f"Objectives: {goals}. Seed {run.seed}.{spent} Last event {moment(run.updated)}."


def _plot_note(run: Run) -> str:
    goals = len(run.objectives)
    over = f"all {goals} objectives" if goals > 1 else "the objective"
    return f"Opaque marks are on the front over {over}. Whiskers are 95% intervals over seeds, or p20 to p80 of a cost."
