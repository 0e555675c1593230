"""Three arms at equal core-seconds on one real space: random, random with the ladder, the default sampler with it.

    python -m benchmarks.arms --seeds 0-4 --folder DIR [--core-seconds 80] [--arms "random,..."] [--write]
    python -m benchmarks.arms --folder DIR --table

The search, the arms, the budget and the scales stand in ``benchmarks/arms.yaml``. An arm's budget is CPU time of its
evaluations, which run one at a time in this process: what else the machine does takes wall time, not budget. The arm
ends with the evaluation that would exceed it, which does not count. What it returns is the front of what it trained to
the end, by its own scores. These members are then trained again, at the last rung's tokens and on seeds that no arm has
seen, outside the budget; the hypervolume is of these values alone, with the axes scaled as the file says. So arms are
compared by values measured alike, and none gains by having picked the luckiest of many.

Every arm and seed has its folder, in which a run that was cut short goes on, and leaves ``outcome.json`` there. Arms of
one seed that draw at random draw the same. Intervals are Student's t over seeds, 95%.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from archspec import catalog
from archspec.search import pareto
from archspec.search.candidates import read_back
from archspec.search.driver import Driver, Limits
from archspec.search.evaluation import evaluate
from archspec.search.executors import Outcome, Request
from archspec.search.files import write_json
from archspec.search.intervals import t_interval
from archspec.search.records import load_run
from archspec.search.requests import prepare, rechecks_for
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import SearchFile, load_search_file, plain
from archspec.search.trial import Trial
from archspec.yamltext import parse
from benchmarks.recording import current_commit, keep

PLAN = Path(__file__).with_suffix(".yaml")
SPENT, OUTCOME = "spent.jsonl", "outcome.json"
ENDLESS = 1_000_000
WARM_UP = 1_000_000  # a seed that no arm has


class Metered:
    """Evaluates in this process, one at a time, until the budget of CPU time is spent; notes what each took."""

    capacity = 1

    def __init__(self, path: Path, budget_s: float, stop: Callable[[str], Any]) -> None:
        self._path, self._budget, self._stop = path, budget_s, stop
        self._waiting: list[Request] = []
        lines = path.read_text().splitlines() if path.is_file() else []
        self.spent = {entry["key"]: entry["cpu_s"] for entry in map(json.loads, lines)}
        self._check()

    @property
    def within(self) -> set[str]:
        """The evaluations that ended within the budget, in the order of their ends."""
        total, found = 0.0, set()
        for key, seconds in self.spent.items():
            total += seconds
            found |= {key} if total <= self._budget else set()
        return found

    def submit(self, request: Request) -> None:
        """Keep the request for ``wait``."""
        self._waiting.append(request)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Evaluate what was submitted."""
        if not self._waiting:
            time.sleep(timeout_s)
            return []
        request = self._waiting.pop()
        before = time.process_time()
        evaluate(request)
        self.spent[request["key"]] = time.process_time() - before
        with self._path.open("a") as file:
            file.write(json.dumps({"key": request["key"], "cpu_s": self.spent[request["key"]]}) + "\n")
        self._check()
        return [Outcome(request["key"], "finished")]

    def cancel(self, key: str) -> None:
        """Forget one."""
        self._waiting = [request for request in self._waiting if request["key"] != key]

    def shutdown(self) -> None:
        """Forget all."""
        self._waiting.clear()

    def _check(self) -> None:
        if sum(self.spent.values()) >= self._budget:
            self._stop("spent")


@dataclass(frozen=True)
class Axis:
    """How an objective counts: 0 at the reference, 1 at the best, on a linear or a logarithmic scale."""

    objective: str
    reference: float
    best: float
    scale: str

    def place(self, value: float) -> float:
        """Return where a value lies on the axis."""
        if self.scale == "log":
            return math.log(value / self.reference) / math.log(self.best / self.reference)
        return (value - self.reference) / (self.best - self.reference)


def search_of(plan: Mapping[str, Any], arm: str, seed: int) -> SearchFile:
    """Return an arm's search."""
    own = plan["arms"][arm]
    document = {**plan["search"], "seed": seed}
    document |= {"ladder": plan["ladder"]} if own["climbs"] else {}
    document |= {"sampler": own["sampler"]} if own["sampler"] is not None else {}
    return load_search_file(document, folder=PLAN.parent)


def run_arm(plan: Mapping[str, Any], arm: str, seed: int, folder: Path, core_s: float) -> dict[str, Any]:
    """Search until the budget is spent, measure the front again, and return what came of it."""
    search = search_of(plan, arm, seed)
    limits, began, before = Limits(ENDLESS), time.perf_counter(), time.process_time()
    with RunFolder(folder / "run", search) as opened:
        workers = Metered(folder / SPENT, core_s, limits.stop.append)
        known = sum(workers.spent.values())
        Driver(search, opened, workers, limits).execute()
        driver_s = time.process_time() - before - (sum(workers.spent.values()) - known)
        run = load_run(opened.path)
        last = [trial for trial in run.trained if set(keys_of(trial)) <= workers.within]
        losses = [[goal.loss(value) for goal, value in zip(run.objectives, values_of(trial), strict=True)]
                  for trial in last]  # fmt: skip
        members = [last[index] for index in pareto.front(losses)]
        before = time.process_time()
        measured = [rescored(search, opened, trial, plan["rescoring"]["seeds"], folder) for trial in members]
    axes = [Axis(**axis) for axis in plan["axes"]]
    found = {
        "arm": arm,
        "seed": seed,
        "hypervolume": volume(measured, axes),
        "hypervolume_own_scores": volume([values_of(trial) for trial in members], axes),
        "front": [[trial.number, *values] for trial, values in zip(members, measured, strict=True)],
        "own": [values_of(trial) for trial in members],
        "drawn": run.counts.accepted,
        "trained": len(last),
        "core_s": sum(workers.spent[key] for key in workers.within),
        "driver_core_s": driver_s,
        "rescoring_core_s": time.process_time() - before,
        "wall_s": time.perf_counter() - began,
        "load": os.getloadavg()[0],
        "budget_s": core_s,
    }
    write_json(folder / OUTCOME, found)
    return found


def keys_of(trial: Trial) -> Iterator[str]:
    """Yield the keys of a trial's evaluations."""
    for path in trial.files.values():
        yield Path(path).stem


def values_of(trial: Trial) -> list[float]:
    """Return a trained trial's objectives, as the arm saw them."""
    return [float(trial.scores["recall/accuracy"]["mean"]), float(trial.figures["state_bytes@64"])]


def rescored(search: SearchFile, opened: RunFolder, trial: Trial, seeds: int, folder: Path) -> list[float]:
    """Train a member of the front again on fresh seeds; return its objectives."""
    results = folder / "rescored"
    results.mkdir(exist_ok=True)
    candidate = read_back(trial.hash, opened.spec(trial.hash), search)
    if candidate is None:
        raise RuntimeError(f"{opened.path}: the spec of trial {trial.number} is gone")
    (request,) = rechecks_for(prepare(search, opened.cache, results), candidate, trial.number, seeds)
    path = results / f"{request['key']}.json"
    result = json.loads(path.read_bytes()) if path.is_file() else evaluate(request)
    score = result["value"]["scores"]["recall/accuracy"]["mean"] if result["status"] == "ok" else 0.0
    return [float(score), values_of(trial)[1]]


def volume(values: Sequence[Sequence[float]], axes: Sequence[Axis]) -> float:
    """Return the hypervolume on the scaled axes, at most 1 unless something is better than the best."""
    losses = [[-axis.place(value) for axis, value in zip(axes, row, strict=True)] for row in values]
    return pareto.hypervolume(losses, [0.0] * len(axes))


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Return what the folder holds."""
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob(f"*/{OUTCOME}"))]


def table(found: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[str]:
    """Return the results as Markdown: the arms, and the differences between them over the seeds that both have."""
    by_arm = {arm: {entry["seed"]: entry for entry in found if entry["arm"] == arm} for arm in arms}
    lines = [
        "| arm | seeds | hypervolume, re-scored: mean [95% interval] | of its own scores | front | drawn | "
        "trained to the end | workers' core s | driver's core s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, entries in by_arm.items():
        if entries:
            rows = list(entries.values())
            mean = [
                f"{fmean(row[name] for row in rows):.1f}" for name in ("drawn", "trained", "core_s", "driver_core_s")
            ]
            members = fmean(len(row["front"]) for row in rows)
            own = fmean(row["hypervolume_own_scores"] for row in rows)
            value = with_interval([row["hypervolume"] for row in rows])
            lines.append(f"| {arm} | {len(rows)} | {value} | {own:.3f} | {members:.1f} | {' | '.join(mean)} |")
    lines += ["", "| difference, seed by seed | seeds | mean [95% interval] |", "|---|---|---|"]
    for first, second in combinations(arms, 2):
        both = sorted(by_arm[first].keys() & by_arm[second].keys())
        if both:
            apart = [by_arm[second][seed]["hypervolume"] - by_arm[first][seed]["hypervolume"] for seed in both]
            lines.append(f"| {second} minus {first} | {len(both)} | {with_interval(apart, sign='+')} |")
    lines += ["", "| seed | " + " | ".join(arms) + " | load |", "|---" * (len(arms) + 2) + "|"]
    for seed in sorted({entry["seed"] for entry in found}):
        measured = [by_arm[arm].get(seed) for arm in arms]
        cells = ["-" if row is None else f"{row['hypervolume']:.3f}" for row in measured]
        load = fmean(row["load"] for row in measured if row is not None)
        lines.append(f"| {seed} | {' | '.join(cells)} | {load:.1f} |")
    return lines


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """Return a mean with its interval in words."""
    interval = t_interval(values)
    shown = "no interval" if interval is None else f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{fmean(values):{sign}.3f} {shown}"


def document(found: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """Return the whole record."""
    budgets = sorted({entry["budget_s"] for entry in found})
    machine = f"commit {current_commit()}, Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        "# Three arms at equal core-seconds",
        "",
        f"`python -m benchmarks.arms`, {machine}, {os.cpu_count()} cores; {', '.join(f'{b:g}' for b in budgets)} core-"
        "seconds of evaluations an arm and seed. Space, ladder, reference point and scales: `benchmarks/arms.yaml`.",
        "",
    ]
    return "\n".join([*lines, *table(found, arms), ""])


def seeds_in(text: str) -> list[int]:
    """Read ``0-4`` or ``0,2,5``."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(word) for word in text.split(",")]


def main() -> None:
    """Run what is missing, seed by seed, and print the table as it grows."""
    plan = plain(parse(PLAN.read_bytes(), str(PLAN)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=seeds_in, default=[0], help="0-4, or 0,2,5")
    parser.add_argument("--arms", default=",".join(plan["arms"]), help="some of the file's")
    parser.add_argument("--core-seconds", type=float, default=plan["core_seconds"], help="an arm's budget")
    parser.add_argument("--until", type=float, default=math.inf, metavar="S", help="begin none after so many seconds")
    parser.add_argument("--table", action="store_true", help="show what the folder holds, and end")
    parser.add_argument("--write", action="store_true", help="keep the table under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    catalog.load_search()
    with TemporaryDirectory() as temporary:  # what only the first evaluation of a process takes is nobody's
        if not args.table:
            run_arm(plan, next(iter(plan["arms"])), WARM_UP, Path(temporary), 0.1)
    began, arms = time.monotonic(), args.arms.split(",")
    for seed in [] if args.table else args.seeds:
        for arm in arms:
            folder = args.folder / re.sub(r"\W+", "-", f"{arm} {seed}")
            if (folder / OUTCOME).is_file() or time.monotonic() - began > args.until:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            found = run_arm(plan, arm, seed, folder, args.core_seconds)
            kept = ("hypervolume", "hypervolume_own_scores", "drawn", "trained", "core_s", "driver_core_s",
                    "rescoring_core_s", "wall_s")  # fmt: skip
            print(f"{arm}, seed {seed}: {', '.join(f'{name} {found[name]:.3g}' for name in kept)}", flush=True)
    text = document(outcomes(args.folder), list(plan["arms"]))
    print(text)
    if args.write:
        keep("arms", text)


if __name__ == "__main__":
    main()
