"""Time the opening of a large search, beside stock Optuna's loading of a study of as many trials.

    python -m benchmarks.analysis --trials 10000 --repeats 5 --write

A run is written as the driver writes it: its events through the event log, one result file an evaluation, one spec file
a trial; every trial is trained on two tasks, which is more than a ladder would leave. The same values go into a journal
study of Optuna's. Then fresh processes are timed from start to end: ``archspec pareto RUN`` (table, hypervolume over
time, report) with its index and without, and ``optuna.load_study`` with ``best_trials``. Wall seconds say what a
user waits on this machine, CPU seconds what the work is, whatever else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.recording import current_commit, keep

STUDY = "large"
OBJECTIVES = [
    {"name": "recall/accuracy", "metric": "recall/accuracy", "direction": "maximize", "reference": 0.0},
    {"name": "text/bits_per_byte", "metric": "text/bits_per_byte", "direction": "minimize", "reference": 8.0},
    {"name": "state_bytes@2048", "metric": "state_bytes", "direction": "minimize", "reference": 2e6, "at_length": 2048,
     "dtype": "float32"},
]  # fmt: skip
TASKS = {
    "recall": {"kind": "recall", "primary": "recall/accuracy", "scores": {"recall/accuracy": "maximize"}},
    "text": {"kind": "text", "primary": "text/bits_per_byte", "scores": {"text/bits_per_byte": "minimize"}},
}
BIASES, RETENTIONS = ("l2", "dot", "l1", "huber"), ("none", "decay", "l2_anchor")


def write_run(folder: Path, count: int) -> None:
    """Write a finished run of ``count`` trained trials, event by event."""
    from archspec.search.eventlog import EVENTS, EventLog

    for name in ("results", "specs"):
        (folder / name).mkdir(parents=True)
    rungs = [{"rung": "training_free", "tokens": None, "promote": {"count": count}},
             {"rung": "short_train", "tokens": 200_000, "promote": None}]  # fmt: skip
    metrics = {"recall_at_init": "maximize", "memory_capacity": "maximize"}
    with EventLog(folder / EVENTS) as log:
        log.append("opened", format=1, study=STUDY, seed=0, objectives=OBJECTIVES, tasks=TASKS, metrics=metrics,
                   rungs=rungs, space={})  # fmt: skip
        log.append("started", command="archspec search large.yaml", workers=2, device="cpu", trials=count)
        log.append("round", round=0, size=count)
        for number in range(count):
            _propose(folder, log, number)
            quality = drawn(number)[0]
            measured = {name: {"mean": quality + number % 7 / 70, "spread": 0.02} for name in metrics}
            _finish(folder, log, number, "0/training_free", 0, {"metrics": measured})
        log.append("promoted", round=0, rung=0, rank=list(range(count)), random=[], aggregates={})
        for number in range(count):
            for task, name, value in zip(TASKS, ("recall/accuracy", "text/bits_per_byte"), drawn(number), strict=False):
                score = {"mean": value, "spread": 0.01, "interval": [value - 0.03, value + 0.03], "n": 3}
                trained = {"scores": {name: score}, "validation": {name: score}}
                _finish(folder, log, number, f"1/train/{task}", 1, trained)
            cost = {"train_step_ms": {"median": 41.0, "p20": 40.0, "p80": 44.0, "repeats": 5}, "device": "cpu"}
            _finish(folder, log, number, "1/cost", 1, {"cost": cost})
        log.append("closed", round=0)
        log.append("stopped", reason="finished")


def drawn(number: int) -> tuple[float, float, float]:
    """Return a trial's accuracy, bits per byte and state bytes: quality grows with state, up to chance."""
    generator = random.Random(number)
    size = generator.random()
    accuracy = 0.2 + 0.7 * size**0.5 - 0.2 * generator.random() ** 2
    return round(accuracy, 6), round(4.5 - size - 0.4 * generator.random(), 6), float(4096 * int(1 + 250 * size))


def choices(number: int) -> dict[str, str]:
    """Return what trial ``number`` drew."""
    return {"blocks.main.mixer.bias": BIASES[number % 4], "blocks.main.mixer.retention": RETENTIONS[number % 3]}


def spec_of(number: int) -> dict[str, Any]:
    """Return the spec of trial ``number``."""
    bias, retention = choices(number).values()
    mixer = {"num_heads": 2, "key_dim": 16, "value_dim": 16, "memory": "matrix", "bias": bias, "retention": retention,
             "update": "gradient_descent", "qk": {"norm": "l2"}}  # fmt: skip
    block = {"mixer": mixer, "feed_forward": {"kind": "swiglu", "expansion": 2.67, "multiple_of": 8}}
    return {"name": f"{STUDY}-{number}", "model_dim": 64 + number % 64, "blocks": {"main": block},
            "layout": {"repeat": 4, "of": "main"}}  # fmt: skip


def _propose(folder: Path, log: Any, number: int) -> None:
    from archspec.search.report.coordinates import coordinates

    code = f"{number * 2654435761 % 2**64:016x}"
    figures = {"parameters": 9e4 + number % 999, "non_embedding_parameters": 8e4 + number % 999,
               "flops_per_token": 1.7e5}  # fmt: skip
    figures |= dict.fromkeys(("state_bytes", "state_bytes@2048"), drawn(number)[2])
    (folder / "specs" / f"{code}.yaml").write_text(json.dumps(spec_of(number), indent=1))
    log.append("proposed", trial=number, name=f"{STUDY}-{number}", origin="sampled", round=0, hash=code,
               coordinates=choices(number), mixers=[vars(item) for item in coordinates(spec_of(number))],
               figures=figures, families=["delta"], kernels=["delta/chunkwise/torch"],
               note="")  # fmt: skip


def _finish(folder: Path, log: Any, number: int, stage: str, rung: int, value: dict[str, Any]) -> None:
    key = f"{number:012d}{stage.replace('/', '-')}"[-20:].rjust(20, "0")
    plan = [{"where": "blocks.main.mixer", "family": "delta", "form": "chunkwise", "kernel": "torch", "reason": "l2"}]
    curve = [{"tokens": 20_000 * at, "train_loss": 4.0 - 0.1 * at, "score": 0.05 * at} for at in range(1, 11)]
    result = {"status": "ok", "spec": spec_of(number), "plan": plan, "value": {**value, "curve": curve}}
    (folder / "results" / f"{key}.json").write_text(json.dumps(result))
    names = {"key": key, "trial": number, "stage": stage, "rung": rung}
    log.append("submitted", **names, attempt=1)
    log.append("finished", **names, ok=True, reason="", wall_s=4.5, value=value)


def write_study(path: Path, count: int) -> None:
    """Have Optuna ask and tell as many trials of eight parameters, with the same values, in a journal of its own."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    kinds = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
    directions = [kinds[str(item["direction"])] for item in OBJECTIVES]
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions, sampler=sampler)
    for number in range(count):
        trial = study.ask()
        for name in range(8):
            trial.suggest_categorical(f"blocks.main.{name}", BIASES)
        study.tell(trial, list(drawn(number)))


def load_stock(path: Path) -> None:
    """Load the study and its best trials, as a user of Optuna does."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(study_name=STUDY, storage=JournalStorage(JournalFileBackend(str(path))))
    print(len(study.best_trials), "on the front")


def timed(command: list[str], repeats: int, before: Path | None = None) -> list[tuple[float, float]]:
    """Return wall and CPU seconds of ``repeats`` fresh processes; ``before`` is removed each time."""
    found = []
    for _ in range(repeats):
        if before is not None:
            before.unlink(missing_ok=True)
        cpu, started = _children_cpu_s(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append((time.perf_counter() - started, _children_cpu_s() - cpu))
    return found


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Write both, time both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the table under benchmarks/results/")
    parser.add_argument("--stock", metavar="JOURNAL", type=Path, help="load this study and end")
    args = parser.parse_args()
    if args.stock is not None:
        return load_stock(args.stock)
    with tempfile.TemporaryDirectory() as where:
        run, journal = Path(where) / STUDY, Path(where) / "journal.log"
        write_run(run, args.trials)
        write_study(journal, args.trials)
        pareto = [sys.executable, "-m", "archspec", "pareto", str(run)]
        cold = timed(pareto, args.repeats, run / "events.index")
        rows = [
            ("`archspec pareto RUN`, index in place", timed(pareto, args.repeats)),
            ("`archspec pareto RUN`, no index yet: reads the log, writes the index", cold),
            ("`archspec status RUN`", timed([*pareto[:3], "status", str(run)], args.repeats)),
            (
                "Optuna: `load_study` and `best_trials` of a journal it asked and told",
                timed([sys.executable, "-m", "benchmarks.analysis", "--stock", str(journal)], args.repeats),
            ),
        ]
    text = table(rows, args)
    print(text)
    if args.write:
        keep("analysis", text)
    return None


def table(rows: list[tuple[str, list[tuple[float, float]]]], args: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    load = os.getloadavg()[0]
    lines = [
        f"# Opening a search of {args.trials:,} trials",
        "",
        f"`python -m benchmarks.analysis --trials {args.trials} --repeats {args.repeats}`, commit {current_commit()}, "
        f"Python {platform.python_version()}, optuna {version('optuna')}, {os.cpu_count()} cores "
        f"(load {load:.1f} at the end). Seconds of a whole fresh process; all trials trained, three objectives.",
        "",
        "| command | median s | fastest | slowest | CPU s |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows:
        wall, cpu = zip(*found, strict=True)
        cells = (statistics.median(wall), min(wall), max(wall), statistics.median(cpu))
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
