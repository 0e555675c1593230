"""What ``archspec pareto``, ``show`` and ``status`` print: lines for a terminal, and the same as plain data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from archspec.search.certainty import Standing, check_facts
from archspec.search.records import Correlation, Run
from archspec.search.report.coordinates import mixers_of
from archspec.search.report.figures import Column, columns_of, entries_of, interval, number, readable, with_spread
from archspec.search.report.liveness import state_of, status_of
from archspec.search.report.payload import (
    choices_of,
    correlation_note,
    duration,
    family_of,
    flattened,
    hypervolume_facts,
    marks_of,
    moment,
)
from archspec.search.report.spectext import spec_text
from archspec.search.report.text import Row, Table, clean, facts, shortened, sparkline, wrapped
from archspec.search.survey import Moment, Survey
from archspec.search.trial import Trial
from archspec.search.watch import how_far, said

ARROWS = {"maximize": "↑", "minimize": "↓", None: ""}
SHORT = {"parameters": "params"}
SCORE_GROUPS = ("Objectives", "Test scores", "Re-scored on fresh seeds", "Training-free", "Size", "Measured cost")
Lines = list[Text | str]


def front_lines(run: Run, found: Survey, trials: Sequence[Trial], width: int, worst: Sequence[str] = ()) -> Lines:
    """Return the table of ``trials``, the hypervolume and the correlations.

    ``worst``: the objectives whose reference is the worst value known, for want of one in the search file.
    """
    every = columns_of(run)
    columns = [column for column in every if column.group == "Objectives"]
    told = {objective.metric for objective in run.objectives}
    extra = [column for column in every if column.key in {"parameters", "state_bytes"} - told]
    goals = ", ".join(f"{column.label} {ARROWS[column.direction]}" for column in columns)
    sort = "trained" if all(trial.state == "trained" for trial in found.trials) else "evaluated"
    share = f"{len(found.front)} of {found.compared} {sort} trials are on the front over {goals}"
    lines: Lines = [*heading(run, width), *wrapped(share, width), ""]
    lines += front_table(trials, found, [*columns, *extra], width, notes=recheck_notes(run, found.standings, every))
    pairs = check_facts(run, found.standings) + hypervolume_facts(run, found) + growth_facts(found.history)
    if worst:
        pairs.append(("worst known", f"is the reference for {', '.join(worst)}: compare no other run's hypervolume"))
    lines += ["", *facts(pairs, width), ""]
    return lines + correlation_lines(run.correlations, run, width)


def by_first_objective(run: Run) -> list[Trial]:
    """Return the trials that compete for the front, the best in the first objective first."""
    goal = run.objectives[0]
    known = [(value, trial) for trial in run.contenders if (value := trial.value(goal.name)) is not None]
    return [trial for _, trial in sorted(known, key=lambda pair: (goal.loss(pair[0]), pair[1].number))]


def growth_facts(moments: Sequence[Moment]) -> list[tuple[str, str]]:
    """Return how the hypervolume grew: a sparkline over the trials, and when it last did."""
    if len(moments) < 2 or not moments[-1].hypervolume:
        return []
    values = [moment.hypervolume for moment in moments]
    kept = [values[round(index * (len(values) - 1) / 39)] for index in range(40)] if len(values) > 40 else values
    last = next(moment for moment in moments if moment.hypervolume == values[-1])
    most = next(moment for moment in moments if moment.hypervolume >= 0.9 * values[-1])
    when = "" if last.seconds is None else f", {duration(last.seconds)} after the start"
    grown = f"90% of it after {most.num_trials:,} of {moments[-1].num_trials:,} trials"
    return [
        ("over the trials", f"{sparkline(kept)} {number(values[0])} to {number(values[-1])}"),
        ("last grew", f"at trial {last.num_trials:,}{when}; {grown}"),
    ]


def heading(run: Run, width: int) -> list[Text]:
    """Return the study, what state it is in, and where it lies."""
    found = [Text(line, style="bold") for line in wrapped(f"{run.study}  {status_of(run)}", width)]
    return [*found, Text(shortened(str(run.folder), width), style="dim")]


def recheck_notes(run: Run, members: Mapping[int, Standing], every: Sequence[Column]) -> dict[int, list[str]]:
    """Return what fresh seeds said of each re-scored member of the front, and against whom it is undecided."""
    columns = [column for column in every if column.group == "Re-scored on fresh seeds"]
    return {member: _recheck_note(run.trials[member], standing, columns) for member, standing in members.items()}


def _recheck_note(trial: Trial, standing: Standing, columns: Sequence[Column]) -> list[str]:
    if trial.recheck_failed:
        return [f"failed on fresh seeds: {trial.recheck_failed}"]
    told = []
    for column in columns:
        entry = entries_of(trial, [column]).get(column.key)
        if entry is not None:
            label = column.label.partition(",")[0]
            told.append(f"{label} {with_spread(entry, column.unit)} {interval(entry, column.unit)} n = {entry.n}")
    if not told:
        return []
    rivals = ", ".join(f"#{rival}" for rival in standing.rivals[:4]) + (", ..." if len(standing.rivals) > 4 else "")
    against = {"front": "surely on the front", "undecided": f"undecided against {rivals}"}
    verdict = against.get(standing.verdict, f"surely dominated by {rivals}")
    return [f"fresh seeds: {', '.join(told)}; {verdict}"]


def front_table(
    trials: Sequence[Trial],
    found: Survey,
    columns: Sequence[Column],
    width: int,
    *,
    notes: Mapping[int, Sequence[str]] | None = None,
) -> list[Text]:
    """Return trials with their scores, the coordinates of each on a line below, and its notes."""
    table = Table([">#", "trial", *(f">{SHORT.get(column.key, column.label)}" for column in columns)])
    all_front = all(trial.number in found.front for trial in trials)
    for trial in trials:
        entries = entries_of(trial, list(columns))
        scores = [with_spread(entries.get(column.key), column.unit) for column in columns]
        marks = [mark for mark in marks_of(trial, found) if mark != "front" or not all_front]
        style = "bold" if "knee" in marks else "" if marks or all_front else "dim"
        at = "; ".join(item.line() for item in mixers_of(trial))
        table.rows.append(
            Row(
                [str(trial.number), trial.name, *scores],
                [": ".join(filter(None, [", ".join(marks), at])), *(notes or {}).get(trial.number, ())],
                style,
            )
        )
    return table.render(width)


def correlation_lines(items: Sequence[Correlation], run: Run, width: int) -> Lines:
    """Return the rank correlations with their n and interval, under how to read them."""
    lines: Lines = ["rank correlations", *(f"  {line}" for line in wrapped(correlation_note(run), width - 2))]
    if not items:
        return lines
    for score in dict.fromkeys(item.against for item in items):
        table = Table(["metric", ">rho", ">95% interval", ">at equal size", ">n", "verdict"], stretch=0)
        for item in items:
            if item.against == score:
                table.rows.append(_correlation_row(item))
        lines += ["", Text(f"against {readable(score)}", style="bold"), *table.render(width)]
    return lines


def _correlation_row(item: Correlation) -> Row:
    span = "-" if item.interval is None else f"[{item.interval[0]:+.2f}, {item.interval[1]:+.2f}]"
    rho, partial = ("-" if value is None else f"{value:+.2f}" for value in (item.rho, item.partial))
    cells = [readable(item.metric), rho, span, partial, str(item.n), item.verdict]
    return Row(cells, style="" if item.verdict != "not enough evidence" else "dim")


def trial_lines(trial: Trial, run: Run, found: Survey, width: int) -> Lines:
    """Return everything known about one trial."""
    promoted = {"rank": "promoted by rank", "random": "promoted at random"}.get(trial.promoted_by or "")
    marks = ", ".join([trial.state, *marks_of(trial, found), *filter(None, [promoted])])
    title = f"{trial.name or '(never built)'}  #{trial.number}  {marks}"
    lines: Lines = [Text(line, style="bold") for line in wrapped(title, width)]
    if trial.reason:
        lines += wrapped(f"{trial.rule}: {trial.reason}" if trial.rule else trial.reason, width)
    if trial.note:
        lines += wrapped(trial.note, width)
    at = [(item.where, item.line()) for item in mixers_of(trial)]
    lines += _section("coordinates", facts(at, width - 2))
    lines += _section("drawn", facts(choices_of(trial), width - 2))
    lines += _scores(trial, run, width - 2)
    lines += _section("training", _curves(trial, run, width - 2))
    lines += _section("kernels", facts(_kernels(trial), width - 2))
    lines += _section("run", facts(_whereabouts(trial, run), width - 2))
    if trial.spec:
        lines += _section(
            "spec", [Text(line) for line in spec_text(trial.spec, max(40, width - 2)).rstrip().split("\n")]
        )
    return lines


def status_lines(run: Run, found: Survey, width: int) -> Lines:
    """Return how far a run is: counts, what runs, the best so far."""
    counts = run.counts
    rejected = sum(counts.rejected.values())
    wanted = f" of {run.trials_wanted:,}" if run.trials_wanted else ""
    pairs = [
        ("sampled", f"{counts.sampled:,}{_acceptance(counts.acceptance_rate)}"),
        ("rejected", ", ".join([f"{rejected:,}", *(f"{rule} {n:,}" for rule, n in counts.rejected.items())])),
        ("duplicates", f"{counts.duplicates:,}, and {run.redraws:,} drawn again at once"),
        ("accepted", f"{counts.accepted:,}{wanted}, besides {counts.baselines:,} baselines"),
        ("evaluated", f"{counts.evaluated:,}"),
        ("trained", f"{counts.trained:,}"),
        ("failed", f"{counts.failed:,}"),
        *([("from the cache", f"{run.reused:,} evaluations")] if run.reused else []),
        ("on the front", f"{len(found.front):,}"),
        ("hypervolume", number(found.hypervolume)),
        ("last event", moment(run.updated)),
        ("time so far", "-" if None in (run.started, run.updated) else duration(run.updated - run.started)),  # type: ignore[operator]
        ("workers", f"{run.workers} on {run.device}" if run.workers else "-"),
    ]
    lines: Lines = [*heading(run, width), *_section("", facts(pairs, width - 2))]
    lines += _section("running", [Text(shortened(line, width - 2)) for line in running(run)])
    lines += _section("best so far", facts(best(run), width - 2))
    return [*lines, "", Text.assemble(("continue: ", "dim"), clean(run.command))] if run.command else lines


def _acceptance(rate: float | None) -> str:
    return "" if rate is None else f", {rate:.0%} of them legal and within the constraints"


def running(run: Run) -> list[str]:
    """Return one line per evaluation in progress, with how far it said it is."""
    if state_of(run) != "running":
        return []
    found, far = [], said(run.folder)
    for key, job in run.running.items():
        trial = run.trials.get(job["trial"])
        what = f"#{job['trial']} {clean(trial.name) if trial else ''}  {job.get('stage', '')}"
        found.append(f"{what}  {clean(how_far(far.get(key, {})))}".rstrip())
    return found


def best(run: Run) -> list[tuple[str, str]]:
    """Return each objective with its best value and whose it is."""
    pairs = []
    for objective, column in zip(run.objectives, columns_of(run), strict=False):
        known = [(value, trial) for trial in run.trained if (value := trial.value(objective.name)) is not None]
        if known:
            _, trial = min(known, key=lambda pair: (objective.loss(pair[0]), pair[1].number))
            score = with_spread(entries_of(trial, [column])[column.key], column.unit)
            pairs.append((f"{column.label} {ARROWS[column.direction]}", f"{score}  #{trial.number} {trial.name}"))
    return pairs


def trial_data(trial: Trial, run: Run, found: Survey, *, full: bool = False) -> dict[str, Any]:
    """Return a trial as plain data; ``full`` adds its spec, plan, curves and files."""
    names = ("number", "name", "hash", "origin", "state", "promoted_by", "reason", "note", "figures", "scores")
    data = {name: getattr(trial, name) for name in names}
    data |= {name: getattr(trial, name) for name in ("training_free", "cost", "families", "kernels", "wall_s")}
    data |= {"front": trial.number in found.front, "knee": trial.number == found.knee, "choices": trial.coordinates}
    data["coordinates"] = [asdict(item) for item in mixers_of(trial)]
    if full:
        data |= {
            name: getattr(trial, name) for name in ("rule", "validation", "rechecked", "low_fidelity", "spec", "plan")
        }
        data |= {"curves": trial.curves, "weights": {task: str(path) for task, path in trial.weights.items()}}
        data["files"] = {stage: str(run.folder / file) for stage, file in trial.files.items()}
    return data


def run_data(run: Run, found: Survey) -> dict[str, Any]:
    """Return what a run is and how far it is as plain data."""
    return {
        "study": run.study,
        "folder": str(run.folder),
        "status": state_of(run),
        "seed": run.seed,
        "objectives": [objective.as_dict() for objective in run.objectives],
        "counts": asdict(run.counts),
        "front": sorted(found.front),
        "knee": found.knee,
        "hypervolume": found.hypervolume,
        "baseline_hypervolume": found.baseline_hypervolume,
        "certainty": {str(number): asdict(standing) for number, standing in found.standings.items()},
        "command": run.command,
        "started": run.started,
        "updated": run.updated,
    }


def _section(title: str, lines: Sequence[Text]) -> Lines:
    if not lines:
        return []
    head: Lines = ["", *([Text(title, style="bold")] if title else [])]
    return [*head, *(Text("  ").append_text(line) for line in lines)]


def _scores(trial: Trial, run: Run, width: int) -> Lines:
    lines: Lines = []
    columns = columns_of(run)
    entries = entries_of(trial, columns)
    for group in SCORE_GROUPS:
        table = Table(["", ">", "", ""], stretch=0, headed=False)
        for column in columns:
            entry = entries.get(column.key)
            if column.group == group and entry is not None:
                runs = f"n = {entry.n}" if entry.n > 1 else ""
                cells = [column.label, with_spread(entry, column.unit), interval(entry, column.unit), runs]
                table.rows.append(Row(cells))
        lines += _section(group.lower(), table.render(width) if table.rows else [])
    return lines


def _curves(trial: Trial, run: Run, width: int) -> list[Text]:
    if trial.state not in ("trained", "failed"):
        return []
    pairs = []
    for task, curve in trial.curves.items():
        primary = str(run.tasks.get(task, {}).get("primary", "score")).split("/")[-1].replace("_", " ")
        for label, key in ((f"{task} {primary}", "score"), (f"{task} loss", "train_loss")):
            values = [float(point[key]) for point in curve if point[key] is not None]
            if values:
                kept = values[:: -(-len(values) // 40)]
                ends = f"{number(values[0])} to {number(values[-1])}"
                pairs.append((label, f"{sparkline(kept)} {ends} in {number(curve[-1]['tokens'], 'count')} tokens"))
    return facts(pairs, width)


def _kernels(trial: Trial) -> list[tuple[str, str]]:
    found = []
    for item in trial.plan:
        name = "/".join(str(item[part]) for part in ("family", "form", "kernel") if item.get(part))
        found.append((str(item.get("where", "")), f"{name}: {item.get('reason', '')}"))
    return found


def _whereabouts(trial: Trial, run: Run) -> list[tuple[str, str]]:
    pairs = [("families", family_of(trial)), ("hash", trial.hash), ("evaluations took", duration(trial.wall_s))]
    pairs += flattened({key: value for key, value in trial.cost.items() if not isinstance(value, dict)})
    pairs.append(("folder", str(run.folder)))
    pairs += [(stage, file) for stage, file in trial.files.items()]
    pairs += [(f"weights for {task}", f"results/{path.name}") for task, path in trial.weights.items()]
    if trial.state == "trained":
        pairs.append(("take it along", f"archspec export {shlex.quote(str(run.folder))} {trial.number} -o DIR"))
    return pairs
