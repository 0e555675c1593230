"""Front members scored again on fresh seeds, by the real driver and worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from archspec import search
from archspec.commands import main
from archspec.errors import EXIT_OK, SpecError
from archspec.search.records import load_run
from archspec.search.requests import FRESH_SEEDS
from archspec.search.searchfile import SearchFile
from archspec.search.survey import survey

Load = Callable[..., SearchFile]


def test_a_front_becomes_final_on_fresh_seeds_and_only_once(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny"
    few = ["ladder[0].candidates=3", "ladder[0].promote.count=2", "baselines=[]", "cost.measure=false"]
    first = search.run(tiny_file, run_dir=folder, workers=1, executor="inprocess", overrides=few)
    front = {trial.number for trial in first.front}
    assert not any(trial.rechecked for trial in first.run)
    scores = {trial.number: dict(trial.scores) for trial in first.run.trained}
    assert main(["pareto", str(folder)]) == EXIT_OK
    assert "provisional: no member is re-scored" in " ".join(capsys.readouterr().out.split())

    again = search.run(tiny_file, run_dir=folder, workers=1, executor="inprocess", overrides=[*few, "recheck=2"])
    run = load_run(folder)
    assert again.status == "finished"
    assert survey(run).front == front
    assert {trial.number for trial in run if trial.rechecked} == front
    assert {trial.number: trial.scores for trial in run.trained} == scores, "what a trial was found by stays"
    for number in front:
        trial = run.trials[number]
        entry = trial.rechecked["recall/accuracy"]
        assert entry["n"] == 2
        assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
        (stage,) = (stage for stage in trial.files if "recheck" in stage)
        result = trial.result(stage)
        assert [item["seed"] for item in result["value"]["result"]["runs"]] == [3 + FRESH_SEEDS, 4 + FRESH_SEEDS]
        assert not (folder / trial.files[stage]).with_suffix(".safetensors").exists()

    assert main(["pareto", str(folder), "--json"]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert {int(number) for number in data["certainty"]} == front
    assert {item["verdict"] for item in data["certainty"].values()} <= {"front", "undecided", "dominated"}
    assert main(["pareto", str(folder)]) == EXIT_OK
    shown = " ".join(capsys.readouterr().out.split())
    assert f"final: every one of its {len(front)} members is re-scored on fresh seeds" in shown
    assert "fresh seeds: recall accuracy" in shown

    assert main(["replay", str(folder)]) == EXIT_OK
    results = sorted((folder / "results").iterdir())
    search.run(tiny_file, run_dir=folder, workers=1, executor="inprocess", overrides=[*few, "recheck=2"])
    assert sorted((folder / "results").iterdir()) == results


def test_one_fresh_seed_is_refused(load_tiny: Load) -> None:
    assert load_tiny("recheck={seeds: 4}").settings.recheck is not None
    with pytest.raises(SpecError, match="recheck") as error:
        load_tiny("recheck=1")
    assert "2" in str(error.value)
