"""A space that grows keeps its history; any other change of the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from archspec import search
from archspec.errors import RunError
from archspec.search.growth import NotGrowth, additions
from archspec.search.names import Objective
from archspec.search.records import load_run
from archspec.search.rerun import replay_run
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Sampler
from archspec.search.study import SearchStudy

Load = Callable[..., SearchFile]
SMALL = (
    "cost.measure=false",
    "ladder[0].metrics=[non_embedding_parameters]",
    "ladder[0].promote={count: 2, by: [non_embedding_parameters], random: 1}",
    "ladder[0].candidates=4",
    "baselines=[]",
    "constraints={}",
    "space.layout=attention",
)


def test_what_counts_as_growth() -> None:
    def file(value: Any) -> dict[str, Any]:
        return {"space": {"a": value}, "variables": {}}

    def change(before: Any, after: Any) -> list[str]:
        return additions(file(before), file(after))

    assert change({"choice": [1, 2]}, {"choice": [1, 2, 3]}) == ["space.a: + 3"]
    nested = {"kind": "lp", "p": {"choice": [1]}}
    wider = {"kind": "lp", "p": {"choice": [1, 3]}}
    assert change({"choice": ["x", nested]}, {"choice": ["x", wider]}) == ["space.a/lp{p: *}.p: + 3"]
    assert change({"range": [1, 5], "step": 2}, {"range": [-1, 9], "step": 2}) == ["space.a: [1, 5] -> [-1, 9]"]
    for before, after in (
        ({"choice": [1, 2]}, {"choice": [1]}),
        ({"choice": [1, 2]}, {"choice": [3, 1, 2]}),
        ({"range": [1, 5], "step": 2}, {"range": [0, 5], "step": 2}),
        ({"range": [1, 5]}, {"range": [2, 5]}),
        ({"range": [1, 5]}, {"range": [1.0, 9.0]}),
        (1, 2),
        ({"b": 1}, {"b": 1, "c": 2}),
    ):
        with pytest.raises(NotGrowth):
            change(before, after)


@pytest.mark.parametrize("sampler", ["evolution", "tpe"])
def test_a_run_goes_on_in_a_larger_space_with_its_history(tmp_path: Path, tiny_file: Path, sampler: str) -> None:
    def start(trials: int, *overrides: str) -> search.SearchResult:
        given = [*SMALL, f"sampler={sampler}", *overrides]
        return search.run(tiny_file, runs_dir=tmp_path / "runs", executor="inprocess", overrides=given, trials=trials)

    first = start(4)
    assert first.status == "exhausted"  # of widths 16 and 24 there are but two architectures
    assert first.run.counts.accepted == 2
    before = {trial.number: (trial.hash, trial.coordinates, trial.scores) for trial in first.run}
    grown = start(6, "space.model_dim={choice: [16, 24, 32, 40, 48, 8]}")
    assert grown.run.counts.accepted == 6
    after = {trial.number: (trial.hash, trial.coordinates, trial.scores) for trial in grown.run}
    assert {number: after[number] for number in before} == before
    assert {trial.spec["model_dim"] for trial in grown.trials} == {8, 16, 24, 32, 40, 48}
    assert load_run(grown.folder).space_size["settings"] == 3 * first.run.space_size["settings"]
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(grown.folder / "journal.log"))
    )
    old, new = (optuna.load_study(study_name=name, storage=storage).trials for name in ("tiny", "tiny (grown 1)"))
    assert [trial.params for trial in new[: len(old)]] == [trial.params for trial in old]
    assert [trial.values for trial in new[: len(old)]] == [trial.values for trial in old]
    assert len(new) == grown.run.counts.sampled
    assert (grown.folder / "search-1.yaml").is_file()
    with pytest.raises(RunError, match=r"started from another search file(?s:.*)A space may grow"):
        start(6, "space.model_dim={choice: [16, 32]}")
    with pytest.raises(RunError, match="the space grew during this run"):
        replay_run(grown.folder)


def test_a_copy_that_a_kill_cut_short_is_completed(tmp_path: Path) -> None:
    objectives = (Objective("a", "a", "minimize"),)

    def opened(options: tuple[str, ...]) -> SearchStudy:
        return SearchStudy(tmp_path / "journal.log", "s", objectives, Sampler(), 0, {"x": options})

    study = opened(("x:1", "x:2"))
    for number in range(3):
        study.add({"x": "x:2"}, {"x": ("x:1", "x:2")})
        study.complete(number, [float(number)], {"soft": 0.5})
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log")))
    optuna.create_study(storage=storage, study_name="s (grown 1)")  # and nothing copied yet
    grown = opened(("x:1", "x:2", "x:3"))
    assert list(grown.completed()) == [(number, {"x": "x:2"}, [float(number)], 0.5) for number in range(3)]
    assert grown.ask().choose("x", ("x:1", "x:2", "x:3")) in ("x:1", "x:2", "x:3")
    assert opened(("x:1", "x:2", "x:3")).num_trials == 4
