"""What a run left behind, read back: trials, counts, correlations. Imports neither torch nor optuna.

A run is the folder ``runs/<study>/``:

    search.yaml         the search file as resolved, frozen
    environment.json    versions, device and machine of the first start
    events.jsonl        one event a line, append-only: the driver's memory and the index of everything else
    events.index        what the events add up to, for large logs; see ``logindex``
    progress.json       how far running evaluations said they are; see ``watch``
    journal.log         the Optuna study
    results/<key>.json  one finished evaluation each, in full (and <key>.safetensors: trained weights)
    specs/<hash>.yaml   every accepted spec
    report.html

A run's state is the fold of its events (``Run.apply``): the driver resumes by it, and ``load_run`` reads by it, so
that the two never disagree. Only what an event does not carry (specs, curves, plans) is read from result files, and
only when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from archspec.errors import RunError
from archspec.search.eventlog import EVENTS, Event
from archspec.search.names import COSTS, Direction, Objective
from archspec.search.trial import Trial

FORMAT = 1
RECHECK = "/recheck/"  # in the name of a stage: re-scoring on fresh seeds


@dataclass(frozen=True)
class Correlation:
    """How well one figure ranked the final scores of the randomly promoted trials.

    Fields:
        metric: the predictor; ``against``: the final score, oriented so that more is better.
        rho: Spearman's rank correlation, None below 3 trials.
        interval: its 95% interval by Fisher's z (Bonett and Wright's variance), None below 5.
        partial: the same with the number of non-embedding parameters held fixed.
        n: architectures, each counted once, from ``runs`` runs.
        verdict: "predicts", "misleads", or "not enough evidence".
    """

    metric: str
    against: str
    n: int
    rho: float | None
    interval: tuple[float, float] | None
    partial: float | None
    partial_interval: tuple[float, float] | None
    verdict: str
    runs: int = 1


@dataclass(frozen=True)
class Counts:
    """How many trials there are of each sort; ``rejected`` by rule, duplicates apart."""

    sampled: int
    rejected: dict[str, int]
    duplicates: int
    accepted: int
    baselines: int
    evaluated: int
    trained: int
    failed: int

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the draws that broke no rule and no constraint; duplicates count as accepted draws."""
        return None if not self.sampled else (self.accepted + self.duplicates) / self.sampled


@dataclass
class Run:
    """A run: what its events add up to.

    Fields:
        status: ``running`` (or killed), ``finished``, ``interrupted``, ``timeout`` or ``exhausted``.
        tasks: task name -> {kind, primary, scores: {name: direction}}.
        metrics: training-free metric -> direction.
        rungs: the ladder, [{rung, tokens, promote}].
        begun: [trial, rung] for every rung that a candidate came to, in order.
        completions: [trial, rung, 1], or [trial, rung, 0] for a failure, in the order in which rungs were finished.
        space_size: number of settings and of parameters, as it stands; see ``space.Size``.
        generation: how often the space has grown.
        reused: evaluations taken from a shared cache.
        deaths: key -> workers that died on an evaluation; ``losses``: machines that were lost, or workers before they
            began; ``interruptions``: drivers that ended without a word during it, having finished no other.
        has_finished_any: whether anything was finished under the driver that started last.
        soft_constraints: metric -> {min, max}.
        redraws: points drawn again at once because they were known, beside those rejected as duplicates.
    """

    folder: Path
    study: str = ""
    seed: int = 0
    status: str = "running"
    started: float | None = None
    updated: float | None = None
    command: str = ""
    workers: int = 0
    device: str = ""
    trials_wanted: int = 0
    objectives: list[Objective] = field(default_factory=list)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Direction] = field(default_factory=dict)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)
    promotions: dict[tuple[int, int], dict[str, list[int]]] = field(default_factory=dict)
    correlations: list[Correlation] = field(default_factory=list)
    hypervolume: float | None = None
    running: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    interruptions: dict[str, int] = field(default_factory=dict)
    has_finished_any: bool = False
    round_sizes: dict[int, int] = field(default_factory=dict)
    exhausted: set[int] = field(default_factory=set)
    redraws: int = 0
    reused: int = 0
    space_size: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    soft_constraints: dict[str, dict[str, float | None]] = field(default_factory=dict)
    begun: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    finished_keys: dict[str, bool] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)

    def apply(self, event: Event) -> None:
        """Add one event to the state. Unknown events are those of a newer version and are left out."""
        self.updated = event.get("time", self.updated)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    @property
    def counts(self) -> Counts:
        """How many trials there are of each sort."""
        sampled = [trial for trial in self.trials.values() if trial.origin == "sampled"]
        rejected: dict[str, int] = {}
        for trial in sampled:
            if trial.state == "rejected" and trial.rule != "duplicate":
                rejected[trial.rule] = rejected.get(trial.rule, 0) + 1
        states = [trial.state for trial in self.trials.values()]
        return Counts(
            sampled=len(sampled),
            rejected=dict(sorted(rejected.items())),
            duplicates=sum(trial.rule == "duplicate" for trial in sampled),
            accepted=sum(trial.state != "rejected" for trial in sampled),
            baselines=len(self.trials) - len(sampled),
            evaluated=sum(bool(trial.training_free) for trial in self.trials.values()),
            trained=states.count("trained"),
            failed=states.count("failed"),
        )

    @property
    def trained(self) -> list[Trial]:
        """The trials with final scores, in order of their numbers."""
        return [trial for trial in self if trial.state == "trained"]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, device and machine of the first start."""
        path = self.folder / "environment.json"
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}

    @property
    def contenders(self) -> list[Trial]:
        """The trials that compete for the front, by number: those with every objective known.

        Where an objective is a final score or a measured cost they are trained ones; a front over figures and
        training-free metrics alone is over all that were evaluated. None that breaks a soft constraint competes.
        """
        late = {score for task in self.tasks.values() for score in task["scores"]} | COSTS.keys()
        states = ["trained"] if any(goal.metric in late for goal in self.objectives) else ["trained", "evaluated"]
        names = [goal.name for goal in self.objectives]
        known = [t for t in self if t.state in states and all(t.value(name) is not None for name in names)]
        return [t for t in known if not any(self.soft_excess(t).values())] if self.soft_constraints else known

    def objective_values(self, trial: Trial) -> list[float] | None:
        """Return a trial's value of every objective, in their order; None unless all are known."""
        values = [trial.value(objective.name) for objective in self.objectives]
        return None if trial.state != "trained" or None in values else [v for v in values if v is not None]

    def __iter__(self) -> Iterator[Trial]:
        yield from (self.trials[number] for number in sorted(self.trials))

    def soft_excess(self, trial: Trial) -> dict[str, float]:
        """Return how far a trial's values are outside the soft constraints, relative to the bound; 0 is inside."""
        found = {}
        for name, bounds in self.soft_constraints.items():
            score = trial.validation.get(name)
            value = score["mean"] if score is not None else trial.value(name)
            if value is not None:
                low, high = bounds.get("min"), bounds.get("max")
                over = 0.0 if high is None else (value - high) / max(1.0, abs(high))
                under = 0.0 if low is None else (low - value) / max(1.0, abs(low))
                found[name] = max(0.0, over, under)
        return found

    def _on_opened(self, event: Event) -> None:
        if event["format"] != FORMAT:
            raise RunError(
                f"{self.folder}: written in record format {event['format']}, and this version reads {FORMAT}; "
                "use the version of archspec that wrote it"
            )
        self.study, self.seed, self.started = event["study"], event["seed"], event["time"]
        self.objectives = [Objective.from_dict(item) for item in event["objectives"]]
        self.tasks, self.metrics, self.rungs = event["tasks"], event["metrics"], event["rungs"]
        self.soft_constraints = event.get("soft_constraints", {})
        self.space_size = event.get("space", {})

    def _on_grown(self, event: Event) -> None:
        self.space_size = event["space"]
        self.generation = event.get("generation", self.generation + 1)
        for index in self.exhausted:  # there is more to draw: the round counts for what it found
            members = [trial for trial in self.trials.values() if trial.round == index and trial.state != "rejected"]
            self.round_sizes[index] = len(members)
        self.exhausted.clear()

    def _on_started(self, event: Event) -> None:
        self.status = "running"
        self.command, self.workers, self.device = event["command"], event["workers"], event["device"]
        self.trials_wanted = event["trials"]
        for key in () if self.has_finished_any else self.running:  # what the driver before left without a word
            self.interruptions[key] = self.interruptions.get(key, 0) + 1
        self.running.clear()
        self.has_finished_any = False

    def _on_proposed(self, event: Event) -> None:
        trial = self._trial(event)
        trial.state = "proposed"
        for name in ("name", "hash", "origin", "round", "coordinates", "figures", "families", "kernels", "note"):
            setattr(trial, name, event[name])
        trial.mixers = event.get("mixers", [])
        self._drawn(trial, event)
        self.begun.append([trial.number, 0])

    def _on_rejected(self, event: Event) -> None:
        trial = self._trial(event)
        trial.state = "rejected"
        for name in ("round", "coordinates", "rule", "reason"):
            setattr(trial, name, event[name])
        trial.hash, trial.excess = event.get("hash", ""), event.get("excess", {})
        self._drawn(trial, event)

    def _drawn(self, trial: Trial, event: Event) -> None:
        trial.how = event.get("how", "sampler" if trial.origin == "sampled" else "")
        self.redraws += event.get("redraws", 0)

    def _on_submitted(self, event: Event) -> None:
        trial = self._trial(event)
        trial.started = trial.started or event["time"]
        self.attempts[event["key"]] = event["attempt"]
        self.running[event["key"]] = dict(event)

    def _on_died(self, event: Event) -> None:
        self.running.pop(event["key"], None)
        self.deaths[event["key"]] = self.deaths.get(event["key"], 0) + 1

    def _on_lost(self, event: Event) -> None:
        self.running.pop(event["key"], None)
        self.losses[event["key"]] = self.losses.get(event["key"], 0) + 1

    def _on_cancelled(self, event: Event) -> None:
        self.running.pop(event["key"], None)
        self.attempts[event["key"]] = self.attempts.get(event["key"], 1) - 1

    def _on_finished(self, event: Event) -> None:
        trial, stage, value = self._trial(event), event["stage"], event.get("value", {})
        self.running.pop(event["key"], None)
        self.finished_keys[event["key"]] = event["ok"]
        self.has_finished_any = True
        self.reused += event.get("reused", False)
        trial.wall_s += event.get("wall_s", 0.0)
        trial.files[stage] = f"results/{event['key']}.json"
        if RECHECK in stage:  # a second look at a finished trial: what it was found by stays
            trial.rechecked.update(value.get("scores", {}))
            trial.recheck_failed = trial.recheck_failed or event["reason"]
            return
        trial.finished = event["time"]
        if not event["ok"]:
            if trial.state != "failed":
                self.completions.append([trial.number, event["rung"], 0])
            trial.state, trial.reason = "failed", trial.reason or event["reason"]
            return
        trial.training_free.update(value.get("metrics", {}))
        trial.cost.update(value.get("cost", {}))
        if "scores" in value:
            self._scored(trial, event["rung"], value)
        if trial.state == "proposed" and (trial.training_free or trial.low_fidelity):
            trial.state = "evaluated"
        stages = self.rungs[event["rung"]].get("stages")
        if trial.state != "failed" and stages and all(each in trial.files for each in stages):
            self.completions.append([trial.number, event["rung"], 1])

    def _scored(self, trial: Trial, rung: int, value: Mapping[str, Any]) -> None:
        if rung < len(self.rungs) - 1:
            trial.low_fidelity.setdefault(rung, {}).update(value["validation"])
            return
        trial.scores.update(value["scores"])
        trial.validation.update(value["validation"])
        wanted = {score for task in self.tasks.values() for score in task["scores"]}
        if wanted <= trial.scores.keys() and trial.state != "failed":
            trial.state = "trained"

    def _on_promoted(self, event: Event) -> None:
        promoted = self.promotions.setdefault((event["round"], event["rung"]), {"rank": [], "random": []})
        for how in ("rank", "random"):
            promoted[how] = [*promoted[how], *event[how]]
            for number in event[how]:
                trial = self.trials[number]
                trial.promoted_by = how  # type: ignore[assignment]
                self.begun.append([number, event["rung"] + 1])

    def _on_round(self, event: Event) -> None:
        self.round_sizes[event["round"]] = event["size"]

    def _on_exhausted(self, event: Event) -> None:
        self.exhausted.add(event["round"])

    def _on_closed(self, event: Event) -> None:
        self.closed.add(event["round"])

    def _on_concluded(self, event: Event) -> None:
        self.hypervolume = event["hypervolume"]
        self.correlations = [correlation_from(item) for item in event["correlations"]]

    def _on_stopped(self, event: Event) -> None:
        self.status = event["reason"]
        self.running.clear()

    def _trial(self, event: Event) -> Trial:
        number = event["trial"]
        if number not in self.trials:
            self.trials[number] = Trial(number, folder=self.folder)
        return self.trials[number]


def load_run(run_dir: str | Path) -> Run:
    """Read a run.

    Raises:
        RunError: when the folder is no run, or was written by another version.
    """
    folder = Path(run_dir)
    path = folder / EVENTS
    if not path.is_file():
        raise RunError(f"{folder}: no run here ({EVENTS} is missing); required: a folder that 'archspec search' wrote")
    from archspec.search.logindex import open_run  # it folds events into the Run defined here

    return open_run(folder)


def replay(folder: Path, events: Sequence[Event] | Iterator[Event]) -> Run:
    """Return the run that these events add up to."""
    run = Run(folder)
    for event in events:
        run.apply(event)
    return run


def correlation_from(item: Mapping[str, Any]) -> Correlation:
    """Return a correlation from its plain mapping."""
    pairs = {name: tuple(item[name]) if item[name] is not None else None for name in ("interval", "partial_interval")}
    return Correlation(**{**item, **pairs})
