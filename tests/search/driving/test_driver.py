"""Whole searches with real workers: what they find, and that no kill, failure or Ctrl-C changes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import pytest

import archspec
from archspec import search
from archspec.errors import RunError
from archspec.search.entry import SearchResult
from archspec.search.eventlog import Event, read_events
from archspec.search.records import Run, load_run
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import load_search_file
from archspec.search.trial import Trial

MEASURED = ("wall_s", "started", "finished", "cost", "folder")
BRITTLE = """
import os, signal
from typing import ClassVar
from archspec.search.families import Metric, MetricContext

class Brittle(Metric, kind="brittle"):
    def measure(self, context: MetricContext) -> dict[str, float]:
        width = context.model(0).features(__import__("torch").zeros(1, 4, dtype=int))[-1].shape[-1]
        if width == 24:
            raise MemoryError("no room for width 24")
        if width == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"brittle": float(width)}
"""


def events(folder: Path) -> list[Event]:
    return list(read_events(folder / "events.jsonl"))


def table(run: Run) -> list[dict[str, Any]]:
    """Return what must not depend on who ran it and when: every trial but for its measured times."""
    names = [field.name for field in fields(Trial) if field.name not in MEASURED]
    rows = [{name: getattr(trial, name) for name in names} for trial in run]
    return [{**row, "files": dict(sorted(row["files"].items()))} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> SearchResult:
    """One whole search, by one worker; the tests below look at it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(tiny_text)
    return archspec.search(folder / "tiny.yaml", workers=1, runs_dir=folder / "runs")  # type: ignore[operator,no-any-return]


def test_a_search_evaluates_all_promotes_some_and_trains_those_and_the_baselines(finished: SearchResult) -> None:
    run, counts = finished.run, finished.run.counts
    assert finished.status == "finished"
    assert (counts.accepted, counts.baselines, counts.evaluated, counts.trained, counts.failed) == (6, 1, 7, 4, 0)
    assert [trial.name for trial in run if trial.origin == "baseline"] == ["transformer"]
    promoted = Counter(trial.promoted_by for trial in run if trial.state == "trained")
    assert promoted == {None: 1, "rank": 2, "random": 1}
    for trial in run.trained:
        assert set(trial.scores) == {"recall/accuracy", "recall/loss_nats"}
        assert trial.cost["train_step_ms"]["median"] > 0
        assert trial.cost["device"] == "cpu"
        assert [point["tokens"] for point in trial.curves["recall"]][-1] == 640
        assert trial.weights["recall"].is_file()
        assert trial.plan[0]["reason"]
        assert run.objective_values(trial) is not None


def test_the_drivers_own_process_finds_what_workers_find(
    finished: SearchResult, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    found = search.run(tmp_path / "tiny.yaml", runs_dir=tmp_path / "runs", executor="inprocess")
    assert table(found.run) == table(finished.run)


def test_no_architecture_is_evaluated_twice_and_constraints_hold(finished: SearchResult) -> None:
    run = finished.run
    hashes = [trial.hash for trial in run if trial.state != "rejected"]
    assert len(hashes) == len(set(hashes))
    for trial in run:
        if trial.origin == "sampled" and trial.state != "rejected":
            assert (trial.non_embedding_parameters or 0) <= 9_000
    for trial in run:
        if trial.rule == "duplicate":
            assert trial.hash in hashes
            assert "the same architecture as trial" in trial.reason
        elif trial.state == "rejected":
            assert trial.rule == "constraint non_embedding_parameters"
    assert all(
        count == 1 for count in Counter(e["key"] for e in events(finished.folder) if e["event"] == "finished").values()
    )


def test_promotion_follows_the_files_rule(finished: SearchResult) -> None:
    run = finished.run
    (promoted,) = [event for event in events(finished.folder) if event["event"] == "promoted"]
    assert len(promoted["rank"]) == 2
    assert len(promoted["random"]) == 1
    aggregates = {int(number): value for number, value in promoted["aggregates"].items()}
    rest = [trial.number for trial in run if trial.origin == "sampled" and trial.number in aggregates]
    best = sorted((number for number in rest if number not in promoted["random"]), key=lambda n: (aggregates[n], n))
    assert promoted["rank"] == best[:2]


def test_the_study_holds_final_values_only_for_what_was_trained(finished: SearchResult) -> None:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(finished.folder / "journal.log"))
    )
    study = optuna.load_study(study_name="tiny", storage=storage)
    run = finished.run
    assert len(study.trials) == run.counts.sampled
    for frozen in study.trials:
        trial = run.trials[frozen.number + run.counts.baselines]
        expected = {"trained": "COMPLETE", "evaluated": "PRUNED", "rejected": "FAIL"}[trial.state]
        assert frozen.state.name == expected
        if trial.state == "trained":
            assert frozen.values == [trial.validation["recall/accuracy"]["mean"], trial.state_bytes]
            assert frozen.user_attrs["hash"] == trial.hash


def test_the_folder_reads_back_as_the_run_and_stands_alone(finished: SearchResult) -> None:
    again = load_run(finished.folder)
    assert table(again) == table(finished.run)
    assert again.environment["packages"]["torch"]
    assert again.hypervolume is not None
    assert finished.report is not None
    assert finished.report.is_file()
    trial = again.trained[-1]
    spec = archspec.load(finished.folder / "specs" / f"{trial.hash}.yaml")
    assert archspec.architecture_hash(spec) == trial.hash
    assert archspec.load(trial.spec) == spec


def test_correlations_stand_beside_the_parameter_count_with_n_and_no_verdict_on_little(finished: SearchResult) -> None:
    found = {item.metric: item for item in finished.run.correlations}
    assert {"non_embedding_parameters", "memory_capacity", "recall_at_init"} <= set(found)
    assert all(item.n == 1 for item in found.values())  # one candidate was promoted at random
    assert all(item.verdict == "not enough evidence" for item in found.values())
    (pairs,) = (finished.folder.parent / ".cache" / "pairs").iterdir()
    assert len(list(pairs.glob("*.json"))) == 1


def test_the_same_command_again_does_nothing_and_more_trials_continue(
    finished: SearchResult, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    shutil.copytree(finished.folder.parent, tmp_path / "runs")
    same = search.run(tmp_path / "tiny.yaml", workers=1, runs_dir=tmp_path / "runs")
    assert table(same.run) == table(finished.run)
    assert not [
        e for e in events(same.folder)[len(events(finished.folder)) :] if e["event"] in ("submitted", "proposed")
    ]
    more = search.run(tmp_path / "tiny.yaml", workers=2, runs_dir=tmp_path / "runs", trials=8)
    assert more.run.counts.accepted == 8
    assert table(more.run)[: len(finished.run.trials)] == table(finished.run)
    second = [trial for trial in more.run if trial.round == 1 and trial.state != "rejected"]
    assert len(second) == 2
    assert all(trial.state == "trained" for trial in second)  # fewer than the rung promotes
    with pytest.raises(RunError, match=r"(?s)started from another search file:\n  seed: 3 -> 4\n.*--study tiny-2"):
        search.run(tmp_path / "tiny.yaml", runs_dir=tmp_path / "runs", seed=4)


@pytest.mark.slow
def test_what_raises_and_what_kills_its_worker_is_recorded_and_the_search_goes_on(
    tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brittle_metric.py").write_text(BRITTLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import brittle_metric  # type: ignore[import-not-found]

    (tmp_path / "tiny.yaml").write_text(tiny_text)
    overrides = [
        "space.model_dim={choice: [16, 20, 24]}",
        "space.layout=attention",
        "variables.head_dim=8",
        "ladder[0].candidates=3",
        "ladder[0].promote={count: 3, by: [brittle], random: 1}",
        "constraints={}",
        "baselines=[]",
        "cost.measure=false",
    ]
    found = search.run(
        tmp_path / "tiny.yaml",
        workers=2,
        runs_dir=tmp_path / "runs",
        overrides=overrides,
        metrics=[brittle_metric.Brittle()],
    )
    by_width = {trial.spec["model_dim"]: trial for trial in found.trials}
    assert by_width[16].state == "trained"
    assert by_width[24].state == by_width[20].state == "failed"
    assert by_width[24].reason == "out of memory: no room for width 24"
    assert by_width[20].reason.startswith("the worker was ended by SIGKILL")
    assert sum(event["event"] == "died" for event in events(found.folder)) == 2  # and the third time is the last
    assert found.status in ("finished", "exhausted")
    assert load_run(found.folder).counts.failed == 2


def test_a_diverged_training_is_a_failed_trial_with_its_step(tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    overrides = ["training.learning_rates=[1e9]", "ladder[0].candidates=1", "ladder[0].promote=1", "baselines=[]"]
    found = search.run(tmp_path / "tiny.yaml", workers=1, runs_dir=tmp_path / "runs", overrides=overrides)
    (trial,) = found.trials
    assert trial.state == "failed"
    assert trial.reason.startswith("TrialDiverged: training diverged at step ")
    assert found.front == []


def test_a_space_without_a_feasible_candidate_ends_and_says_why(tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    command = [sys.executable, "-m", "archspec", "search", "tiny.yaml", "--set", "constraints.parameters={max: 10}"]
    command += ["--set", "baselines=[]", "--set", "sampler=random", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment())
    assert done.returncode == 3, done.stderr
    assert "no feasible candidate in" in done.stderr
    assert "constraint parameters" in done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "archspec", "search", "tiny.yaml", "--workers", "2", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for(folder: Path, condition: Callable[[list[Event]], bool], driver: subprocess.Popen[str]) -> list[Event]:
    stop = time.monotonic() + 120
    while time.monotonic() < stop:
        path = folder / "runs" / "tiny" / "events.jsonl"
        found = list(read_events(path)) if path.is_file() else []
        if condition(found):
            return found
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)
    raise AssertionError("the search did not get there in 120 s")


def count(found: list[Event], name: str) -> int:
    return sum(event["event"] == name for event in found)


def workers_of(driver: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a driver's workers: they are its children, in sessions of their own."""
    listed = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    if listed.is_file():
        return [int(word) for word in listed.read_text().split()]
    found = subprocess.run(["pgrep", "-P", str(driver.pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def ended(driver: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = driver.communicate(timeout=240)
    return driver.returncode, out, err


@pytest.mark.slow
def test_kill_9_of_driver_and_workers_at_any_moment_loses_and_repeats_nothing(
    finished: SearchResult, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    moments: list[Callable[[list[Event]], bool]] = [
        lambda found: count(found, "proposed") >= 3,
        lambda found: count(found, "finished") >= 1,
        lambda found: count(found, "finished") >= 5,
        lambda found: count(found, "promoted") >= 1 and count(found, "submitted") >= 14,
    ]
    for moment in moments:
        driver = start(tmp_path)
        wait_for(tmp_path, moment, driver)
        driver.kill()
        ended(driver)
    run_folder = tmp_path / "runs" / "tiny"
    for name in ("events.jsonl", "journal.log"):  # and what a kill in the middle of a write would leave
        with (run_folder / name).open("ab") as file:
            file.write(b'{"event": "finis')
    driver = start(tmp_path)
    before = count(wait_for(tmp_path, lambda found: len(workers_of(driver)) == 2, driver), "finished")
    for worker in workers_of(driver):
        os.kill(worker, signal.SIGKILL)
    code, out, err = ended(driver)
    assert code == 0, err
    assert "report:" in out
    run = load_run(run_folder)
    assert before <= count(events(run_folder), "finished")
    assert table(run) == table(finished.run)
    done = [event["key"] for event in events(run_folder) if event["event"] == "finished"]
    assert len(done) == len(set(done)) == len(list((run_folder / "results").glob("*.json")))
    finished_at: dict[str, int] = {}
    for place, event in enumerate(events(run_folder)):
        if event["event"] == "finished":
            finished_at[event["key"]] = place
        assert event["event"] != "submitted" or event["key"] not in finished_at, "a finished evaluation was repeated"


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(
    finished: SearchResult, tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    driver = start(tmp_path)
    wait_for(tmp_path, lambda found: count(found, "finished") >= 2, driver)
    workers = workers_of(driver)
    driver.send_signal(signal.SIGINT)
    code, _, err = ended(driver)
    assert code == 130, err
    assert "interrupted; continue with: archspec search tiny.yaml --workers 2" in err
    assert "Traceback" not in err
    folder = tmp_path / "runs" / "tiny"
    assert events(folder)[-1]["reason"] == "interrupted"
    assert (folder / "report.html").is_file()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    code, out, err = ended(start(tmp_path, "--json"))
    assert code == 0, err
    assert json.loads(out)["status"] == "finished"
    assert table(load_run(folder)) == table(finished.run)


def test_a_run_in_progress_refuses_a_second_driver_and_a_lock_left_behind_does_not(
    tmp_path: Path, tiny_text: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    held = RunFolder(tmp_path / "runs" / "tiny", load_search_file(tmp_path / "tiny.yaml"))
    with held, pytest.raises(RunError, match=rf"this run is in progress \(process {os.getpid()} on .*--study"):
        search.run(tmp_path / "tiny.yaml", runs_dir=tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "lock").write_text("process 1 on elsewhere\n")
    stopped = search.run(tmp_path / "tiny.yaml", runs_dir=tmp_path / "runs", timeout=1e-3)
    assert stopped.status == "timeout"


def test_a_timeout_stops_and_the_next_start_goes_on(finished: SearchResult, tmp_path: Path, tiny_text: str) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    first = search.run(tmp_path / "tiny.yaml", workers=1, runs_dir=tmp_path / "runs", timeout=1e-3)
    assert first.status == "timeout"
    second = search.run(tmp_path / "tiny.yaml", workers=1, runs_dir=tmp_path / "runs")
    assert second.status == "finished"
    assert table(second.run) == table(finished.run)
