"""The search from Python: a script's own task, events, progress; and runs of ten thousand trials read quickly."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from archspec.errors import RunError
from archspec.search.eventlog import EventLog, read_events, trim_torn_line
from archspec.search.progress import Progress, best_lines, duration
from archspec.search.records import FORMAT, load_run, replay

SCRIPT = """
import sys
from typing import ClassVar
import torch
import archspec
from archspec.search.families import Batch, Task

class Echo(Task, kind="echo"):
    scores: ClassVar = {"echo/accuracy": "maximize"}
    primary: ClassVar = "echo/accuracy"
    vocab_size: int = 8
    sequence_length: int = 8

    def batch(self, split, seed, index, batch_size):
        generator = torch.Generator().manual_seed(1000 * len(split) + 100 * seed + index)
        tokens = torch.randint(8, (batch_size, 8), generator=generator)
        return Batch(tokens, tokens, torch.ones(tokens.shape))

    def score(self, tally):
        return {"echo/accuracy": tally.correct / tally.weight}

if __name__ == "__main__":
    seen = []
    result = archspec.search(
        "tiny.yaml",
        tasks={"mine": Echo()},
        workers=1,
        overrides=[
            "objectives=[{metric: mine/accuracy, reference: 0.0}]",
            "ladder[0].candidates=1", "ladder[0].promote=1", "baselines=[]", "cost.measure=false",
        ],
        on_event=lambda event: seen.append(event["event"]),
    )
    (trial,) = result.front
    print(trial.state, sorted(trial.scores), "progress" in seen, seen[-1])
"""


def test_a_script_searches_with_its_own_task(tiny_file: Path) -> None:
    script = tiny_file.parent / "mine.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tiny_file.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "trained ['mine/accuracy'] True stopped"


def figures() -> dict[str, float]:
    return {"parameters": 1000, "non_embedding_parameters": 900, "flops_per_token": 5e3, "state_bytes": 64}


def write_run(folder: Path, num_trials: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with EventLog(folder / "events.jsonl") as log:
        log.append(
            "opened",
            format=FORMAT,
            study="large",
            seed=0,
            objectives=[{"name": "recall/accuracy", "metric": "recall/accuracy", "direction": "maximize"}],
            tasks={
                "recall": {"kind": "recall", "primary": "recall/accuracy", "scores": {"recall/accuracy": "maximize"}}
            },
            metrics={"memory_capacity": "maximize"},
            rungs=[
                {"rung": "training_free", "tokens": None, "promote": {"count": 8}},
                {"rung": "short_train", "tokens": 100, "promote": None},
            ],
        )
        log.append("started", command="", workers=2, device="cpu", trials=num_trials)
        for number in range(num_trials):
            spec = {"name": f"large-{number}", "hash": f"{number:016x}", "origin": "sampled", "round": 0, "note": ""}
            more = {
                "coordinates": {"model_dim": "model_dim:16"},
                "families": ["linear"],
                "kernels": ["linear/chunkwise"],
            }
            log.append("proposed", trial=number, figures=figures(), **spec, **more)
            first = {"key": f"a{number}", "trial": number, "stage": "0/training_free", "rung": 0}
            log.append("submitted", attempt=1, **first)
            value: dict[str, Any] = {"metrics": {"memory_capacity": {"mean": number / num_trials, "spread": 0.1}}}
            log.append("finished", ok=True, reason="", wall_s=0.5, value=value, **first)
            if number % 10 == 0:
                score = {"recall/accuracy": {"mean": number / num_trials, "spread": 0.0, "interval": None, "n": 1}}
                last = {"key": f"b{number}", "trial": number, "stage": "1/train/recall", "rung": 1}
                log.append(
                    "finished", ok=True, reason="", wall_s=2.0, value={"scores": score, "validation": score}, **last
                )


def test_ten_thousand_trials_are_read_in_seconds(tmp_path: Path) -> None:
    write_run(tmp_path, 10_000)
    started = time.process_time()
    run = load_run(tmp_path)
    counts = run.counts
    # Measured at 0.35 s on an idle core; the bound leaves room for a slow one.
    assert time.process_time() - started < 3.0
    assert (counts.accepted, counts.evaluated, counts.trained) == (10_000, 10_000, 1_000)
    assert run.trials[9_990].value("recall/accuracy") == 0.999
    assert best_lines(run) == ["recall/accuracy: 0.999 (large-9990)"]


def test_a_log_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event":"finished","key')
    assert load_run(tmp_path).counts.evaluated == 3
    assert trim_torn_line(path) == 24
    assert path.read_bytes() == whole
    assert trim_torn_line(path) == 0
    path.write_bytes(whole[:50] + b"\n" + whole[50:])
    with pytest.raises(RunError, match=r"events\.jsonl:1: not an event; the log was edited or damaged"):
        load_run(tmp_path)
    newer = json.loads(whole.splitlines()[0]) | {"format": FORMAT + 1}
    path.write_text(json.dumps(newer) + "\n")
    with pytest.raises(RunError, match=f"record format {FORMAT + 1}, and this version reads {FORMAT}"):
        load_run(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_plain_lines_off_a_terminal_and_a_live_display_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, 2)
    events = list(read_events(tmp_path / "events.jsonl"))
    plain, live = io.StringIO(), Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    for stream in (plain, live):
        with Progress(stream) as progress:
            run = replay(tmp_path, [])
            progress.attach(run)
            for event in events:
                run.apply(event)
                progress(event)
            run.apply(
                {"event": "submitted", "key": "c", "trial": 1, "stage": "1/train/recall", "attempt": 1, "time": 0}
            )
            share = {"tokens": 40, "budget_tokens": 100, "validation": 0.25, "phase": "train"}
            progress({"event": "progress", "key": "c", "trial": 1, "stage": "1/train/recall", **share})
    lines = plain.getvalue().splitlines()
    assert lines[0] == "large: 2 candidates wanted, 2 workers on cpu"
    assert "large-1 training_free: memory_capacity 0.5 (0.5 s)" in lines
    assert "large-0 train recall: accuracy 0 (2.0 s)" in lines
    assert "\x1b" not in plain.getvalue()
    assert "\x1b" in live.getvalue()
    assert "candidates 2/2" in live.getvalue()
    assert "large-1" in live.getvalue()
    assert "40%  train  validation 0.25" in live.getvalue()


def test_durations_for_people() -> None:
    assert [duration(seconds) for seconds in (0.4, 42, 185, 7800)] == ["0 s", "42 s", "3 min 5 s", "2 h 10 min"]
