"""Kills at random moments: is every evaluation that was asked for completed, and none lost or repeated?

    python -m benchmarks.kills --kills 100 [--storage URL] [--fork] [--seed 0] [--folder DIR]

One search of cheap evaluations is started again and again by the same command. Each time, after a random delay from the
start of the process or of its work on, its driver or one of its workers gets SIGKILL. After the last kill the search
runs to its end. Then the event log and the result files are compared:

    requested   evaluations that were submitted at least once
    completed   those with exactly one ``finished`` event and a result file
    lost        results on disk at some kill that are gone or other bytes at the end
    repeated    evaluations submitted again after they had finished, or finished twice
    resume      from the start of a process to its ``started`` event, and to the first result it adds
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from archspec import commands
from archspec.search.eventlog import Event, read_events

FORKED = ("search", "kills.yaml", "--executor", "inprocess", "--quiet")

SEARCH = """
study: kills
seed: 0
space:
  model_dim: {choice: [16, 24, 32]}
  blocks:
    main:
      mixer:
        {num_heads: 2, key_dim: 8, value_dim: 8, memory: matrix, bias: {choice: [dot, l2]}, update: gradient_descent}
      feed_forward: {kind: swiglu, expansion: {range: [1.0, 4.0]}}
  layout: [main]
context: 64
tasks: {recall: {kind: recall, vocab_size: 16, sequence_length: 16, num_kv_pairs: 2}}
training: {learning_rates: [1e-3], batch_size: 4, eval_tokens: 64}
objectives: [{metric: recall/accuracy, reference: 0.0}, {metric: state_bytes, reference: 10_000}]
ladder:
  - rung: training_free
    candidates: 24
    init_seeds: 1
    metrics: [state_size]
    promote: {count: 8, by: [state_size]}
  - {rung: short_train, tokens: 128}
cost: {measure: false}
keep_weights: false
sampler: random
"""


@dataclass
class Tally:
    """What was seen while killing."""

    drivers: int = 0
    workers: int = 0
    starts: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


class Process(Protocol):
    """What is asked of a driver's process."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


class Forked:
    """A driver as a child of this process, which has loaded everything: it starts at once."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.chdir(folder)
            output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = commands.main(arguments)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self) -> int:
        """Wait for its end."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


class Search:
    """One search in a folder, started and killed."""

    def __init__(self, folder: Path, arguments: list[str], *, fork: bool) -> None:
        self.folder, self._arguments, self._fork = folder, arguments, fork
        self.run = folder / "runs" / "kills"
        (folder / "kills.yaml").write_text(SEARCH)

    def start(self, trials: int) -> Process:
        """Start a driver."""
        if self._fork:
            return Forked(self.folder, [*FORKED, "--trials", str(trials), *self._arguments])
        command = [sys.executable, "-m", "archspec", "search", "kills.yaml", "--workers", "2", "--quiet"]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                [*command, "--trials", str(trials), *self._arguments], cwd=self.folder, stdout=output, stderr=output
            )

    def events(self) -> list[Event]:
        """Return the log so far."""
        path = self.run / "events.jsonl"
        return list(read_events(path)) if path.is_file() else []

    def size(self) -> int:
        """Return the bytes of the log so far."""
        path = self.run / "events.jsonl"
        return path.stat().st_size if path.is_file() else 0

    def results(self) -> dict[str, str]:
        """Return a hash of every result on disk."""
        files = (self.run / "results").glob("*.json")
        return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_everything() -> None:
    """Import what a driver imports, on one thread, so that its copies need not."""
    import torch

    from archspec import catalog
    from archspec.search import entry, evaluation, report

    torch.set_num_threads(1)
    catalog.load_search()
    assert entry.run
    assert evaluation.evaluate
    assert report.write_report


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()] if found.is_file() else []


def kill(search: Search, draw: random.Random, tally: Tally, wanted: int, longest_s: float) -> None:
    """Start a driver and kill workers until the draw falls on the driver itself, or the kills are done."""
    known, began = len(search.events()), time.time()
    driver = search.start(1_000_000)
    size = search.size()
    if draw.random() < 0.75:  # the others may fall into the start itself
        while search.size() == size and driver.poll() is None:
            time.sleep(0.01)
    while True:
        time.sleep(draw.uniform(0.0, longest_s))
        if driver.poll() is not None:
            raise RuntimeError(f"the driver ended by itself: {(search.folder / 'output').read_text()[-2000:]}")
        workers = children(driver.pid)
        on_driver = not workers or draw.random() < 0.5 or tally.drivers + tally.workers + 1 >= wanted
        os.kill(driver.pid if on_driver else draw.choice(workers), signal.SIGKILL)
        tally.drivers += on_driver
        tally.workers += not on_driver
        if on_driver:
            driver.wait()
            break
    new = search.events()[known:]
    tally.starts += [event["time"] - began for event in new if event["event"] == "started"][:1]
    tally.firsts += [event["time"] - began for event in new if event["event"] == "finished"][:1]
    note(search, tally)


def note(search: Search, tally: Tally) -> None:
    """Compare the results on disk with those seen before."""
    results = search.results()
    tally.changed |= {key for key, found in tally.results.items() if results.get(key) != found}
    tally.results |= results


def report(search: Search, tally: Tally, kills: int, seconds: float) -> bool:
    """Print what came of it; return whether nothing was lost or repeated."""
    finished: Counter[str] = Counter()
    requested, repeated, failed = set(), set(), 0
    for event in search.events():
        if event["event"] == "submitted":
            requested.add(event["key"])
            repeated |= {event["key"]} & finished.keys()
        if event["event"] == "finished":
            finished[event["key"]] += 1
            failed += not event["ok"]
    repeated |= {key for key, count in finished.items() if count > 1}
    completed = {key for key in finished if key in tally.results}
    print(f"kills          {kills}: {tally.drivers} of drivers, {tally.workers} of workers, in {seconds:.0f} s")
    print(f"requested      {len(requested | finished.keys())}")
    print(f"completed      {len(completed)}, {failed} of them recorded as failed")
    print(f"lost           {len(tally.changed)}")
    print(f"repeated       {len(repeated)}")
    for name, values in (("to 'started'", tally.starts), ("to a result", tally.firsts)):
        if values:
            print(f"resume         {name}: median {median(values):.1f} s, longest {max(values):.1f} s, n {len(values)}")
    return completed == requested | finished.keys() and not tally.changed and not repeated


def main() -> int:
    """Kill, finish, and report; exit code 1 if anything was lost or repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=8.0, help="longest time between two kills, seconds")
    parser.add_argument("--limit", type=float, default=1e9, help="no further kill after so many seconds")
    parser.add_argument("--storage", help="a database's URL for the study, instead of the journal")
    parser.add_argument("--fork", action="store_true", help="evaluate in the driver, forked from a loaded process")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="archspec-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.fork:
        load_everything()
    search = Search(folder, ["--storage", args.storage] if args.storage else [], fork=args.fork)
    draw, tally, began = random.Random(args.seed), Tally(), time.monotonic()
    while tally.drivers + tally.workers < args.kills and time.monotonic() - began < args.limit:
        kill(search, draw, tally, args.kills, args.longest)
    rounds = sum(event["size"] for event in search.events() if event["event"] == "round")
    driver = search.start(max(rounds, 1))
    if driver.wait() != 0:
        raise RuntimeError(f"the last start failed: {(folder / 'output').read_text()[-2000:]}")
    note(search, tally)
    fine = report(search, tally, tally.drivers + tally.workers, time.monotonic() - began)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
