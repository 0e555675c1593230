"""Two workers against one: the same search by ``--workers 1`` and ``--workers 2``, in turn, with real evaluations.

    python -m benchmarks.scaling --trials 40 --repeats 3 --write

The search is the one of ``benchmarks/arms.yaml`` with the random sampler and one rung, so that every run trains the
same architectures, whoever gets which. Every run is a fresh process and a fresh folder; workers have one thread each.
Timed are the whole command, imports included, and the search itself, from the ``started`` event of its log to the
``stopped`` one. On a machine that does other things meanwhile the ratio says little: the load is stated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from archspec.search.eventlog import EVENTS, read_events
from archspec.search.rundir import available_cores
from archspec.search.searchfile import plain
from archspec.yamltext import parse
from benchmarks.arms import PLAN
from benchmarks.recording import current_commit, keep

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Timing:
    """One run.

    Fields:
        workers, command_s, search_s: how many, and how long the command and the search in it took.
        evaluations_s: what its evaluations took, added up: more than with one worker where workers are in each
            other's way.
        cpu_s: CPU time of driver and workers.
        trials: architectures that were trained, by hash: the same in every run.
    """

    workers: int
    command_s: float
    search_s: float
    evaluations_s: float
    cpu_s: float
    load: float
    trials: tuple[str, ...]


def run(workers: int, trials: int, tokens: int) -> Timing:
    """Search once."""
    search = plain(parse(PLAN.read_bytes(), str(PLAN)))["search"]
    search |= {"sampler": "random", "ladder": [{"rung": "short_train", "tokens": tokens, "candidates": trials}]}
    with tempfile.TemporaryDirectory(prefix="archspec-scaling-") as folder:
        (Path(folder) / "search.yaml").write_text(json.dumps(search))
        command = [sys.executable, "-m", "archspec", "search", "search.yaml", "--quiet"]
        command += ["--workers", str(workers), "--trials", str(trials)]
        roots = os.pathsep.join(path or os.getcwd() for path in sys.path)
        before, began = _children_cpu_s(), time.perf_counter()
        subprocess.run(command, cwd=folder, env={**os.environ, **ONE_THREAD, "PYTHONPATH": roots}, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        took, cpu = time.perf_counter() - began, _children_cpu_s() - before
        events = list(read_events(Path(folder) / "runs" / "arms" / EVENTS))
    times = {event["event"]: event["time"] for event in events if event["event"] in ("started", "stopped")}
    finished = [event for event in events if event["event"] == "finished"]
    hashes = tuple(sorted(event["hash"] for event in events if event["event"] == "proposed"))
    spent = sum(event["wall_s"] for event in finished)
    return Timing(workers, took, times["stopped"] - times["started"], spent, cpu, os.getloadavg()[0], hashes)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: Sequence[Timing], trials: int, tokens: int) -> str:
    """Return the results as Markdown."""
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    lines = [
        "# Two workers against one",
        "",
        f"`python -m benchmarks.scaling --trials {trials} --tokens {tokens} --repeats {len(found) // 2}`, commit "
        f"{current_commit()}, {versions}, {available_cores()} cores; one thread a worker, runs in turn.",
        "",
        "| workers | command s | search s | evaluations, added up, s | CPU s | load at the end |",
        "|---|---|---|---|---|---|",
    ]
    for item in found:
        cells = (item.command_s, item.search_s, item.evaluations_s, item.cpu_s, item.load)
        lines.append(f"| {item.workers} | {' | '.join(f'{value:.1f}' for value in cells)} |")
    lines.append("")
    for name in ("search_s", "command_s"):
        one, two = ([getattr(item, name) for item in found if item.workers == count] for count in (1, 2))
        pairs = ", ".join(f"{first / second:.2f}" for first, second in zip(one, two, strict=True))
        what = "the search" if name == "search_s" else "the whole command"
        lines.append(f"Speed-up of {what}: {median(one) / median(two):.2f} by medians; pair by pair {pairs}.  ")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run in turn, print, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=120_000, help="of an evaluation: 120,000 take a core about 3 s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the table under benchmarks/results/")
    args = parser.parse_args()
    found = []
    for repeat in range(args.repeats):
        for workers in (1, 2) if repeat % 2 == 0 else (2, 1):
            found.append(run(workers, args.trials, args.tokens))
            print(f"{workers} workers: {found[-1].search_s:.1f} s, load {found[-1].load:.1f}", flush=True)
    if len({item.trials for item in found}) != 1:
        raise RuntimeError("the runs did not train the same architectures, and cannot be compared")
    text = table(found, args.trials, args.tokens)
    print(text)
    if args.write:
        keep("scaling", text)


if __name__ == "__main__":
    main()
