"""Fronts over any recorded figures, and how the hypervolume grew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from archspec.commands import main
from archspec.errors import EXIT_INVALID, EXIT_OK, UsageError
from archspec.search import pareto
from archspec.search.records import load_run
from archspec.search.report.axes import along
from archspec.search.report.payload import report_data
from archspec.search.survey import history, losses_of, survey

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def test_a_front_over_training_free_metrics_is_over_all_that_were_evaluated(make_run: MakeRun) -> None:
    run, worst = along(load_run(make_run(40)), ["recall_at_init", "flops_per_token"], {"recall_at_init": 0.0})
    assert worst == ["flops_per_token"]
    assert [goal.direction for goal in run.objectives] == ["maximize", "minimize"]
    assert len(run.contenders) == 40
    alive = [trial for trial in run if trial.state != "rejected"]
    rows = [(-trial.training_free["recall_at_init"]["mean"], trial.figures["flops_per_token"]) for trial in alive]
    expected = {n for n, row in enumerate(rows) if not any(pareto.dominates(other, row) for other in rows)}
    found = survey(run)
    assert found.front == expected
    assert found.hypervolume == pytest.approx(pareto.hypervolume(rows, (0.0, max(row[1] for row in rows))))


def test_a_score_among_the_objectives_leaves_the_trained(make_run: MakeRun) -> None:
    run, worst = along(load_run(make_run(40)), ["recall/accuracy", "train_step_ms:max", "hidden_covariance:min"], {})
    assert {trial.state for trial in run.contenders} == {"trained"}
    assert [goal.direction for goal in run.objectives] == ["maximize", "maximize", "minimize"]
    assert worst == ["train_step_ms", "hidden_covariance"]  # the search file has a reference for accuracy


@pytest.mark.parametrize(
    ("names", "references", "message"),
    [
        (["recall_at_ini"], {}, r"unknown recorded figure 'recall_at_ini'; known: .* Did you mean 'recall_at_init'\?"),
        (["recall_at_init:up"], {}, "found direction 'up'; required: max or min, as in recall_at_init:max"),
        (["state_bytes", "state_bytes"], {}, "required: 1 to 6 different names"),
        (["state_bytes"], {"stat": 1.0}, "--reference stat: unknown objective 'stat'"),
        (["validation:recall/accuracy"], {}, "unknown recorded figure 'validation'|found direction"),
    ],
)
def test_what_cannot_be_an_axis_is_named(
    make_run: MakeRun, names: list[str], references: dict[str, float], message: str
) -> None:
    run = load_run(make_run(10))
    with pytest.raises(UsageError, match=message):
        along(run, names, references)


def test_the_hypervolume_over_the_trials_is_that_of_every_prefix(make_run: MakeRun) -> None:
    run = load_run(make_run(60))
    moments = history(run)
    assert [moment.num_trials for moment in moments] == list(range(1, 15))
    trials = sorted(run.contenders, key=lambda trial: (trial.finished or 0.0, trial.number))
    reference = [goal.loss(goal.reference or 0.0) for goal in run.objectives]
    for moment in moments:
        losses = losses_of(trials[: moment.num_trials], run.objectives)
        assert moment.hypervolume == pytest.approx(pareto.hypervolume(losses, reference), rel=1e-12)
        assert moment.seconds is not None
        assert moment.seconds >= 0
    assert moments[-1].hypervolume == survey(run).hypervolume
    few = history(run, num_points=4)
    assert [moment.num_trials for moment in few] == [4, 7, 10, 14]
    assert few[-1] == moments[-1]
    assert report_data(run)["history"][-1][2] == moments[-1].hypervolume


@pytest.mark.parametrize("columns", [80, 120])
def test_pareto_over_other_objectives_leaves_the_run_its_report(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = make_run(60)
    command = ["pareto", str(folder), "--objectives", "memory_capacity:max,parameters,recall/accuracy"]
    assert main([*command, "--reference", "parameters=200000"]) == EXIT_OK
    shown = capsys.readouterr()
    assert max(map(cell_len, shown.out.splitlines())) <= columns
    text = " ".join(shown.out.split())
    assert "trained trials are on the front over memory capacity ↑, parameters ↓, recall accuracy ↑" in text
    assert "over the trials ▁" in text
    assert "is the reference for memory_capacity:" in text
    assert not (folder / "report.html").exists()
    assert main([*command, "--json", "-o", str(folder / "other.html")]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert data["worst_as_reference"] == ["memory_capacity", "parameters"]
    assert data["hypervolume_history"][-1]["hypervolume"] == data["hypervolume"]
    assert (folder / "other.html").is_file()


def test_a_reference_alone_or_without_a_number_is_an_error(make_run: MakeRun, capsys: Captured) -> None:
    folder = str(make_run(10))
    assert main(["pareto", folder, "--reference", "state_bytes=1"]) == EXIT_INVALID
    assert "--reference belongs to --objectives" in capsys.readouterr().err
    assert main(["pareto", folder, "--objectives", "state_bytes", "--reference", "state_bytes=big"]) == EXIT_INVALID
    assert "required: NAME=VALUE, such as recall/accuracy=0.0" in capsys.readouterr().err
