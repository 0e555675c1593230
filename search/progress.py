"""Live progress of a search on stderr: what is running, the best so far, how long it may take.

On a terminal a few lines are redrawn; elsewhere one plain line is printed for each thing worth knowing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from archspec.search.eventlog import Event
from archspec.search.records import Run
from archspec.search.watch import how_far

REFRESH_PER_S = 4
SHOWN_JOBS = 8


class Progress:
    """Listens to a driver's events; ``attach`` gives it the run to read from."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._quiet = quiet
        self._live: Live | None = None
        self._run: Run | None = None
        self._detail: dict[str, Mapping[str, Any]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._started = time.monotonic()

    def attach(self, run: Run) -> None:
        """Read from this run, which the driver keeps up to date."""
        self._run = run

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if event["event"] == "progress":
            self._detail[event["key"]] = event
        elif event["event"] == "finished":
            self._detail.pop(event["key"], None)
            self._seconds.setdefault(work(event["stage"]), []).append(event["wall_s"])
        if not self._quiet and self._live is None:
            line = self._line(event)
            if line:
                print(line, file=self._stream, flush=True)

    def _line(self, event: Event) -> str:
        """Return the plain line for an event, or nothing."""
        run, name = self._run, event["event"]
        if run is None:
            return ""
        if name == "started":
            return f"{run.study}: {event['trials']} candidates wanted, {event['workers']} workers on {event['device']}"
        if name == "finished" and not event["ok"]:
            return f"{self._name(event)} {work(event['stage'])}: failed: {event['reason']}"
        if name == "finished":
            return f"{self._name(event)} {work(event['stage'])}: {outcome(event)} ({event['wall_s']:.1f} s)"
        if name == "died":
            return f"{self._name(event)} {work(event['stage'])}: {event['reason']}; trying again"
        if name == "promoted":
            said = []
            for how, numbers in (("by rank", event["rank"]), ("at random", event["random"])):
                if numbers:
                    said.append(f"{how}: {', '.join(run.trials[number].name for number in numbers)}")
            return f"promoted {'; '.join(said) or 'none'}"
        if name == "exhausted":
            return "the space has no more distinct feasible candidates"
        if name == "stopped":
            return f"{run.study}: {event['reason']} after {duration(time.monotonic() - self._started)}"
        return ""

    def _name(self, event: Event) -> str:
        return self._run.trials[event["trial"]].name if self._run is not None else str(event["trial"])

    def _render(self) -> Group:
        run = self._run
        if run is None or not run.study:
            return Group(Text("preparing ..."))
        counts = run.counts
        lines = [
            Text(
                f"{run.study}   {duration(time.monotonic() - self._started)}   "
                f"candidates {counts.accepted}/{run.trials_wanted}   evaluated {counts.evaluated}   "
                f"trained {counts.trained}   failed {counts.failed}   rejected {sum(counts.rejected.values())}   "
                f"duplicates {counts.duplicates}{self._remaining(run)}",
                style="bold",
            )
        ]
        for key, job in list(run.running.items())[:SHOWN_JOBS]:
            far = how_far(self._detail.get(key, {}))
            lines.append(Text(f"  {self._name(job):<28.28} {work(job['stage']):<20.20} {far}"))
        lines.extend(Text(f"  best {line}", style="dim") for line in best_lines(run))
        return Group(*lines)

    def _remaining(self, run: Run) -> str:
        """Estimate the time left from the mean time of each sort of work, over the workers."""
        seconds = 0.0
        for stage, count in self._to_do(run).items():
            known = self._seconds.get(stage)
            if not known:
                return ""
            seconds += count * sum(known) / len(known)
        return f"   about {duration(seconds / max(1, run.workers))} left" if seconds else ""

    def _to_do(self, run: Run) -> dict[str, int]:
        """Return how many evaluations of each sort are still to come."""
        wanted: dict[str, int] = {}
        left = run.trials_wanted
        finishing = run.counts.baselines
        for rung in run.rungs:
            each = ["training_free"] if rung["rung"] == "training_free" else [f"train {name}" for name in run.tasks]
            extra = finishing if rung in (run.rungs[0], run.rungs[-1]) else 0
            for stage in each:
                wanted[stage] = wanted.get(stage, 0) + left + extra
            if rung["promote"] is not None:
                rounds = max(1, -(-run.trials_wanted // max(1, max(run.round_sizes.values(), default=1))))
                count, fraction = rung["promote"].get("count"), rung["promote"].get("fraction")
                left = round(left * fraction) if fraction else min(left, count * rounds)
        done: dict[str, int] = {}
        for trial in run:
            for stage in trial.files:
                done[work(stage)] = done.get(work(stage), 0) + 1
        return {stage: max(0, count - done.get(stage, 0)) for stage, count in wanted.items()}


def work(stage: str) -> str:
    """Return what a stage does, in words: ``training_free``, ``train recall``, ``cost``."""
    return stage.partition("/")[2].replace("/", " ")


def outcome(event: Event) -> str:
    """Return the figures of a finished evaluation, in short."""
    value = event["value"]
    if "scores" in value:
        return ", ".join(f"{name.partition('/')[2]} {entry['mean']:.4g}" for name, entry in value["scores"].items())
    if "cost" in value:
        found = value["cost"]
        return f"step {found['train_step_ms']['median']:.1f} ms, token {found['decode_ms_per_token']['median']:.2f} ms"
    metrics = value.get("metrics", {})
    shown = [f"{name} {entry['mean']:.4g}" for name, entry in metrics.items() if entry["mean"] is not None]
    return ", ".join(shown[-3:])


def best_lines(run: Run) -> list[str]:
    """Return the best trained trial for each objective."""
    lines = []
    for goal in run.objectives:
        known = [(goal.loss(value), trial) for trial in run.trained if (value := trial.value(goal.name)) is not None]
        if known:
            loss, trial = min(known, key=lambda pair: pair[0])
            lines.append(f"{goal.name}: {abs(loss) if goal.direction == 'maximize' else loss:.5g} ({trial.name})")
    return lines


def duration(seconds: float) -> str:
    """Return seconds for people: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
