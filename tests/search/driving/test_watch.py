"""How far running evaluations are, for who looks from outside."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from archspec.commands import main
from archspec.search.eventlog import EVENTS, EventLog
from archspec.search.records import load_run
from archspec.search.report.tables import running
from archspec.search.watch import Watch, how_far, said

TRAINING = {"phase": "train", "tokens": 300, "budget_tokens": 1200, "validation": 0.3125, "node": "node-3"}


def test_status_shows_what_running_evaluations_said_last(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    watch = Watch(tmp_path)
    with EventLog(tmp_path / EVENTS) as log:
        log.append("opened", format=1, study="s", seed=0, objectives=[], tasks={}, metrics={}, rungs=[])
        for key in ("a", "b", "c"):
            log.append("submitted", key=key, trial=0, stage="0/train/recall", rung=0, attempt=1)
    run = load_run(tmp_path)
    for key in ("a", "over"):
        watch.note({"key": key, **TRAINING})
    watch.note({"key": "b", "phase": "waiting"})
    watch.write(run)
    assert said(tmp_path).keys() == {"a", "b"}
    assert running(load_run(tmp_path)) == [
        "#0   0/train/recall   25%  train  validation 0.3125  on node-3",
        "#0   0/train/recall  waiting",
        "#0   0/train/recall",
    ]
    watch.note({"key": "b", "phase": "begun", "node": "node-1"})
    watch.write(run)  # too soon: the disk is not asked for every word
    assert said(tmp_path)["b"] == {"key": "b", "phase": "waiting"}
    assert main(["status", str(tmp_path)]) == 0
    Watch(tmp_path)  # another driver knows nothing of what this one heard
    assert said(tmp_path) == {}


def test_how_far_in_words() -> None:
    assert how_far({}) == ""
    assert how_far({"phase": "begun", "node": "node-1"}) == "begun  on node-1"
    assert how_far({**TRAINING, "tokens": 2400, "validation": None}) == "100%  train  validation -  on node-3"
