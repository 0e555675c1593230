"""What the driver itself costs: evaluations that take no time, or a simulated one.

    python -m benchmarks.driver --samplers random,evolution --trials 100,1000,10000
    python -m benchmarks.driver --simulate 100,1000 --seconds 120

Overhead is all that a trial costs besides its evaluation: propose, canonicalise, constrain, store, submit, record,
tell, and the draws that were rejected before it. At n trials it is the median over the last tenth of them before n,
with the range that two thirds of those trials lie in, and their mean. CPU time is the driver's own; wall time includes
waiting for the disk and for whoever else uses the machine, as the load average says. Stock Optuna stands beside it
under ``stock``, ``stock-tpe``, ...: ask, eight parameters like the search's, tell, over a journal, and nothing else.

Simulated workers take 1 to 30 s an evaluation, uniformly, and live in a process of their own; utilisation is their
busy time over all time, from when the last of them was first busy to the end.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles

import optuna

from archspec.search.driver import Driver, Limits
from archspec.search.eventlog import Event
from archspec.search.executors import Outcome, Request
from archspec.search.rundir import RunFolder, available_cores
from archspec.search.searchfile import load_search_file
from benchmarks.instant import Instant, write_result
from benchmarks.recording import current_commit

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


def _guessing() -> Instant:
    """Return a worker that answers at once, whatever it is asked."""
    draw = random.Random(0)
    return Instant(lambda request: draw.random())


class Fleet:
    """Workers whose evaluations take 1 s to ``longest_s``, uniformly; one process of their own stands for all."""

    def __init__(self, capacity: int, longest_s: float) -> None:
        self.capacity, self._longest = capacity, longest_s
        self._draw = random.Random(0)
        self.busy: list[tuple[float, float]] = []
        self.own_wall, self.own_cpu = 0.0, 0.0
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_evaluate, args=(theirs, self._connection), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, request: Request) -> None:
        """Hand an evaluation over."""
        began, took = time.perf_counter(), self._draw.uniform(1.0, self._longest)
        self._connection.send((began + took, took, self._draw.random(), dict(request)))
        self.busy.append((began, began + took))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what is done, waiting for the first."""
        found: list[Outcome] = []
        while self._connection.poll(0.0 if found else timeout_s):
            found.append(Outcome(self._connection.recv(), "finished"))
        return found

    def cancel(self, key: str) -> None:
        """There is none to cancel: no evaluation fails."""

    def shutdown(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _evaluate(connection: Connection, drivers: Connection) -> None:
    """Answer each evaluation when it is due, until the driver is gone."""
    drivers.close()  # this process has a copy, which would keep it open
    due: list[tuple[float, float, float, Request]] = []
    while True:
        try:
            if connection.poll(max(0.0, due[0][0] - time.perf_counter()) if due else None):
                heapq.heappush(due, connection.recv())
            while due and due[0][0] <= time.perf_counter():
                _, took, quality, request = heapq.heappop(due)
                write_result(request, quality, took)
                connection.send(request["key"])
        except (EOFError, OSError):
            return


def drive(
    sampler: str, trials: int, executor: Instant | Fleet, overrides: list[str], timeout_s: float | None = None
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


STOCK: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "stock": lambda: optuna.samplers.RandomSampler(seed=0),
    "stock-qmc": lambda: optuna.samplers.QMCSampler(seed=0, warn_independent_sampling=False),
    "stock-tpe": lambda: optuna.samplers.TPESampler(seed=0),
    "stock-nsga2": lambda: optuna.samplers.NSGAIISampler(seed=0),
    "stock-gp": lambda: optuna.samplers.GPSampler(seed=0),
}


def stock(name: str, trials: int) -> list[tuple[float, float]]:
    """Return the same for Optuna alone."""
    points, draw = [], random.Random(0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with tempfile.TemporaryDirectory(prefix="archspec-driver-") as folder:
        backend = optuna.storages.journal.JournalFileBackend(str(Path(folder) / "journal.log"))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            sampler=STOCK[name](),
            directions=["maximize", "minimize"],
        )
        for _ in range(trials):
            trial = study.ask()
            for number in range(7):
                trial.suggest_categorical(f"choice{number}", ["0", "1", "2"])
            trial.suggest_float("expansion", 1.0, 4.0)
            study.tell(trial, [draw.random(), draw.random()])
            points.append((time.perf_counter(), time.process_time()))
    return points


def overhead(name: str, points: list[tuple[float, float]], marks: list[int]) -> None:
    """Print what a trial costs, over the last tenth of the trials before each mark that was reached."""
    for mark in marks:
        if mark <= len(points):
            part = points[mark - max(10, mark // 10) : mark]
            cells = []
            for axis in (1, 0):
                low, _, middle, _, high = quantiles(
                    (1000 * (after[axis] - before[axis]) for before, after in pairwise(part)), n=6, method="inclusive"
                )
                mean = 1000 * (part[-1][axis] - part[0][axis]) / (len(part) - 1)
                cells.append(f"{middle:.1f} | {low:.1f} to {high:.1f} | {mean:.1f}")
            print(f"| {name} | {mark:,} | {' | '.join(cells)} | {os.getloadavg()[0]:.1f} |", flush=True)


def utilisation(workers: int, seconds: float, sampler: str) -> None:
    """Print how busy simulated workers were."""
    fleet, cpu = Fleet(workers, 30.0), time.process_time()
    drive(sampler, 10**6, fleet, ["asynchronous=true"], seconds)
    cpu = 1000 * (time.process_time() - cpu) / len(fleet.busy)
    load = os.getloadavg()[0]
    if len(fleet.busy) < workers:
        print(f"| {workers:,} | never all busy | | {len(fleet.busy)} | {cpu:.1f} | {load:.1f} |", flush=True)
        return
    full, end = fleet.busy[workers - 1][0], max(begun for begun, _ in fleet.busy)
    busy = sum(max(0.0, min(end, until) - max(full, begun)) for begun, until in fleet.busy)
    cells = [f"{busy / (workers * (end - full)):.1%}", f"{full - fleet.busy[0][0]:.0f}", f"{len(fleet.busy):,}"]
    print(f"| {workers:,} | {' | '.join(cells)} | {cpu:.1f} | {load:.1f} |", flush=True)


def main() -> int:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default="stock,random,evolution")
    parser.add_argument("--trials", default="100,1000,10000")
    parser.add_argument("--simulate", help="numbers of workers, instead of overheads")
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    print(f"`python -m benchmarks.driver {' '.join(sys.argv[1:])}`, commit {current_commit()}, ", end="")
    print(f"Python {platform.python_version()}, optuna {version('optuna')}, {available_cores()} cores", end="")
    print(f" (load {os.getloadavg()[0]:.1f} at the start)\n")
    if args.simulate:
        print("| workers | utilisation | s until all were busy | evaluations | driver's CPU ms each | load |")
        print("|---|---|---|---|---|---|")
        for word in args.simulate.split(","):
            utilisation(int(word), args.seconds, "random")
        return 0
    marks = sorted(int(word) for word in args.trials.split(","))
    print("| sampler | at trials | CPU ms a trial | two thirds lie in | mean | wall ms | two thirds | mean | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.samplers.split(","):
        points = stock(name, marks[-1]) if name in STOCK else drive(name, marks[-1], _guessing(), ["asynchronous=true"])
        overhead(name, points, marks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
