"""What the driver itself costs: evaluations that take no time, or a simulated one.

    python -m benchmarks.driver --samplers random,evolution --trials 100,1000,10000
    python -m benchmarks.driver --simulate 100,1000 --seconds 120

Overhead is all that a trial costs besides its evaluation: propose, canonicalise, constrain, store, submit, record,
tell. At n trials it is the median over the last tenth of them before n. CPU time is the driver's own; wall time
includes waiting for the disk and for whoever else uses the machine. Stock Optuna stands beside it: ask, the same
parameters, tell, over a journal.

Simulated workers take 1 to 30 s an evaluation, uniformly; utilisation is their busy time over all time, from when the
last of them was first busy to the end.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import optuna

from archspec.search.driver import Driver, Limits
from archspec.search.eventlog import Event
from archspec.search.executors import Outcome, Request
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import load_search_file

SEARCH = """
study: overhead
space:
  model_dim: {choice: [32, 48, 64, 80, 96]}
  blocks:
    main:
      mixer:
        num_heads: 2
        key_dim: {choice: [8, 16, 24]}
        value_dim: {choice: [8, 16, 24]}
        memory: matrix
        bias: {choice: [dot, l2]}
        retention: {choice: [none, {kind: decay, gate: sigmoid}]}
        update: {kind: gradient_descent, step_size: {choice: [sigmoid, softplus]}}
      feed_forward: {kind: swiglu, expansion: {range: [1.0, 4.0]}}
  layout: {choice: [[main], [main, main]]}
context: 64
tasks: {recall: {kind: recall, vocab_size: 16, sequence_length: 16, num_kv_pairs: 2}}
constraints: {non_embedding_parameters: {max: 60_000}}
objectives: [{metric: recall/accuracy, reference: 0.0}, {metric: state_bytes, reference: 10_000}]
ladder: [{rung: short_train, tokens: 64, candidates: 50}]
cost: {measure: false}
"""
NAMES = ("key", "trial", "stage", "rung", "kind", "hash", "spec", "plan")


class Simulated:
    """Workers that answer after a while, or at once, with made-up scores. The time they take is not the driver's."""

    def __init__(self, capacity: int, longest_s: float) -> None:
        self.capacity, self._longest = capacity, longest_s
        self._draw = random.Random(0)
        self._due: list[tuple[float, str]] = []
        self.own_wall, self.own_cpu = 0.0, 0.0
        self.busy: list[tuple[float, float]] = []

    def submit(self, request: Request) -> None:
        """Write the result and keep its key until it is due."""
        wall, cpu = time.perf_counter(), time.process_time()
        took = self._draw.uniform(1.0, self._longest) if self._longest else 0.0
        score = {"recall/accuracy": {"mean": self._draw.random(), "spread": 0.0, "interval": None, "n": 1}}
        score["recall/loss_nats"] = score["recall/accuracy"]
        value = {"scores": score, "validation": score, "learning_rate": 1e-3, "tokens_per_s": 1.0}
        result: dict[str, Any] = {name: request[name] for name in NAMES}
        result |= {"status": "ok", "reason": "", "value": value, "started": time.time(), "wall_s": took}
        (Path(request["results"]) / f"{request['key']}.json").write_text(json.dumps(result))
        heapq.heappush(self._due, (wall + took, request["key"]))
        self.busy.append((wall, wall + took))
        self._spent(wall, cpu)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what is due, waiting for the first."""
        wall, cpu = time.perf_counter(), time.process_time()
        if self._due and self._due[0][0] > wall:
            time.sleep(min(timeout_s, self._due[0][0] - wall))
        found = []
        while self._due and self._due[0][0] <= time.perf_counter():
            found.append(Outcome(heapq.heappop(self._due)[1], "finished"))
        self._spent(wall, cpu)
        return found

    def cancel(self, key: str) -> None:
        """Forget one."""
        self._due = [item for item in self._due if item[1] != key]

    def shutdown(self) -> None:
        """Forget all."""
        self._due.clear()

    def _spent(self, wall: float, cpu: float) -> None:
        self.own_wall += time.perf_counter() - wall
        self.own_cpu += time.process_time() - cpu


def drive(
    sampler: str, trials: int, executor: Simulated, overrides: list[str], timeout_s: float | None = None
) -> list[tuple[float, float]]:
    """Run a search; return driver's (wall, CPU) seconds so far at each accepted proposal."""
    points: list[tuple[float, float]] = []

    def on_event(event: Event) -> None:
        if event["event"] == "proposed":
            points.append((time.perf_counter() - executor.own_wall, time.process_time() - executor.own_cpu))

    with tempfile.TemporaryDirectory(prefix="archspec-driver-") as folder:
        path = Path(folder) / "overhead.yaml"
        path.write_text(SEARCH)
        search = load_search_file(path, [f"sampler={sampler}", *overrides])
        with RunFolder(Path(folder) / "runs" / "overhead", search) as run:
            Driver(search, run, executor, Limits(trials, timeout_s), on_event).execute()
    return points


def stock(trials: int) -> list[tuple[float, float]]:
    """Return the same for Optuna alone, with its random sampler."""
    points = []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="archspec-driver-") as folder:
        backend = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "journal.log"))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.RandomSampler(seed=0),
            directions=["maximize", "minimize"],
        )
        for _ in range(trials):
            trial = study.ask()
            for number in range(7):
                trial.suggest_categorical(f"choice{number}", ["0", "1", "2"])
            trial.suggest_float("expansion", 1.0, 4.0)
            study.tell(trial, [0.0, 0.0])
            points.append((time.perf_counter(), time.process_time()))
    return points


def overhead(name: str, points: list[tuple[float, float]], marks: list[int]) -> None:
    """Print the median cost of a trial before each mark that was reached."""
    for mark in marks:
        if mark <= len(points):
            part = points[mark - max(10, mark // 10) : mark]
            wall, cpu = (
                1000 * median(after[axis] - before[axis] for before, after in pairwise(part)) for axis in (0, 1)
            )
            print(f"| {name} | {mark:,} | {wall:.1f} | {cpu:.1f} |", flush=True)


def utilisation(workers: int, seconds: float) -> None:
    """Print how busy simulated workers were."""
    executor = Simulated(workers, 30.0)
    drive("random", 10**6, executor, ["asynchronous=true"], seconds)
    full = executor.busy[workers - 1][0] if len(executor.busy) >= workers else None
    if full is None:
        print(f"| {workers:,} | never all busy: {len(executor.busy)} evaluations in {seconds:.0f} s | |", flush=True)
        return
    end = max(begun for begun, _ in executor.busy)
    busy = sum(max(0.0, min(end, until) - max(full, begun)) for begun, until in executor.busy)
    filled = full - executor.busy[0][0]
    print(f"| {workers:,} | {busy / (workers * (end - full)):.1%} | {filled:.0f} |", flush=True)


def main() -> int:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default="stock,random,evolution")
    parser.add_argument("--trials", default="100,1000,10000")
    parser.add_argument("--simulate", help="numbers of workers, instead of overheads")
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    if args.simulate:
        print("| workers | utilisation | s until all were busy |\n|---|---|---|")
        for word in args.simulate.split(","):
            utilisation(int(word), args.seconds)
        return 0
    marks = sorted(int(word) for word in args.trials.split(","))
    print("| sampler | at trials | wall ms a trial | CPU ms a trial |\n|---|---|---|---|")
    for name in args.samplers.split(","):
        if name == "stock":
            points = stock(marks[-1])
        else:
            points = drive(name, marks[-1], Simulated(1, 0.0), ["asynchronous=true"])
        overhead(name, points, marks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
