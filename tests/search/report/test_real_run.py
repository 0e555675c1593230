"""A run that the search itself wrote: what the report and the commands need is truly in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from archspec import load_exported, search
from archspec.commands import main
from archspec.errors import EXIT_OK
from archspec.search.records import load_run
from archspec.search.report.payload import report_data

SEARCH: dict[str, Any] = {
    "study": "tiny",
    "context": 64,
    "space": {
        "name": "tiny",
        "model_dim": {"choice": [16, 24]},
        "blocks": {
            "main": {
                "mixer": {
                    "num_heads": 2,
                    "key_dim": 8,
                    "value_dim": 8,
                    "memory": "matrix",
                    "bias": {"choice": ["l2", "dot"]},
                    "update": "gradient_descent",
                }
            }
        },
        "layout": "main",
    },
    "tasks": {"recall": {"kind": "recall", "vocab_size": 16, "sequence_length": 16, "num_kv_pairs": 2}},
    "training": {"batch_size": 8, "eval_tokens": 256, "seeds": 2, "precision": "fp32"},
    "objectives": [
        {"metric": "recall/accuracy", "direction": "maximize", "reference": 0.0},
        {"metric": "state_bytes", "direction": "minimize", "reference": 4096, "at_length": 64, "dtype": "float32"},
    ],
    "ladder": [
        {"rung": "training_free", "candidates": 3, "metrics": ["recall_at_init"],
         "promote": {"count": 2, "by": ["recall_at_init"], "random": 1}},
        {"rung": "short_train", "tokens": 2000},
    ],
    "workers": 1,
}  # fmt: skip


def test_a_run_of_the_search_can_be_looked_at_and_taken_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert search.run(SEARCH).status == "finished"
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "report.html").is_file()

    data = report_data(load_run(folder))
    trained = [trial for trial in data["trials"] if trial["state"] == "trained"]
    assert len(trained) == 2
    assert data["hypervolume"][0][0] == "hypervolume"
    for trial in trained:
        assert trial["coordinates"][0]["memory"] == "matrix"
        assert trial["curves"][0]["task"] == "recall"
        assert len(trial["curves"][0]["points"]) > 1
        assert trial["kernels"][0]["reason"]
        assert trial["values"]["recall/accuracy"]["n"] == 2
        assert trial["values"]["train_step_ms"]["mean"] > 0
        assert trial["spec"].startswith("name: ")
        assert trial["choices"][0] == ("model_dim", str(load_run(folder).trials[trial["number"]].spec["model_dim"]))

    number = str(trained[0]["number"])
    for arguments in (["pareto", "tiny"], ["status", "tiny"], ["show", "tiny", number]):
        assert main(arguments) == EXIT_OK
    assert main(["show", "tiny", number, "--json"]) == EXIT_OK
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("\n{\n") :])["weights"].keys() == {"recall"}
    assert main(["export", "tiny", number, "-o", "winner"]) == EXIT_OK
    model = load_exported("winner")
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 16)
