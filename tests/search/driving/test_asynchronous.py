"""The asynchronous ladder: its rule on its own, and whole searches in which evaluations are instant or real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from archspec.search import eventlog
from archspec.search.driver import Driver, Limits
from archspec.search.executors import Outcome, Request
from archspec.search.files import write_json
from archspec.search.ladder import Halving, expected_shares
from archspec.search.records import Run, load_run
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Promote
from archspec.search.trial import Trial

Load = Callable[..., SearchFile]
LADDER = """ladder=[
  {rung: training_free, candidates: 12, metrics: [non_embedding_parameters],
   promote: {fraction: 0.5, by: [non_embedding_parameters], random: 0.5}},
  {rung: short_train, tokens: 320, promote: {fraction: 0.5, random: 0.5}},
  {rung: short_train, tokens: 640}]"""
WIDE = (
    "variables.head_dim={choice: [2, 4, 8, 16]}",
    "space.model_dim={choice: [16, 24, 32, 40]}",
    "constraints={}",
    "asynchronous=true",
)


def score(request: Request) -> float:
    """Return a made-up score of an architecture: the same for the same hash and budget."""
    return float(int(request["hash"][:6], 16) / 16**6 + request.get("tokens", 0) * 1e-6)


class Instant:
    """An executor whose evaluations take no time but a number of turns, by a rule of the test."""

    def __init__(self, capacity: int, turns: Callable[[Request], int], crash_after: int | None = None) -> None:
        self.capacity = capacity
        self.seen: list[tuple[int, str]] = []
        self.idle: list[tuple[int, int]] = []  # at each turn: evaluations started so far, workers without work
        self._turns, self._left = turns, dict[str, int]()
        self._requests: dict[str, Request] = {}
        self._crash_after = crash_after

    def submit(self, request: Request) -> None:
        self.seen.append((request["trial"], request["stage"]))
        self._requests[request["key"]], self._left[request["key"]] = request, self._turns(request)

    def wait(self, timeout_s: float) -> list[Outcome]:
        if timeout_s == 0.0:
            return []  # the driver is still filling idle workers
        self.idle.append((len(self.seen), self.capacity - len(self._left)))
        found = []
        for key in list(self._left):
            self._left[key] -= 1
            if self._left[key] <= 0:
                del self._left[key]
                found.append(self._finish(self._requests[key]))
        return found

    def cancel(self, key: str) -> None:
        self._left.pop(key, None)

    def shutdown(self) -> None:
        self._left.clear()

    def _finish(self, request: Request) -> Outcome:
        crashing = self._crash_after is not None and self._crash_after < 1
        if self._crash_after is not None:
            self._crash_after -= 1
        if crashing and request["trial"] % 2:  # before the result is in its place, or after
            raise KeyboardInterrupt
        names = ("key", "trial", "stage", "rung", "kind", "hash", "spec", "plan")
        value: dict[str, Any] = {}
        if request["kind"] == "training_free":
            value = {"metrics": {"non_embedding_parameters": {"mean": score(request), "spread": 0.0}}}
        elif request["kind"] == "train":
            found = {"mean": score(request), "spread": 0.0, "interval": None, "n": 1}
            scores = dict.fromkeys(("recall/accuracy", "recall/loss_nats"), found)
            value = {"scores": scores, "validation": scores, "curve": []}
        result = {name: request[name] for name in names} | {"status": "ok", "reason": "", "traceback": ""}
        write_json(
            Path(request["results"]) / f"{request['key']}.json",
            {**result, "value": value, "started": 0.0, "wall_s": 1.0},
        )
        if crashing:
            raise KeyboardInterrupt
        return Outcome(request["key"], "finished")


def run_with(search: SearchFile, folder: Path, executor: Instant, trials: int = 40) -> Run:
    with RunFolder(folder, search) as opened:
        driver = Driver(search, opened, executor, Limits(trials))
        driver.execute()
    return driver.run


def asynchronous(load: Load, *overrides: str) -> SearchFile:
    return load(LADDER, *WIDE, "cost.measure=false", "sampler=evolution", *overrides)


def test_shares_of_counts_and_fractions(load_tiny: Load) -> None:
    fractions = expected_shares(asynchronous(load_tiny).settings)
    # half goes on, half of it by lot: a quarter of all; on the next rung, a quarter again, of the half whom lot brought
    assert fractions == [(0.5, 0.5, 0.25), (0.5, 0.5, 0.5)]
    counts = load_tiny("ladder[0].promote={count: 3, random: 1}", "asynchronous=true")
    (shares,) = expected_shares(counts.settings)
    assert shares == pytest.approx((1 / 2, 1 / 3, 1 / 6))
    assert Promote.model_validate({"fraction": 0.3}).numbers(10) == (3, 1)
    with pytest.raises(ValueError, match="either 'count' or 'fraction'"):
        Promote.model_validate({"by": ["a"]})
    with pytest.raises(ValueError, match="random: 2 is more than 1"):
        Promote.model_validate({"fraction": 0.5, "random": 2})


def test_of_n_who_finish_the_stated_share_goes_on_by_rank_and_lot_does_not_look(load_tiny: Load) -> None:
    search = asynchronous(load_tiny)
    halving, by_rank, by_lot = Halving(search), list[int](), list[int]()
    for number in range(400):
        trial = Trial(number)
        trial.figures = {"non_embedding_parameters": 1000.0}
        trial.training_free = {"non_embedding_parameters": {"mean": float((number * 37) % 400), "spread": 0.0}}
        for decision in halving.finish(trial, 0):
            (by_rank if decision.how == "rank" else by_lot).append(decision.number)
        assert len(by_rank) == (number + 1) // 4
    values = [(number * 37) % 400 for number in by_lot]
    assert abs(len(by_lot) - 100) < 44  # binomial: five standard deviations of 8.7
    assert abs(sum(values) / len(values) - 200) < 60  # the mean of a fair sample: five standard errors of 11.5
    assert sum((number * 37) % 400 for number in by_rank) / len(by_rank) < 130  # fewer parameters rank first
    assert not set(by_rank) & set(by_lot)


def test_no_worker_waits_while_there_is_something_to_draw(tmp_path: Path, load_tiny: Load) -> None:
    """Evaluations of very different lengths keep five workers busy to the end of the drawing; rounds would not."""

    def turns(request: Request) -> int:
        return int(1 + int(request["hash"][:2], 16) % 9 * (1 + request["rung"]))

    workers = Instant(5, turns)
    run = run_with(asynchronous(load_tiny), tmp_path / "run", workers, trials=60)
    assert run.status == "finished"
    assert run.counts.accepted == 60
    last_draw = max(place for place, (_, stage) in enumerate(workers.seen) if stage == "0/training_free")
    assert last_draw > 0.6 * len(workers.seen)
    assert all(idle == 0 for started, idle in workers.idle if started <= last_draw)
    stages = [stage for _, stage in workers.seen]
    assert stages.index("2/train/recall") < last_draw  # the top rung was reached long before the first was done
    promoted = {rung: run.promotions[0, rung] for rung in (0, 1)}
    assert len(promoted[0]["rank"]) == 60 // 4
    assert set(promoted[1]["random"]) <= set(promoted[0]["random"])
    trained = [trial for trial in run if trial.state == "trained" and trial.origin == "sampled"]
    assert {trial.number for trial in trained} == {*promoted[1]["rank"], *promoted[1]["random"]}
    for trial in trained:  # low-fidelity values stay apart from final ones
        assert trial.low_fidelity[1]["recall/accuracy"]["mean"] < trial.scores["recall/accuracy"]["mean"]
    states = told(tmp_path / "run")
    offset = run.counts.baselines
    for trial in run:
        if trial.origin == "sampled":
            expected = {"trained": "COMPLETE", "evaluated": "PRUNED", "rejected": "FAIL"}[trial.state]
            assert states[trial.number - offset] == expected


def told(folder: Path) -> list[str]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
    return [trial.state.name for trial in optuna.load_study(study_name="tiny", storage=storage).trials]


def decisions(folder: Path) -> list[Any]:
    """Return what was decided, in order, without times."""
    kept = ("proposed", "rejected", "promoted", "finished", "exhausted", "closed", "round")
    events = [event for event in eventlog.read_events(folder / "events.jsonl") if event["event"] in kept]
    return [{name: value for name, value in event.items() if name != "time"} for event in events]


@pytest.mark.parametrize("sampler", ["evolution", "tpe"])
def test_with_one_worker_a_kill_at_any_moment_changes_no_decision(
    tmp_path: Path, load_tiny: Load, sampler: str
) -> None:
    search = asynchronous(load_tiny, f"sampler={{kind: {sampler}, startup: 6}}")
    run_with(search, tmp_path / "whole", Instant(1, lambda _: 1), trials=16)
    starts: Sequence[int | None] = (3, 1, 6, 4, 9, None)
    for crash_after in starts:
        executor = Instant(1, lambda _: 1, crash_after)
        if crash_after is None:
            run_with(search, tmp_path / "cut", executor, trials=16)
            continue
        with pytest.raises(KeyboardInterrupt):
            run_with(search, tmp_path / "cut", executor, trials=16)
        with (tmp_path / "cut" / "events.jsonl").open("ab") as log:
            log.write(b'{"event": "torn')
    assert decisions(tmp_path / "cut") == decisions(tmp_path / "whole")
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    finished = [event["key"] for event in decisions(tmp_path / "cut") if event["event"] == "finished"]
    assert len(finished) == len(set(finished))


def test_more_trials_continue_and_nothing_that_was_closed_is_promoted(tmp_path: Path, load_tiny: Load) -> None:
    search = asynchronous(load_tiny)
    first = run_with(search, tmp_path / "run", Instant(3, lambda _: 1), trials=12)
    before = {trial.number: trial.state for trial in first}
    run = run_with(search, tmp_path / "run", Instant(3, lambda _: 1), trials=24)
    assert run.counts.accepted == 24
    assert {number: run.trials[number].state for number in before} == before
    assert {index for index, _ in run.promotions} == {0, 1}
    assert load_run(tmp_path / "run").counts == run.counts
