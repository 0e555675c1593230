"""The report's data and file: what it says of a run, and that no text of a user's can leave its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archspec.errors import RunError
from archspec.search.eventlog import EVENTS, EventLog
from archspec.search.records import load_run
from archspec.search.report import figures, write_report
from archspec.search.report.coordinates import coordinates
from archspec.search.report.figures import Entry, number, with_spread
from archspec.search.report.page import embed_json
from archspec.search.report.payload import report_data
from archspec.search.report.spectext import spec_text
from archspec.search.survey import survey
from archspec.yamltext import parse

MakeRun = Callable[..., Path]


def data_in(report: Path) -> dict[str, Any]:
    """Return the data that a report carries, read the way a browser does: up to the first closing tag."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(), re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_report_says_what_the_run_holds(make_run: MakeRun) -> None:
    folder = make_run(40)
    data = data_in(write_report(folder))
    assert data["study"] == "quick"
    assert data["status"] == {"text": "finished", "finished": True}
    assert dict(data["counts"])["rejected"] == "2"
    assert dict(data["counts"])["duplicates"] == "1"
    assert data["rejected"] == [["constraint state_bytes: state_bytes is 2097152, over the maximum of 1048576", 2]]
    assert [trial["number"] for trial in data["trials"]] == list(range(40))
    fifth = data["trials"][5]
    assert fifth["values"]["recall/accuracy"]["n"] == 3
    assert fifth["values"]["state_bytes"]["mean"] == 32768
    assert fifth["coordinates"][0]["bias"] == "lp p=3"
    assert [curve["task"] for curve in fifth["curves"]] == ["recall", "text"]
    assert data["trials"][4]["curves"] == []
    assert [row["verdict"] for row in data["correlations"]] == ["not enough evidence", "predicts", "misleads"]


def test_the_front_is_that_of_the_objectives(make_run: MakeRun) -> None:
    run = load_run(make_run(60))
    found = survey(run)

    def losses(n: int) -> tuple[float, ...]:
        values = run.objective_values(run.trials[n])
        assert values is not None
        return (-values[0], values[1], values[2])

    trained = [trial.number for trial in run.trained]
    beaten = {
        n
        for n in trained
        if any(
            losses(m) != losses(n) and all(a <= b for a, b in zip(losses(m), losses(n), strict=True)) for m in trained
        )
    }
    assert found.front == frozenset(trained) - beaten
    assert beaten, "the fixture must hold a trial behind the front, or nothing is tested"
    assert found.knee in found.front
    assert found.hypervolume is not None
    assert found.baseline_hypervolume is not None
    assert 0 < found.baseline_hypervolume < found.hypervolume


def test_three_hundred_trials_stay_small(make_run: MakeRun) -> None:
    report = write_report(make_run(300))
    assert report.stat().st_size < 1_500_000
    assert "://" not in re.sub(r'"http://www\.w3\.org/2000/svg"', "", report.read_text()), "nothing may be fetched"


def test_a_run_that_has_only_started_has_a_report(make_run: MakeRun) -> None:
    data = data_in(write_report(make_run(3, status=None)))
    assert data["status"] == {"text": "running", "finished": False}
    assert data["correlations"] == []
    assert "No correlation yet" in data["correlation_note"]


def test_failures_and_scores_without_a_number_are_told(make_run: MakeRun) -> None:
    folder = make_run(10, status=None)
    reason = "TrialDiverged: loss 38.1 at step 212 is over 4 times the first"
    key = "0004-1-train-recall"
    shared = {"trial": 4, "key": key, "stage": "1/train/recall", "rung": 1}
    result = {"status": "failed", "reason": reason, "value": {}, "spec": load_run(folder).trials[4].spec, "plan": []}
    (folder / "results" / f"{key}.json").write_text(json.dumps(result))
    broken = {"mean": None, "spread": None, "interval": None, "n": 1}
    value = {"scores": {"recall/accuracy": broken}, "validation": {"recall/accuracy": broken}}
    with EventLog(folder / EVENTS) as log:
        log.append("finished", **shared, ok=False, reason=reason, wall_s=1.0)
        log.append("finished", **{**shared, "trial": 6, "stage": "1/train/text"}, ok=True, value=value, wall_s=1.0)
    data = data_in(write_report(folder))
    assert data["failed"] == [[reason, 1]]
    assert (data["trials"][4]["state"], data["trials"][4]["reason"]) == ("failed", reason)
    assert "recall/accuracy" not in data["trials"][6]["values"]


def test_a_run_with_one_objective_and_no_reference_has_no_hypervolume(make_run: MakeRun) -> None:
    folder = make_run(10)
    lines = (folder / EVENTS).read_text().splitlines()
    opened = json.loads(lines[0])
    opened["objectives"] = [{**opened["objectives"][0], "reference": None}]
    (folder / EVENTS).write_text("\n".join([json.dumps(opened), *lines[1:], ""]))
    data = data_in(write_report(folder))
    assert data["hypervolume"] == [["hypervolume", "none: the search file gives no reference for every objective"]]
    assert [trial["number"] for trial in data["trials"] if trial["front"]] == [1]


def test_many_untrained_trials_are_left_out_and_counted(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archspec.search.report.payload.MAX_TRIALS", 20)
    found = report_data(load_run(make_run(40)))
    assert len(found["trials"]) == 20
    assert sum(trial["state"] == "trained" for trial in found["trials"]) == 10
    assert found["trials_note"] == "20 untrained trials are left out of this page."


def test_many_trained_trials_keep_the_front_the_baselines_and_the_best(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archspec.search.report.payload.MAX_TRIALS", 13)
    monkeypatch.setattr("archspec.search.report.payload.MAX_DETAILED", 12)
    run = load_run(make_run(60))
    found = report_data(run)
    shown = {trial["number"]: trial for trial in found["trials"]}
    assert len(shown) == 13
    assert survey(run).front <= shown.keys()
    assert {0, 1, 2} <= shown.keys()
    assert found["trials_note"] == "46 untrained and 1 trained trials are left out of this page."
    brief = [trial for trial in shown.values() if trial["elsewhere"]]
    assert len(brief) == 1
    assert brief[0]["elsewhere"] == f"archspec show {run.folder} {brief[0]['number']}"
    assert brief[0]["values"]
    assert all(trial["spec"] for trial in shown.values() if not trial["elsewhere"])


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run here \(events.jsonl is missing\)"):
        write_report(tmp_path)


def test_a_report_is_whole_or_absent(make_run: MakeRun) -> None:
    folder = make_run(5)
    before = sorted(path.name for path in folder.iterdir())
    (folder / "report.html").mkdir()
    with pytest.raises(RunError, match="choose another file with -o"):
        write_report(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "report.html"])


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_json_holds_no_markup_and_reads_back(value: object) -> None:
    text = embed_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_embedded_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed_json({"score": math.nan})


SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(max_size=30)


@given(
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_", min_size=1), inner)
    )
)
def test_spec_text_reads_back_as_it_was(value: object) -> None:
    document = {"name": "x", "value": value}
    assert parse(spec_text(document), "spec") == document


@pytest.mark.parametrize(
    "text", ["1e-3", "3:1", "no", "null", "true", "0x1f", "2023-13-45", "~", "", "- a", "1_000", "@@"]
)
def test_spec_text_quotes_what_could_be_taken_for_something_else(text: str) -> None:
    assert parse(spec_text({"name": text}), "spec") == {"name": text}


def test_coordinates_of_nested_mixers_count_their_layers() -> None:
    inner = {"memory": "matrix", "update": "gradient_descent", "retention": {"kind": "decay", "gate": "kda"}}
    attention = {"memory": {"kind": "kv", "window": 64}, "update": "nonparametric"}
    spec = {
        "blocks": {
            "main": {"mixer": {"kind": "parallel", "of": {"a": inner, "b": attention}}},
            "cell": {"mixer": {"kind": "cell", "num_heads": 2}},
            "unused": {"mixer": inner},
        },
        "layout": {"cycle": 5, "of": [{"repeat": 2, "of": "main"}, "cell"]},
    }
    assert [item.line() for item in coordinates(spec)] == [
        "4x matrix / l2 / decay(kda) / gradient_descent",
        "4x kv window=64 / l2 / none / nonparametric",
        "1x cell / - / - / -",
    ]


def test_coordinates_agree_with_the_written_out_form() -> None:
    short = {"memory": "matrix", "update": {"kind": "gradient_descent", "anchor": 16}}
    long = {
        "memory": {"kind": "matrix", "scale": None},
        "bias": {"kind": "l2", "window": None},
        "retention": {"kind": "none"},
        "update": {"kind": "gradient_descent", "anchor": {"every": 16}},
    }
    layouts: list[Any] = [
        {"repeat": 2, "of": "main"},
        {"kind": "repeat", "repeat": 2, "of": {"kind": "block", "name": "main"}},
    ]
    found = [
        coordinates({"blocks": {"main": {"mixer": mixer}}, "layout": layout})
        for mixer, layout in zip((short, long), layouts, strict=True)
    ]
    assert found[0] == found[1]
    assert found[0][0].line() == "2x matrix / l2 / none / gradient_descent@16"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.91234, "", "0.912"),
        (12345.6, "", "12346"),
        (1.5e-5, "", "1.50e-05"),
        (0, "", "0.00"),
        (94213, "count", "94.2k"),
        (8192, "bytes", "8 KiB"),
        (1000, "bytes", "1000 B"),
        (41.25, "ms", "41.2 ms"),
        (None, "", "-"),
    ],
)
def test_numbers_are_short_and_carry_their_unit(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_a_mean_has_the_decimals_its_spread_supports() -> None:
    assert with_spread(Entry(0.91234, 0.0121)) == "0.912±0.012"
    assert with_spread(Entry(-412.3, 16.2)) == "-412±16"
    assert with_spread(Entry(0.5, 0.0)) == "0.500"
    assert with_spread(None) == "-"


def test_names_are_readable() -> None:
    names = ("decode_ms_per_token", "train_step_ms", "peak_memory_bytes", "text/bits_per_byte", "flops_per_token")
    found = [figures.readable(name) for name in names]
    assert found == ["decode per token", "train step", "peak memory", "text bits per byte", "FLOPs per token"]
