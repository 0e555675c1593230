"""The benchmarks of the search, as far as they decide what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archspec.search.executors import Outcome
from archspec.search.searchfile import plain
from archspec.yamltext import parse
from benchmarks import arms, duplicates, kills
from benchmarks.arms import Axis, Metered


def test_arms_differ_in_sampler_and_ladder_alone() -> None:
    plan = plain(parse(arms.PLAN.read_bytes(), str(arms.PLAN)))
    found = {name: arms.search_of(plan, name, 3) for name in plan["arms"]}
    assert [search.settings.sampler.kind for search in found.values()] == ["random", "random", "tpe"]
    assert [len(search.settings.ladder) for search in found.values()] == [1, 3, 3]
    assert len({search.settings.ladder[-1].tokens for search in found.values()}) == 1
    assert {search.settings.seed for search in found.values()} == {3}
    assert len({search.space.size for search in found.values()}) == 1
    axes = [Axis(**axis) for axis in plan["axes"]]
    goals = next(iter(found.values())).objectives
    assert [axis.objective for axis in axes] == [goal.metric for goal in goals]
    assert [axis.reference for axis in axes] == [goal.reference for goal in goals]


def test_a_front_is_measured_on_scaled_axes() -> None:
    axes = [Axis("a", 0.5, 1.0, "linear"), Axis("b", 1024, 1, "log")]
    assert [axes[0].place(0.75), axes[1].place(32)] == [pytest.approx(0.5), pytest.approx(0.5)]
    assert arms.volume([[0.75, 32]], axes) == pytest.approx(0.25)
    assert arms.volume([[0.75, 32], [1.0, 512], [0.4, 1], [0.6, 64]], axes) == pytest.approx(0.25 + 0.5 * 0.1)
    assert arms.volume([], axes) == 0.0


def test_what_exceeds_the_budget_does_not_count_also_after_a_restart(tmp_path: Path) -> None:
    path, stops = tmp_path / "spent.jsonl", list[str]()
    path.write_text("".join(json.dumps({"key": key, "cpu_s": 2.0}) + "\n" for key in "abc"))
    workers = Metered(path, 7.0, stops.append)
    assert (workers.within, stops) == ({"a", "b", "c"}, [])
    workers = Metered(path, 5.0, stops.append)
    assert (workers.within, stops) == ({"a", "b"}, ["spent"])
    assert workers.wait(0.0) == list[Outcome]()


def test_duplicates_are_counted_by_architecture() -> None:
    drawn, evaluations, repeats, _ = duplicates.ours("evolution", 12, 0)
    assert (evaluations, repeats) == (12, 0)
    assert drawn >= 12
    assert duplicates.stock("NSGAIISampler", 12, 0)[1] == 12


def test_a_search_that_was_killed_is_judged_by_its_log_and_its_results(tmp_path: Path) -> None:
    search, tally = kills.Search(tmp_path, "inprocess", None, fork=False), kills.Tally(drivers=2, workers=1)
    (search.run / "results").mkdir(parents=True)
    (search.run / "results" / "a.json").write_text("{}")
    lines: list[dict[str, object]] = [{"event": "submitted", "key": "a"}, {"event": "submitted", "key": "a"}]
    lines.append({"event": "finished", "key": "a", "ok": True, "reason": ""})

    def judged(*more: dict[str, object]) -> bool:
        events = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [*lines, *more])
        (search.run / "events.jsonl").write_text(events)
        kills.note(search, tally)
        return kills.is_fine(kills.outcome(search, tally))

    assert judged()
    assert search.so_far()[1] == 1
    assert not judged({"event": "submitted", "key": "b"})  # asked for, and never finished
    assert not judged({"event": "submitted", "key": "a"})  # repeated
    assert not judged({"event": "finished", "key": "a", "ok": False, "reason": "cap"})
    (search.run / "results" / "a.json").write_text("{ }")
    assert not judged()  # another result than was seen before
    tally.write(tmp_path)
    assert kills.Tally.read(tmp_path) == tally
    assert tally.kills == 3
