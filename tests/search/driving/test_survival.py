"""What a run outlives besides kills: damaged log ends, a full disk, a clock that jumps, a lost command line."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from archspec.commands import main
from archspec.search.dispatch import MAX_INTERRUPTIONS
from archspec.search.entry import SearchResult
from archspec.search.entry import run as run_search
from archspec.search.eventlog import Event, EventLog, read_events, trim_torn_line
from archspec.search.records import Run, load_run


class Crash(BaseException):
    """Ends a search as nothing of archspec's expects."""


def crash_after(count: int) -> Any:
    """Return a listener that ends the search at the given number of finished evaluations."""
    seen: list[Event] = []

    def on_event(event: Event) -> None:
        seen.extend([event] if event["event"] == "finished" else [])
        if len(seen) == count:
            raise Crash

    return on_event


def outline(run: Run) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.hash, trial.state, trial.promoted_by, trial.scores) for trial in run]


def nothing_repeated(folder: Path) -> bool:
    done: list[str] = []
    for event in read_events(folder / "events.jsonl"):
        if event["event"] == "submitted" and event["key"] in done:
            return False
        done += [event["key"]] if event["event"] == "finished" else []
    return len(done) == len(set(done)) == len(list((folder / "results").glob("*.json")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> SearchResult:
    """The search that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(tiny_text)
    return run_search(folder / "tiny.yaml", runs_dir=folder / "runs", executor="inprocess")


@pytest.fixture
def crashed(tmp_path: Path, tiny_file: Path) -> Path:
    """The folder of a search that ended in the middle."""
    with pytest.raises(Crash):
        run_search(tiny_file, runs_dir=tmp_path / "runs", executor="inprocess", on_event=crash_after(4))
    return tmp_path / "runs" / "tiny"


def crash_at(which: str | None) -> Any:
    """Return a listener that ends the search when this evaluation is submitted; None for any."""

    def on_event(event: Event) -> None:
        if event["event"] == "submitted" and which in (None, event["key"]):
            raise Crash

    return on_event


def test_a_driver_that_is_killed_is_not_held_against_what_was_running(
    whole: SearchResult, tmp_path: Path, tiny_file: Path
) -> None:
    folder = tmp_path / "runs"
    for _ in range(MAX_INTERRUPTIONS - 1):
        with pytest.raises(Crash):
            run_search(tiny_file, runs_dir=folder, executor="inprocess", on_event=crash_at(None))
    for count in range(3):  # and once something is finished each time, without any limit
        with pytest.raises(Crash):
            run_search(tiny_file, runs_dir=folder, executor="inprocess", on_event=crash_after(1 + count))
    found = run_search(tiny_file, runs_dir=folder, executor="inprocess")
    assert found.run.attempts[next(iter(found.run.attempts))] == MAX_INTERRUPTIONS
    assert outline(found.run) == outline(whole.run)
    assert nothing_repeated(found.folder)


def test_an_evaluation_that_kills_its_driver_every_time_is_given_up(tmp_path: Path, tiny_file: Path) -> None:
    folder, crashes = tmp_path / "runs", 0
    with pytest.raises(Crash):
        run_search(tiny_file, runs_dir=folder, executor="inprocess", on_event=crash_after(3))
    with pytest.raises(Crash):
        run_search(tiny_file, runs_dir=folder, executor="inprocess", on_event=crash_at(None))
    (which,) = load_run(folder / "tiny").running
    while crashes <= MAX_INTERRUPTIONS:
        try:
            found = run_search(tiny_file, runs_dir=folder, executor="inprocess", on_event=crash_at(which))
            break
        except Crash:
            crashes += 1
    assert crashes == MAX_INTERRUPTIONS - 1
    assert found.status == "finished"
    (failed,) = [trial for trial in found.run if trial.state == "failed"]
    assert failed.reason == f"the search was killed {MAX_INTERRUPTIONS} times during it before anything was finished"
    assert nothing_repeated(found.folder)


GARBAGE = [b'{"event": "finis', b"\0\0\0\0\0\0\0\0\n", b"[1, 2]\n", b'{"half": \xff\n{"torn']


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_end_of_a_log_is_cut_to_its_last_whole_line_of_json(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("first", text="x" * 70_000)
        log.append("second")
    whole = path.read_bytes()
    path.write_bytes(whole + garbage)
    assert [event["event"] for event in read_events(path)] == ["first", "second"]
    assert trim_torn_line(path) == len(garbage)
    assert path.read_bytes() == whole
    assert trim_torn_line(path) == 0


def test_a_run_goes_on_after_garbage_by_its_folder_alone(
    whole: SearchResult, crashed: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, garbage in (("events.jsonl", b"\0\0\0\0\n"), ("journal.log", b'"op_code": 5}\n{"op_c')):
        with (crashed / name).open("ab") as file:
            file.write(garbage)
    tiny_file.unlink()
    assert main(["status", str(crashed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] in ("running", "killed")
    assert main(["resume", str(crashed), "--executor", "inprocess", "--quiet"]) == 0
    assert f"report: {crashed / 'report.html'}" in capsys.readouterr().out
    assert outline(load_run(crashed)) == outline(whole.run)
    assert nothing_repeated(crashed)
    assert main(["resume", str(crashed.parent / "tinny")]) == 1
    assert "no run here" in capsys.readouterr().err


def test_specs_that_a_power_cut_took_are_drawn_again(whole: SearchResult, crashed: Path, tiny_file: Path) -> None:
    names = {path.name for path in (crashed / "specs").iterdir()}
    for index, path in enumerate(sorted((crashed / "specs").iterdir())):
        path.write_bytes((b"", b"name: tiny\nmod", b"\0" * path.stat().st_size)[index % 3])
    found = run_search(tiny_file, runs_dir=crashed.parent, executor="inprocess")
    assert outline(found.run) == outline(whole.run)
    assert nothing_repeated(crashed)
    unfinished = {trial.hash for trial in load_run(crashed) if trial.promoted_by is not None}
    assert names
    for code in unfinished:
        assert (crashed / "specs" / f"{code}.yaml").read_bytes() == (
            whole.folder / "specs" / f"{code}.yaml"
        ).read_bytes()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.8])
def test_what_a_power_cut_took_of_the_study_is_told_again_from_the_log(
    whole: SearchResult, crashed: Path, tiny_file: Path, kept: float
) -> None:
    """The study is made durable after the log, and not at every record."""
    journal = crashed / "journal.log"
    journal.write_bytes(journal.read_bytes()[: int(kept * journal.stat().st_size)])
    found = run_search(tiny_file, runs_dir=crashed.parent, executor="inprocess")
    assert outline(found.run) == outline(whole.run)
    assert nothing_repeated(crashed)
    assert told(crashed) == told(whole.folder)
    journal.unlink()  # a finished run's, too
    run_search(tiny_file, runs_dir=crashed.parent, executor="inprocess")
    assert told(crashed) == told(whole.folder)


def told(folder: Path) -> list[tuple[Any, ...]]:
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    trials = optuna.load_study(study_name="tiny", storage=storage).trials
    return [(trial.params, trial.state, trial.values, trial.user_attrs, trial.constraints) for trial in trials]


def test_a_clock_that_jumps_changes_nothing(
    whole: SearchResult, tmp_path: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    monkeypatch.setattr("archspec.search.eventlog.time.time", lambda: 1.8e9 + draw.uniform(-1e8, 1e8))
    found = run_search(tiny_file, runs_dir=tmp_path / "runs", executor="inprocess", timeout=600)
    times = [event["time"] for event in read_events(found.folder / "events.jsonl")]
    assert times != sorted(times)
    assert found.status == "finished"
    assert outline(found.run) == outline(whole.run)
    assert main(["status", str(found.folder)]) == 0


def test_an_event_that_does_not_fit_on_the_disk_leaves_a_whole_log(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from archspec.search.eventlog import EventLog\n"
        "log = EventLog(Path(sys.argv[1])); log.append('first'); resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))\n"
        "log.append('second', text='x' * 100)"
    )
    path = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=environment())
    assert "RunError" in done.stderr
    assert "events.jsonl: cannot be written (No space left on device); free the disk, then" in done.stderr
    assert [event["event"] for event in read_events(path)] == ["first"]
    assert path.read_bytes().endswith(b"}\n")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "limit"), [("local", 6_000), ("inprocess", 12_000)])
def test_a_full_disk_ends_a_run_that_then_continues(
    whole: SearchResult, crashed: Path, executor: str, limit: int, tiny_file: Path
) -> None:
    """No file may grow beyond the limit: to whoever writes, the same as a disk without room."""
    command = [sys.executable, "-m", "archspec", "resume", str(crashed), "--executor", executor, "--quiet"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stdout
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(event["event"] == "finished" and not event["ok"] for event in read_events(crashed / "events.jsonl"))
    found = run_search(tiny_file, runs_dir=crashed.parent, executor="inprocess")
    assert outline(found.run) == outline(whole.run)
    assert nothing_repeated(crashed)
