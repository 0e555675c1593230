"""Kills at random moments: is every evaluation that was asked for completed, and none lost or repeated?

    python -m benchmarks.kills --kills 100 [--storage postgresql] [--fork] [--executor inprocess] [--folder DIR]
    python -m benchmarks.kills --table DIR...

One search of cheap evaluations is started again and again by the same command. Each time, after a random delay from the
start of the process, of its work, or of its first result on, its driver or one of its workers gets SIGKILL. After the
last kill the search runs to its end, of at least ``--evaluations``. The same command with the same ``--folder``
continues a benchmark that was itself cut short. Then the event log and the result files are compared:

    requested   evaluations that were submitted at least once
    completed   those with exactly one ``finished`` event and a result file
    failed      those recorded as failed: nothing is wrong with any of them
    lost        results on disk at some kill that are gone or other bytes at the end
    repeated    evaluations submitted again after they had finished, or finished twice
    resume      from the start of a process to its ``started`` event, and to the first result it adds
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from archspec import commands
from archspec.search.eventlog import Event, read_events
from archspec.search.files import write_json
from benchmarks.postgresql import server

ROUND = 32  # evaluations in a round of the search below: 24 candidates, 8 of them trained
PATIENCE_S = 180.0  # a driver that does nothing for so long is broken

SEARCH = """
study: kills
seed: 0
space:
  model_dim: {range: [16, 64], step: 8}
  blocks:
    main:
      mixer:
        num_heads: 2
        key_dim: {choice: [4, 8, 12, 16]}
        value_dim: {choice: [4, 8, 12, 16]}
        memory: matrix
        bias: {choice: [dot, l2]}
        update: gradient_descent
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
    """What was seen while killing; kept in a file, so that a benchmark that was cut short goes on."""

    drivers: int = 0
    workers: int = 0
    seconds: float = 0.0
    starts: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """All of them."""
        return self.drivers + self.workers

    @classmethod
    def read(cls, folder: Path) -> Tally:
        """Return the tally of a folder, a new one if there is none."""
        path = folder / "tally.json"
        return cls(**json.loads(path.read_bytes())) if path.is_file() else cls()

    def write(self, folder: Path) -> None:
        """Keep it."""
        write_json(folder / "tally.json", vars(self))


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

    def __init__(self, folder: Path, executor: str, storage: str | None, *, fork: bool) -> None:
        workers = ["--workers", "2"] if executor == "local" else []
        place = ["--storage", storage] if storage is not None else []
        self._arguments = ["search", "kills.yaml", "--quiet", "--executor", executor, *workers, *place]
        self.folder, self._fork = folder, fork
        self.run = folder / "runs" / "kills"
        (folder / "kills.yaml").write_text(SEARCH)

    def start(self, trials: int) -> Process:
        """Start a driver."""
        arguments = [*self._arguments, "--trials", str(trials)]
        if self._fork:
            return Forked(self.folder, arguments)
        command = [sys.executable, "-m", "archspec", *arguments]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output)

    def end_leftover(self) -> None:
        """End the driver that a benchmark cut short left behind: the one that holds the run's lock."""
        path = self.run / "lock"
        if not path.is_file():
            return
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(int(lock.read().split()[1]), signal.SIGKILL)
                fcntl.flock(lock, fcntl.LOCK_EX)

    def events(self) -> list[Event]:
        """Return the log so far."""
        path = self.run / "events.jsonl"
        return list(read_events(path)) if path.is_file() else []

    def so_far(self) -> tuple[int, int]:
        """Return the bytes of the log so far, and how many evaluations it says are finished."""
        path = self.run / "events.jsonl"
        text = path.read_bytes() if path.is_file() else b""
        return len(text), text.count(b'{"event":"finished"')

    def results(self) -> dict[str, str]:
        """Return a hash of every result on disk."""
        files = (self.run / "results").glob("*.json")
        return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_everything() -> None:
    """Import what a driver imports, on one thread, so that its copies need not."""
    import torch

    from archspec import catalog

    for name in ("entry", "evaluation", "report"):
        importlib.import_module(f"archspec.search.{name}")
    torch.set_num_threads(1)
    catalog.load_search()


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in found.split()]


def pause(search: Search, driver: Process, draw: random.Random, longest_s: float) -> None:
    """Let a random time pass: from now on, from the driver's next event on, or from its next result on."""
    moment, before, stop = draw.random(), search.so_far(), time.monotonic() + PATIENCE_S
    waits_for = None if moment < 0.2 else 0 if moment < 0.4 else 1
    while waits_for is not None and search.so_far()[waits_for] == before[waits_for]:
        if driver.poll() is not None or time.monotonic() > stop:
            break
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, longest_s))
    if driver.poll() is not None or time.monotonic() > stop + longest_s:
        raise RuntimeError(f"the driver ended or does nothing: {(search.folder / 'output').read_text()[-2000:]}")


def kill(search: Search, draw: random.Random, tally: Tally, args: argparse.Namespace) -> None:
    """Start a driver and kill workers until the draw falls on the driver itself, or the kills are done."""
    known, began = len(search.events()), time.time()
    driver = search.start(1_000_000)
    while True:
        pause(search, driver, draw, args.longest)
        workers = children(driver.pid)
        on_driver = not workers or draw.random() < args.drivers or tally.kills + 1 >= args.kills
        os.kill(driver.pid if on_driver else draw.choice(workers), signal.SIGKILL)
        tally.drivers += on_driver
        tally.workers += not on_driver
        if on_driver:
            driver.wait()
            break
    new = search.events()[known:]
    tally.starts += [event["time"] - began for event in new if event["event"] == "started"][:1]
    tally.firsts += [event["time"] - began for event in new if event["event"] == "finished"][:1]
    tally.seconds += time.time() - began
    note(search, tally)
    tally.write(search.folder)


def note(search: Search, tally: Tally) -> None:
    """Compare the results on disk with those seen before."""
    results = search.results()
    tally.changed += [key for key, found in tally.results.items() if results.get(key) != found]
    tally.results |= results


def outcome(search: Search, tally: Tally) -> dict[str, Any]:
    """Return what came of it."""
    finished: Counter[str] = Counter()
    requested, repeated, failed = set(), set(), []
    for event in search.events():
        if event["event"] == "submitted":
            requested.add(event["key"])
            repeated |= {event["key"]} & finished.keys()
        if event["event"] == "finished":
            finished[event["key"]] += 1
            failed += [] if event["ok"] else [event["reason"]]
    repeated |= {key for key, count in finished.items() if count > 1}
    return {
        "kills": tally.kills,
        "drivers": tally.drivers,
        "workers": tally.workers,
        "requested": len(requested | finished.keys()),
        "completed": sum(key in tally.results for key in finished),
        "failed": failed,
        "lost": len(set(tally.changed)),
        "repeated": len(repeated),
        "starts": tally.starts,
        "firsts": tally.firsts,
        "seconds": tally.seconds,
    }


def is_fine(found: Mapping[str, Any]) -> bool:
    """Say whether everything asked for was completed once, and nothing was lost, repeated or held against it."""
    wrong = found["failed"] or found["lost"] or found["repeated"]
    return found["requested"] == found["completed"] and not wrong


def report(found: Mapping[str, Any]) -> None:
    """Print it."""
    print(f"kills          {found['kills']}: {found['drivers']} of drivers, {found['workers']} of workers, ", end="")
    print(f"in {found['seconds']:.0f} s")
    print(f"requested      {found['requested']}")
    print(f"completed      {found['completed']}, {len(found['failed'])} of them recorded as failed")
    for reason, count in Counter(found["failed"]).items():
        print(f"  failed       {count}: {reason}")
    print(f"lost           {found['lost']}")
    print(f"repeated       {found['repeated']}")
    for name, values in (("to 'started'", found["starts"]), ("to a result", found["firsts"])):
        if values:
            print(f"resume         {name}: median {median(values):.1f} s, longest {max(values):.1f} s, n {len(values)}")


def table(folders: Sequence[Path]) -> None:
    """Print the outcomes of several folders as a table, with their sums."""
    names = ("kills", "drivers", "workers", "requested", "completed", "failed", "lost", "repeated")
    print(f"| command | {' | '.join(names)} | to `started`, median (longest) s | to a result |")
    print("|---" * (len(names) + 3) + "|")
    sums: Counter[str] = Counter()
    for folder in folders:
        found = json.loads((folder / "outcome.json").read_bytes())
        found["failed"] = len(found["failed"])
        sums.update({name: found[name] for name in names})
        times = [f"{median(found[each]):.1f} ({max(found[each]):.1f})" for each in ("starts", "firsts")]
        print(f"| `{found['command']}` | {' | '.join(str(found[name]) for name in names)} | {' | '.join(times)} |")
    print(f"| in all | {' | '.join(str(sums[name]) for name in names)} | | |")


def carry_out(args: argparse.Namespace, folder: Path, url: str | None) -> int:
    """Kill, finish, and report; return the exit code."""
    if args.fork:
        load_everything()
    search = Search(folder, args.executor, url, fork=args.fork)
    search.end_leftover()
    tally = Tally.read(folder)
    draw, before = random.Random(f"{args.seed}/{tally.kills}"), tally.seconds
    while tally.kills < args.kills and tally.seconds - before < args.limit:
        kill(search, draw, tally, args)
    rounds = sum(event["size"] for event in search.events() if event["event"] == "round")
    driver = search.start(max(rounds, 24 * -(-args.evaluations // ROUND)))
    if driver.wait() != 0:
        raise RuntimeError(f"the last start failed: {(folder / 'output').read_text()[-2000:]}")
    note(search, tally)
    found = outcome(search, tally) | {"command": command_of(args)}
    write_json(folder / "outcome.json", found)
    report(found)
    return 0 if is_fine(found) else 1


def command_of(args: argparse.Namespace) -> str:
    """Return the options that say what was run."""
    words = ["--executor", args.executor, *(["--fork"] if args.fork else [])]
    return " ".join([*words, *(["--storage", args.storage.partition(":")[0]] if args.storage else [])])


def main() -> int:
    """Kill, finish, and report; exit code 1 if anything was lost, repeated or recorded as failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=100, help="evaluations to finish in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drivers", type=float, default=0.4, help="share of the kills that fall on drivers")
    parser.add_argument("--longest", type=float, default=4.0, help="longest delay of a kill, seconds")
    parser.add_argument("--limit", type=float, default=1e9, help="no further kill after so many seconds")
    parser.add_argument("--storage", metavar="URL", help="a database for the study; postgresql: a server of its own")
    parser.add_argument("--executor", choices=["local", "inprocess"], default="local")
    parser.add_argument("--fork", action="store_true", help="fork drivers from a loaded process: they start at once")
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="DIR", help="print what came of these folders, and end"
    )
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not without ending the server
    folder = args.folder or Path(tempfile.mkdtemp(prefix="archspec-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    own = args.storage == "postgresql"
    with server(folder / "postgresql") if own else nullcontext(args.storage) as url:
        return carry_out(args, folder, url)


if __name__ == "__main__":
    sys.exit(main())
