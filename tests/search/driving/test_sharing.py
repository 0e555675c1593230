"""Results shared across studies, soft constraints on measured values, and the replay of a run from its log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from archspec import search
from archspec.commands import main
from archspec.errors import RunError
from archspec.search.entry import SearchResult
from archspec.search.eventlog import read_events
from archspec.search.records import load_run
from archspec.search.rerun import replay_run
from archspec.search.searchfile import SearchFile
from archspec.search.shared import code_version

Load = Callable[..., SearchFile]
FAST = ("cost.measure=false", "ladder[0].metrics=[non_embedding_parameters]")
BY = "ladder[0].promote={count: 3, by: [non_embedding_parameters], random: 1}"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> SearchResult:
    """A run in rounds that leaves its results in a shared folder; its soft constraint is broken by some trials."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tiny.yaml").write_text(tiny_text)
    return start(folder, "first")


def start(folder: Path, study: str, *overrides: str, **options: Any) -> SearchResult:
    given = [*FAST, BY, f"cache={folder / 'cache'}", "soft_constraints={state_bytes: {max: 5000}}", *overrides]
    return search.run(
        folder / "tiny.yaml",
        study=study,
        runs_dir=folder / "runs",
        overrides=given,
        **{"executor": "inprocess", **options},
    )


def test_another_study_takes_what_is_known_and_says_so(first: SearchResult, capsys: Any) -> None:
    folder = first.folder.parent.parent
    again = start(folder, "second")
    evaluations = [event for event in read_events(again.folder / "events.jsonl") if event["event"] == "finished"]
    assert all(event["reused"] and event["wall_s"] == 0 for event in evaluations)
    assert again.run.reused == len(evaluations) == len(list((first.folder / "results").glob("*.json")))
    assert first.run.reused == 0
    assert [t.scores for t in again.run.trained] == [t.scores for t in first.run.trained]
    best = again.run.trained[-1]
    assert best.spec["name"] == best.name  # the result carries this study's spec, not the other's
    assert best.weights["recall"].read_bytes() == first.run.trained[-1].weights["recall"].read_bytes()
    assert load_run(again.folder).reused == again.run.reused
    assert main(["status", str(again.folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{again.run.reused} evaluations" in shown
    assert f"{again.run.counts.acceptance_rate:.0%} of them legal and within the constraints" in shown
    other = start(folder, "third", "seed=4", "ladder[0].candidates=1", "baselines=[]")
    assert other.run.reused == 0  # another seed is another evaluation


def test_results_lie_by_code_and_machine_and_a_damaged_one_is_named(first: SearchResult) -> None:
    (code,) = (first.folder.parent.parent / "cache").iterdir()
    assert code.name == code_version()
    (machine,) = code.iterdir()
    files = sorted(machine.glob("*.json"))
    assert json.loads(files[0].read_bytes())["machine"].replace(" ", "_")[:4] == machine.name[:4]
    copied = first.folder.parent.parent / "damaged"
    shutil.copytree(first.folder.parent.parent / "cache", copied)
    for path in copied.rglob("*.json"):
        path.write_text("{")
    with pytest.raises(RunError, match=r"a shared result cannot be read .*; remove it"):
        start(first.folder.parent.parent, "fourth", f"cache={copied}")


def test_who_breaks_a_soft_constraint_is_told_and_stands_on_no_front(first: SearchResult) -> None:
    run = first.run
    broken = {trial.number for trial in run.trained if (trial.value("state_bytes") or 0) > 5000}
    kept = {trial.number for trial in run.trained} - broken
    assert broken
    assert kept
    assert {trial.number for trial in first.front} <= kept
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(first.folder / "journal.log"))
    )
    for frozen in optuna.load_study(study_name="first", storage=storage).trials:
        if frozen.state.name == "COMPLETE":
            number = frozen.number + run.counts.baselines
            assert (frozen.constraints["state_bytes"] > 0) == (number in broken)
            assert frozen.constraints == run.soft_excess(run.trials[number])


@pytest.mark.parametrize("mode", ["rounds", "asynchronous", pytest.param("workers", marks=pytest.mark.slow)])
def test_a_run_is_derived_again_from_its_log(first: SearchResult, mode: str, capsys: Any) -> None:
    folder = first.folder.parent.parent
    found = first
    if mode != "rounds":
        overrides = ("asynchronous=true", "cache=null", "sampler={kind: evolution, startup: 3}")
        how = {"executor": "local", "workers": 2} if mode == "workers" else {}
        start(folder, mode, *overrides, trials=4, **how)
        found = start(folder, mode, *overrides, trials=9, **how)  # continued: two rounds of different sizes
    replayed = replay_run(found.folder)
    logged = list(read_events(found.folder / "events.jsonl"))
    for name in ("proposed", "rejected", "promoted", "finished", "round", "closed"):
        assert replayed.verified.get(name, 0) == sum(event["event"] == name for event in logged)
    assert main(["replay", str(found.folder)]) == 0
    assert f"{replayed.total} events derived again, all as logged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("event", "change", "message"),
    [
        ("promoted", {"rank": [1]}, "differs in 'rank'"),
        ("proposed", {"hash": "0000"}, "differs in 'hash'"),
        ("rejected", {"rule": "illegal"}, "differs in 'rule'"),
    ],
)
def test_a_log_that_was_edited_is_found_out(
    first: SearchResult, tmp_path: Path, event: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(first.folder, tmp_path / "edited")
    path = tmp_path / "edited" / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    target = [line for line in lines if line["event"] == event][-1]
    target.update(change)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=message):
        replay_run(tmp_path / "edited")
