"""The Optuna study: proposals that a kill does not change, journals that a kill has torn."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from archspec.errors import RunError
from archspec.search.names import Objective
from archspec.search.settings import Sampler
from archspec.search.space import Range
from archspec.search.study import Asked, SearchStudy

OBJECTIVES = (Objective("a", "a", "maximize"), Objective("b", "b", "minimize"))
OPTIONS = ["x:0", "x:1", "x:2", "x:3"]


def open_study(folder: Path, kind: str = "tpe", seed: int = 0) -> SearchStudy:
    return SearchStudy(folder / "journal.log", "s", OBJECTIVES, Sampler.model_validate({"kind": kind}), seed)


def draw(asked: Asked) -> dict[str, Any]:
    first = asked.choose("x", OPTIONS)
    asked.number_in("p", Range(1.0, 4.0, None, True, False))
    if first == "x:2":
        asked.number_in("x/2.depth", Range(1, 9, 2, False, True))
    return asked.coordinates


def fill(study: SearchStudy, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        asked = study.ask()
        found.append(draw(asked))
        study.complete(asked.number, [found[-1]["p"], OPTIONS.index(found[-1]["x"])])
    return found


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.load_study(study_name="s", storage=storage).trials


@pytest.mark.parametrize("kind", ["tpe", "random", "nsga2"])
def test_proposals_depend_on_seed_and_history_alone(tmp_path: Path, kind: str) -> None:
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
    first = fill(open_study(tmp_path / "one", kind), 16)
    second = fill(open_study(tmp_path / "two", kind), 9)
    second += fill(open_study(tmp_path / "two", kind), 7)  # reopened, as after a kill
    assert first == second
    assert fill(open_study(tmp_path / "other", kind, seed=1), 16) != first


def test_a_half_asked_trial_is_taken_up_where_it_stood(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    expected = fill(open_study(tmp_path / "whole"), 14)
    study = open_study(tmp_path / "cut")
    fill(study, 12)
    study.ask().choose("x", OPTIONS)
    again = open_study(tmp_path / "cut")
    assert again.unfinished() == [12]
    asked = again.resume(12)
    assert draw(asked) == expected[12]
    again.complete(12, [expected[12]["p"], OPTIONS.index(expected[12]["x"])])
    assert fill(again, 1) == expected[13:]


def test_a_torn_last_line_and_a_lock_left_by_a_kill_do_no_harm(tmp_path: Path) -> None:
    fill(open_study(tmp_path), 3)
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker_id": "abc", "stu')
    (tmp_path / "journal.log.lock").symlink_to(journal)
    started = time.monotonic()
    study = open_study(tmp_path)
    fill(study, 1)
    assert time.monotonic() - started < 10  # Optuna alone would wait 30 s for the lock
    assert journal.read_bytes().startswith(whole)
    assert len(trials(tmp_path)) == 4


def test_what_others_write_to_the_journal_is_read_and_what_does_not_fit_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = open_study(tmp_path)
    fill(study, 2)
    optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path)))).set_user_attr("note", "x")
    fill(study, 1)
    assert study._study.user_attrs == {"note": "x"}
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space left on device.*journal\.log"):
            study.ask()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    study.commit()
    study.close()
    assert fill(open_study(tmp_path), 1)
    assert len(trials(tmp_path)) == 4


def test_what_the_study_is_told(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(4):
        draw(study.ask())
    study.label(0, hash="abcd")
    study.complete(0, [1.0, 2.0])
    study.prune(1)
    study.fail(2, {"state_bytes": 0.5})
    study.complete(0, [9.0, 9.0])  # told already: stays
    found = trials(tmp_path)
    assert [trial.state for trial in found] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.RUNNING,
    ]
    assert found[0].values == [1.0, 2.0]
    assert found[0].user_attrs == {"hash": "abcd"}
    assert found[1].values is None
    assert found[2].constraints == {"state_bytes": 0.5}
    assert study.unfinished() == [3]


def test_whole_numbers_and_steps_stay_within_their_range(tmp_path: Path) -> None:
    study = open_study(tmp_path, "random")
    for _ in range(30):
        asked = study.ask()
        assert asked.number_in("n", Range(4, 32, 4, False, True)) in range(4, 33, 4)
        assert asked.number_in("step", Range(0.5, 2.0, 0.5, False, False)) in (0.5, 1.0, 1.5, 2.0)
        assert 1 <= asked.number_in("log", Range(1, 1024, None, True, True)) <= 1024


def test_a_journal_that_is_no_journal_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("not json\nat all\n")
    with pytest.raises(RunError, match=r"journal\.log: the study cannot be read .* edited or damaged"):
        open_study(tmp_path)
    (tmp_path / "journal.log").unlink()
    with pytest.raises(RunError, match="trial 7 of the event log is not in the study"):
        open_study(tmp_path).resume(7)
