"""A space that grows keeps its history; any other change of the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from archspec import search
from archspec.errors import RunError
from archspec.search.eventlog import Event, read_events
from archspec.search.growth import NotGrowth, additions
from archspec.search.names import Objective
from archspec.search.records import load_run
from archspec.search.rerun import replay_run
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Sampler
from archspec.search.storage import with_driver
from archspec.search.study import SearchStudy

Load = Callable[..., SearchFile]


class Crash(BaseException):
    """Ends a search as nothing of archspec's expects."""


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


@pytest.mark.parametrize(("sampler", "place"), [("evolution", "journal"), ("tpe", "journal"), ("tpe", "postgresql")])
def test_a_run_goes_on_in_a_larger_space_with_its_history(
    tmp_path: Path, tiny_file: Path, sampler: str, place: str, request: pytest.FixtureRequest
) -> None:
    url = None if place == "journal" else request.getfixturevalue(place)

    def start(trials: int, *overrides: str) -> search.SearchResult:
        given = [*SMALL, f"sampler={sampler}", *overrides]
        return search.run(
            tiny_file,
            runs_dir=tmp_path / "runs",
            executor="inprocess",
            overrides=given,
            trials=trials,
            storage=url,
        )

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
    storage = with_driver(url) if url is not None else opened_journal(grown.folder)
    old, new = (optuna.load_study(study_name=name, storage=storage).trials for name in ("tiny", "tiny (grown 1)"))
    assert [trial.params for trial in new[: len(old)]] == [trial.params for trial in old]
    assert [trial.values for trial in new[: len(old)]] == [trial.values for trial in old]
    assert len(new) == grown.run.counts.sampled
    assert (grown.folder / "search-1.yaml").is_file()
    with pytest.raises(RunError, match=r"started from another search file(?s:.*)A space may grow"):
        start(6, "space.model_dim={choice: [16, 32]}")
    wider = "space.blocks.attention.feed_forward={kind: swiglu, expansion: {range: [1.0, 2.0]}}"
    with pytest.raises(RunError, match="started from another search file"):
        start(6, wider)
    assert_replays(grown.folder)


def opened_journal(folder: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))


def assert_replays(folder: Path) -> None:
    logged = [event["event"] for event in read_events(folder / "events.jsonl")]
    verified = replay_run(folder).verified
    assert {name: logged.count(name) for name in verified} == verified
    assert {"round", "proposed", "finished", "promoted", "closed"} <= verified.keys()


def test_a_run_that_grew_twice_in_the_middle_of_a_round_can_be_replayed(tmp_path: Path, tiny_file: Path) -> None:
    """A wider range leaves the number of settings as it is; and the run is cut short between the two."""

    def start(high: float, widths: str, stop: int | None = None) -> search.SearchResult:
        given = [*SMALL, "sampler=evolution", f"space.model_dim={{choice: {widths}}}"]
        given.append(f"space.blocks.attention.feed_forward={{kind: swiglu, expansion: {{range: [1.0, {high}]}}}}")
        seen: list[Event] = []

        def on_event(event: Event) -> None:
            seen.extend([event] if event["event"] == "finished" else [])
            if len(seen) == stop:
                raise Crash

        return search.run(
            tiny_file,
            runs_dir=tmp_path / "runs",
            executor="inprocess",
            overrides=given,
            trials=8,
            on_event=on_event,
        )

    with pytest.raises(Crash):
        start(2.0, "[16, 24]", 2)
    with pytest.raises(Crash):
        start(4.0, "[16, 24]", 3)
    found = start(4.0, "[16, 24, 32]")
    events = list(read_events(found.folder / "events.jsonl"))
    assert [event["generation"] for event in events if event["event"] == "grown"] == [1, 2]
    assert found.run.generation == load_run(found.folder).generation == 2
    assert_replays(found.folder)
    (found.folder / "search-1.yaml").write_text((found.folder / "search-2.yaml").read_text())
    with pytest.raises(RunError, match="replay: event 3 of the log differs in "):  # not what it was drawn from
        replay_run(found.folder)


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
