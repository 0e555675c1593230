"""The study in a database: a real PostgreSQL server, and SQLite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import archspec
from archspec.errors import RunError
from archspec.search.entry import run as run_search
from archspec.search.eventlog import read_events
from archspec.search.names import Objective
from archspec.search.records import load_run
from archspec.search.settings import Sampler
from archspec.search.space import Range
from archspec.search.storage import with_driver
from archspec.search.study import SearchStudy

OBJECTIVES = (Objective("a", "a", "maximize"), Objective("b", "b", "minimize"))


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'studies.db'}"
    found: str = request.getfixturevalue("postgresql")
    return found


@pytest.fixture
def name() -> str:
    """A name that no other test gives its study: all share the server."""
    return f"s-{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def _pools_are_closed() -> Iterator[None]:
    """Optuna leaves its connections to the garbage collector."""
    yield
    import gc

    gc.collect()


def opened(folder: Path, name: str, url: str | None, identity: str = "one") -> SearchStudy:
    sampler = Sampler.model_validate({"kind": "tpe"})
    return SearchStudy(folder / "journal.log", name, OBJECTIVES, sampler, 0, None, url, identity)


def fill(study: SearchStudy, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        asked = study.ask()
        first = asked.choose("x", ["x:0", "x:1", "x:2"])
        value = asked.number_in("p", Range(1.0, 4.0, None, True, False))
        found.append(asked.coordinates)
        study.complete(asked.number, [float(value), float(first[-1])])
    return found


def test_a_database_proposes_what_a_journal_does_also_when_cut_short(tmp_path: Path, url: str, name: str) -> None:
    expected = fill(opened(tmp_path, name, None), 13)
    study = opened(tmp_path, name, url)
    found = fill(study, 11)
    half = study.ask()
    half.choose("x", ["x:0", "x:1", "x:2"])
    study.fail(3, {"late": 1.0})  # told already: stays
    study.close()
    again = opened(tmp_path, name, url)
    assert again.unfinished() == [11]
    asked = again.resume(11)
    asked.choose("x", ["x:0", "x:1", "x:2"])
    value = asked.number_in("p", Range(1.0, 4.0, None, True, False))
    again.complete(11, [float(value), float(asked.coordinates["x"][-1])])
    assert [*found, asked.coordinates, *fill(again, 1)] == expected
    again.close()
    states = [trial.state.name for trial in optuna.load_study(study_name=name, storage=with_driver(url)).trials]
    assert states == ["COMPLETE"] * 13


def test_a_study_in_a_database_belongs_to_one_run(tmp_path: Path, url: str, name: str) -> None:
    study = opened(tmp_path, name, url)
    fill(study, 1)
    if url.startswith("postgresql"):
        with pytest.raises(RunError, match=r"in progress: another driver holds it; .*--study"):
            opened(tmp_path, name, url)
    study.close()
    with pytest.raises(RunError, match="belongs to another run; give this one a new name with --study"):
        opened(tmp_path, name, url, "two")
    opened(tmp_path, name, url).close()


def test_databases_that_are_not_there_and_passwords_are_refused(tmp_path: Path, load_tiny: Any, name: str) -> None:
    with pytest.raises(RunError, match=r"cannot be opened \(.*No such file or directory.*start it, or correct the URL"):
        opened(tmp_path, name, f"postgresql://archspec@/postgres?host={tmp_path}")
    with pytest.raises(RunError, match="no such kind of database, or its driver is not installed"):
        opened(tmp_path, name, "nosuchsql://host/name")
    with pytest.raises(archspec.SpecError, match=r"the URL holds a password.*set PGPASSWORD"):
        load_tiny("storage=postgresql://me:secret@host/name")
    with pytest.raises(archspec.SpecError, match=r"found studies\.db; required: a database's URL"):
        load_tiny("storage={url: studies.db}")
    assert load_tiny("storage=postgresql://me@host/name").settings.storage.url == "postgresql://me@host/name"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "archspec", "search", "tiny.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_kill_9_of_a_driver_whose_study_is_in_postgresql(
    tmp_path: Path, tiny_file: Path, postgresql: str, name: str
) -> None:
    expected = run_search(tiny_file, runs_dir=tmp_path / "expected", study=name, executor="inprocess")
    flags = ["--storage", postgresql, "--study", name, "--workers", "1"]
    log = tmp_path / "runs" / name / "events.jsonl"
    for moment in (2, 9):
        driver, stop = start(tmp_path, *flags), time.monotonic() + 120
        while not log.is_file() or sum(event["event"] == "finished" for event in read_events(log)) < moment:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < stop
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    driver = start(tmp_path, *flags)
    _, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    found = load_run(log.parent)
    assert [(trial.hash, trial.state) for trial in found] == [(trial.hash, trial.state) for trial in expected.run]
    done = [event["key"] for event in read_events(log) if event["event"] == "finished"]
    assert len(done) == len(set(done)) == len(list((log.parent / "results").glob("*.json")))
    study = optuna.load_study(study_name=name, storage=with_driver(postgresql))
    assert len(study.trials) == found.counts.sampled
    assert all(trial.state.is_finished() for trial in study.trials)
    assert not (log.parent / "journal.log").exists()
