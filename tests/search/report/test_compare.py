"""``archspec compare``: runs from one reference point, and refused where their scores mean different things."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from archspec.commands import main
from archspec.errors import EXIT_ERROR, EXIT_INVALID, EXIT_OK
from archspec.search import pareto
from archspec.search.eventlog import EVENTS
from archspec.search.records import load_run
from archspec.search.survey import losses_of, survey

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def variant(folder: Path, name: str, **opened: Any) -> Path:
    """Return a copy of a run under another name, cut to its first 30 trials, with parts of its opening replaced."""
    other = folder.with_name(name)
    shutil.copytree(folder, other)
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    events[0] |= {"study": name, **opened}
    kept = [event for event in events if event.get("trial", 0) < 30]
    for event in kept:
        event.update(
            {how: [number for number in event[how] if number < 30] for how in ("rank", "random") if how in event}
        )
    (other / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in kept))
    return other


def test_runs_are_measured_from_one_reference_point(make_run: MakeRun, capsys: Captured) -> None:
    whole = make_run(60)
    objectives = [goal.as_dict() for goal in load_run(whole).objectives]
    nearer = [{**objectives[0], "reference": 0.5}, *objectives[1:]]
    part = variant(whole, "part", seed=1, objectives=nearer)
    assert main(["compare", str(whole), str(part), "--json"]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    first, second = data["runs"]
    assert [goal["reference"] for goal in data["objectives"]] == [0.0, 8.0, 1048576.0], "the worse of two references"
    run = load_run(part)
    reference = [-0.0, 8.0, 1048576.0]
    expected = pareto.hypervolume(losses_of(run.contenders, run.objectives), reference)
    assert second["hypervolume"] == pytest.approx(expected)
    assert first["hypervolume"] == survey(load_run(whole)).hypervolume
    assert data["joint_hypervolume"] == pytest.approx(first["hypervolume"]), "the one run holds the other's trials"
    assert (first["compared"], second["compared"]) == (14, 8)
    assert len(data["shared"]) == 8
    assert second["best"]["recall/accuracy"] in run.trials


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_terminal(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    whole = make_run(60)
    assert main(["compare", str(whole), str(variant(whole, "part"))]) == EXIT_OK
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= columns
    text = " ".join(out.split())
    for part in ("quick", "part", "reference point", "8 architectures are in more than one of these runs", "best"):
        assert part in text


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (
            {
                "rungs": [
                    {"rung": "training_free", "tokens": None},
                    {"rung": "short_train", "tokens": 7, "promote": None},
                ]
            },
            "tokens of the last rung: 200000 -> 7",
        ),
        ({"tasks": {}, "objectives": []}, r"cannot be compared, for their scores mean different things:\n  quick -> "),
    ],
)
def test_runs_of_other_tasks_or_budgets_are_refused(
    make_run: MakeRun, capsys: Captured, opened: dict[str, Any], message: str
) -> None:
    whole = make_run(30)
    assert main(["compare", str(whole), str(variant(whole, "part", **opened))]) == EXIT_ERROR
    assert message.replace(r"\n", "\n") in capsys.readouterr().err


def test_runs_of_other_recipes_are_refused_by_their_search_files(make_run: MakeRun, capsys: Captured) -> None:
    whole = make_run(30)
    part = variant(whole, "part")
    for folder, rate in ((whole, 0.001), (part, 0.002)):
        recipe = f"training: {{batch_size: 4, weight_decay: {rate}}}"
        text = f"tasks: {{recall: {{kind: recall}}}}\n{recipe}\nladder: [{{rung: short_train}}]\n"
        (folder / "search.yaml").write_text(text)
    assert main(["compare", str(whole), str(part)]) == EXIT_ERROR
    assert "training.weight_decay: 0.001 -> 0.002" in capsys.readouterr().err


def test_one_run_or_the_same_twice_is_an_error(make_run: MakeRun, capsys: Captured) -> None:
    folder = str(make_run(20))
    for names in ([folder], [folder, folder]):
        assert main(["compare", *names]) == EXIT_INVALID
        assert "required: two or more different runs" in capsys.readouterr().err
    empty = variant(Path(folder), "empty")
    lines = (empty / EVENTS).read_text().splitlines(keepends=True)
    (empty / EVENTS).write_text("".join(lines[:3]))
    assert main(["compare", folder, str(empty)]) == EXIT_ERROR
    assert "no trial has every objective yet" in capsys.readouterr().err
