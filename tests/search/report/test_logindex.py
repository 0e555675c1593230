"""The index beside the log: the same run faster, never trusted over the log, rebuilt when it does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from archspec.errors import RunError
from archspec.search import logindex
from archspec.search.eventlog import EVENTS, Event, EventLog, read_events
from archspec.search.logindex import INDEX, decode, encode
from archspec.search.records import Run, load_run, replay

MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _small_logs_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logindex, "WORTH_BYTES", 1000)


def by_log(folder: Path) -> Run:
    return replay(folder, read_events(folder / EVENTS))


def folds_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the name of every event folded from now on."""
    seen: list[str] = []
    apply = Run.apply

    def noted(run: Run, event: Event) -> None:
        seen.append(event["event"])
        apply(run, event)

    monkeypatch.setattr(Run, "apply", noted)
    return seen


def complete(folder: Path) -> None:
    """Add the events that the fixture lacks, so that every field of a run holds something."""
    with EventLog(folder / EVENTS) as log:
        log.append("round", round=0, size=40)
        log.append("promoted", round=1, rung=0, rank=[3], random=[4], aggregates={})
        log.append("submitted", trial=6, key="k", stage="1/train/recall", rung=1, attempt=2)
        log.append("died", trial=6, key="k", stage="1/train/recall", reason="gone")
        low = {"recall/accuracy": {"mean": 0.5, "spread": 0.1, "interval": None, "n": 1}}
        log.append("finished", trial=7, key="low", stage="0/train/recall", rung=0, ok=True, wall_s=1.0,
                   value={"scores": low, "validation": low})  # fmt: skip
        log.append("exhausted", round=1)
        log.append("closed", round=0)
        log.append("lost", trial=6, key="k", stage="1/train/recall", reason="gone")
        for attempt in (1, 2):
            log.append("started", command="again", workers=1, device="cpu", trials=60)
            log.append("submitted", trial=8, key="m", stage="1/train/recall", rung=1, attempt=attempt)


def test_a_run_is_the_same_through_its_index(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(40)
    complete(folder)
    expected = by_log(folder)
    assert expected.running
    assert expected.deaths == expected.losses == {"k": 1}
    assert expected.interruptions == {"m": 1}
    assert expected.exhausted
    assert any(trial.low_fidelity for trial in expected)
    assert decode(encode(expected), folder) == expected
    assert load_run(folder) == expected
    assert (folder / INDEX).is_file()
    folded = folds_again(monkeypatch)
    assert load_run(folder) == expected
    assert folded == []


def test_what_was_appended_since_is_folded_on_top(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(40)
    load_run(folder)
    index = (folder / INDEX).read_bytes()
    with EventLog(folder / EVENTS) as log:
        log.append("started", command="again", workers=1, device="cpu", trials=60)
    with (folder / EVENTS).open("ab") as file:
        file.write(b'{"event": "stopped", "time"')  # a writer in the middle of a line
    folded = folds_again(monkeypatch)
    run = load_run(folder)
    assert folded == ["started"]
    assert run == by_log(folder)
    assert run.trials_wanted == 60
    assert (folder / INDEX).read_bytes() == index, "a short tail is folded sooner than an index is written"


@pytest.mark.parametrize("harm", ["an edited log", "a shorter log", "a torn index", "an edited index", "other code"])
def test_an_index_that_does_not_hold_is_written_anew(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    folder = make_run(40)
    load_run(folder)
    log, index = folder / EVENTS, folder / INDEX
    if harm == "an edited log":
        log.write_bytes(log.read_bytes().replace(b'"study":"quick"', b'"study":"quack"', 1))
    elif harm == "a shorter log":
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-20]))
    elif harm == "a torn index":
        index.write_bytes(index.read_bytes()[:3000])
    elif harm == "an edited index":
        index.write_bytes(index.read_bytes().replace(b"transformer", b"transfarmer"))
    else:
        monkeypatch.setattr(logindex, "_code", lambda: "another")
    expected = by_log(folder)
    folded = folds_again(monkeypatch)
    assert load_run(folder) == expected
    assert len(folded) == log.read_bytes().count(b"\n")
    covered = json.loads(index.read_bytes().partition(b"\n")[0])["log_bytes"]
    assert covered == log.stat().st_size
    del folded[:]
    assert load_run(folder) == expected
    assert folded == []


def test_a_damaged_log_is_named_by_line_index_or_not(make_run: MakeRun) -> None:
    folder = make_run(40)
    load_run(folder)
    with (folder / EVENTS).open("ab") as file:
        file.write(b'garbage\n{"event":"later"}\n')
    lines = (folder / EVENTS).read_bytes().count(b"\n") - 1
    with pytest.raises(RunError, match=rf"events\.jsonl:{lines}: not an event; the log was edited or damaged"):
        load_run(folder)
    (folder / EVENTS).write_bytes(
        (folder / EVENTS).read_bytes().replace(b'{"event":"proposed"', b'"event":"proposed"', 1)
    )
    with pytest.raises(RunError, match=r"events\.jsonl:3: not an event; the log was edited or damaged"):
        load_run(folder)


def test_a_small_log_needs_no_index(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logindex, "WORTH_BYTES", 1 << 20)
    folder = make_run(20)
    load_run(folder)
    assert not (folder / INDEX).exists()
