"""Duplicate evaluations in 1,000 trials of a small space, ours beside stock Optuna's.

    python -m benchmarks.duplicates --trials 1000 --write

Every sampler of the search draws from one discrete space with conditional parameters, and so do Optuna's own TPE and
NSGA-II, with their defaults, through ``study.ask`` and ``study.tell``. What they drew is told a made-up quality, the
same for both, that has something to be found: it grows with size, depends on the choices, and differs a little between
architectures. An evaluation is a duplicate if an architecture of the same canonical hash was evaluated before. Of the
search this is read from its event log and its results: evaluations started, finished, and their architectures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna

from archspec.search.candidates import Rejection, admit, named
from archspec.search.driver import Driver, Limits
from archspec.search.eventlog import EVENTS, read_events
from archspec.search.executors import Request
from archspec.search.points import express, points
from archspec.search.records import load_run
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import SearchFile, load_search_file
from archspec.search.study import Asked
from benchmarks.instant import Instant
from benchmarks.recording import current_commit, keep

SEARCH = """
study: duplicates
space:
  model_dim: {range: [32, 72], step: 8}
  blocks:
    main:
      mixer:
        num_heads: 2
        key_dim: {choice: [8, 16, 24]}
        value_dim: {choice: [8, 16, 24]}
        memory: matrix
        bias: {choice: [dot, l2, {kind: huber, threshold: {choice: [0.5, 1.0]}}]}
        retention: {choice: [none, {kind: decay, gate: {choice: [sigmoid, gdn]}}]}
        update: {kind: gradient_descent, step_size: {choice: [sigmoid, softplus]}}
      feed_forward: {kind: swiglu, expansion: {choice: [1.0, 2.0]}}
  layout: {choice: [[main], [main, main], {repeat: 2, of: main}]}
context: 64
tasks: {recall: {kind: recall, vocab_size: 16, sequence_length: 16, num_kv_pairs: 2}}
objectives: [{metric: recall/accuracy, reference: 0.0}, {metric: state_bytes, reference: 10_000}]
ladder: [{rung: short_train, tokens: 64, candidates: 50}]
cost: {measure: false}
"""
OURS = ("random", "qmc", "tpe", "nsga2", "evolution", "gp")
STOCK: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "TPESampler": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "NSGAIISampler": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
}
LIMITS = {"gp": 200}  # fits a Gaussian process to all trials before each draw


def quality(spec: Mapping[str, Any], code: str, figures: Mapping[str, float]) -> float:
    """Return the made-up score of an architecture."""
    mixer = spec["blocks"]["main"]["mixer"]
    found = 0.05 * math.log2(figures["non_embedding_parameters"]) + 0.1 * (mixer["bias"] == "l2")
    return float(found + 0.05 * (mixer["retention"] != "none") + 0.05 * int(code[:4], 16) / 0xFFFF - 0.6)


def _quality(request: Request) -> float:
    return quality(request["spec"], request["hash"], request["figures"])


def load(folder: Path, *overrides: str) -> SearchFile:
    """Return the search."""
    path = folder / "duplicates.yaml"
    path.write_text(SEARCH)
    return load_search_file(path, overrides)


def ours(sampler: str, trials: int, seed: int) -> tuple[int, int, int, int]:
    """Search; return draws, evaluations, duplicates among them, and draws that were known and not evaluated."""
    with tempfile.TemporaryDirectory(prefix="archspec-duplicates-") as temporary:
        search = load(Path(temporary), f"sampler={sampler}", f"seed={seed}")
        folder = Path(temporary) / "runs" / "duplicates"
        with RunFolder(folder, search) as opened:
            Driver(search, opened, Instant(_quality), Limits(trials)).execute()
        run, started, finished = load_run(folder), Counter[str](), Counter[str]()
        for event in read_events(folder / EVENTS):
            if event["event"] in ("submitted", "finished"):
                code = run.trials[event["trial"]].hash + event["stage"]
                (started if event["event"] == "submitted" else finished)[code] += 1
        evaluations = max(started.total(), finished.total())
        distinct = len({json.loads(path.read_bytes())["hash"] for path in (folder / "results").glob("*.json")})
        return run.counts.sampled, evaluations, evaluations - distinct, run.counts.duplicates + run.redraws


def stock(sampler: str, trials: int, seed: int) -> tuple[int, int, int, int]:
    """Have Optuna ask and tell; return the same."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=STOCK[sampler](seed), directions=["maximize", "minimize"])
    codes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="archspec-duplicates-") as temporary:
        search = load(Path(temporary))
        while len(codes) < trials:
            trial = study.ask()
            found = admit(named(search.space.draw(Asked(trial)), "drawn"), search)
            if isinstance(found, Rejection):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            codes.append(found.hash)
            score = quality(found.document, found.hash, found.figures)
            study.tell(trial, [score, found.figures["state_bytes"]])
    return len(study.trials), len(codes), len(codes) - len(set(codes)), 0


def space_size() -> tuple[int, int]:
    """Return how many settings the space has, and how many distinct legal architectures they are."""
    with tempfile.TemporaryDirectory(prefix="archspec-duplicates-") as temporary:
        search, codes = load(Path(temporary)), set[str]()
        for point in points(search.space):
            found = admit(named(express(search.space, point, "")[0], "point"), search)
            codes |= set() if isinstance(found, Rejection) else {found.hash}
        return search.space.size.settings, len(codes)


def main() -> int:
    """Count, print and keep a table; exit code 1 if the search evaluated anything twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samplers", default=",".join((*OURS, *STOCK)), help="ours and Optuna's, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the table under benchmarks/results/")
    args = parser.parse_args()
    settings, distinct = space_size()
    lines = [
        f"# Duplicate evaluations in {args.trials:,} trials",
        "",
        f"`python -m benchmarks.duplicates --trials {args.trials} --seed {args.seed}`, commit {current_commit()}, "
        f"Python {platform.python_version()}, optuna {version('optuna')}. A space of {settings:,} settings, which are "
        f"{distinct:,} distinct architectures by canonical hash; two objectives. Load {os.getloadavg()[0]:.1f} at the "
        "start.",
        "",
        "| sampler | evaluations | of which duplicates | draws | known at once, not evaluated | seconds |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    wrong = 0
    for name in args.samplers.split(","):
        began, trials = time.perf_counter(), min(args.trials, LIMITS.get(name, args.trials))
        drawn, count, repeats, known = (stock if name in STOCK else ours)(name, trials, args.seed)
        wrong += repeats if name not in STOCK else 0
        who = f"stock Optuna, {name}" if name in STOCK else f"archspec, `{name}`"
        lines.append(f"| {who} | {count} | {repeats} | {drawn} | {known} | {time.perf_counter() - began:.0f} |")
        print(lines[-1], flush=True)
    if args.write:
        keep("duplicates", "\n".join([*lines, ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
