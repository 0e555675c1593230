"""optuna-dashboard opens a run's study: its own server on the loopback, asked by one request."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna_dashboard import wsgi

from archspec import search


class Quiet(WSGIRequestHandler):
    """Answers without a log."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def test_the_dashboard_sees_the_trials_of_a_run(tiny_file: Path, tmp_path: Path) -> None:
    few = ["ladder[0].candidates=3", "ladder[0].promote.count=2", "baselines=[]", "cost.measure=false"]
    folder = tmp_path / "runs" / "tiny"
    run = search.run(tiny_file, run_dir=folder, workers=1, executor="inprocess", overrides=few).run
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    with make_server("127.0.0.1", 0, wsgi(storage), handler_class=Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            (study,) = ask(server.server_port, "/api/studies")["study_summaries"]
            detail = ask(server.server_port, f"/api/studies/{study['study_id']}")
        finally:
            server.shutdown()
    assert study["study_name"] == "tiny"
    assert detail["directions"] == ["maximize", "minimize"]
    states = [trial["state"] for trial in detail["trials"]]
    trained = run.trained
    assert states.count("Complete") == len(trained) == 2
    assert states.count("Pruned") == 1
    told = {item["value"] for trial in detail["trials"] for item in trial["user_attrs"] if item["key"] == "hash"}
    assert {trial.hash for trial in trained} <= told


def ask(port: int, path: str) -> dict[str, Any]:
    """Return what the dashboard answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return dict(json.load(answer))
