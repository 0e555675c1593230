"""Influences and heat maps: a planted effect is found, chance is not, and few trials say nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from rich.cells import cell_len

from archspec.commands import main
from archspec.errors import EXIT_INVALID, EXIT_OK
from archspec.search.influence import chi_squared_tail, influences, share_and_p
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.report.analysis import levels
from archspec.search.report.choicemap import choice_maps
from archspec.search.trial import Trial

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
ACCURACY = Objective("recall/accuracy", "recall/accuracy", "maximize", 0.0)
TASKS = {"recall": {"kind": "recall", "primary": "recall/accuracy", "scores": {"recall/accuracy": "maximize"}}}


def planted(count: int, effect: float, seed: int = 0) -> Run:
    """Return a run where bias l2 adds ``effect`` to the accuracy, and nothing else does anything."""
    generator = random.Random(seed)
    run = Run(Path("nowhere"), objectives=[ACCURACY], tasks=TASKS)
    for number in range(count):
        bias, retention = generator.choice(["l2", "dot", "l1"]), generator.choice(["none", "decay"])
        drawn = {"main.bias": f"bias:{bias}", "main.retention": f"retention:{retention}", "width": generator.random()}
        if number % 2:
            drawn["only_then"] = generator.choice(["a", "b"])
        mean = 0.5 + effect * (bias == "l2") + 0.1 * generator.random()
        mixer = {"where": "blocks.main.mixer", "num_layers": 2, "memory": "matrix", "bias": bias,
                 "retention": retention, "update": "gradient_descent"}  # fmt: skip
        scores = {"recall/accuracy": {"mean": mean, "spread": 0.0, "interval": None, "n": 1}}
        run.trials[number] = Trial(number, state="trained", coordinates=drawn, mixers=[mixer], scores=scores)
    return run


@pytest.mark.parametrize("count", [40, 900])
def test_a_planted_effect_is_found_and_nothing_else(count: int) -> None:
    found = {item.parameter: item for item in influences(planted(count, 0.05), ACCURACY)}
    assert next(iter(found)) == "main.bias"
    assert found["main.bias"].verdict == "matters"
    assert found["main.bias"].best is not None
    assert found["main.bias"].best[0] == "l2"
    assert {item.verdict for name, item in found.items() if name != "main.bias"} == {"not enough evidence"}
    assert found["width"].num_values == 4, "a real number is taken by quarters"
    assert found["only_then"].n == count // 2
    assert found["only_then"].ped_anova is None
    others = {name: item.ped_anova or 0.0 for name, item in found.items()}
    if count == 900:
        assert max(others, key=lambda name: others[name]) == "main.bias"


def test_few_trials_are_no_evidence_however_large_the_effect() -> None:
    found = {item.parameter: item for item in influences(planted(12, 0.5), ACCURACY)}
    assert found["main.bias"].share is not None
    assert found["main.bias"].share > 0.5
    assert found["main.bias"].verdict == "not enough evidence"
    assert choice_maps(planted(12, 0.5), ACCURACY)[0].verdict == "not enough evidence"
    assert influences(planted(0, 0.0), ACCURACY) == []


def test_chance_is_called_evidence_about_as_rarely_as_it_should() -> None:
    false = sum(item.verdict == "matters" for seed in range(20)
                for item in influences(planted(30, 0.0, seed), ACCURACY, ped_anova=False))  # fmt: skip
    assert false <= 4, "at 0.05 over all parameters of a run, 1 in 20 is expected; 5 and more have odds of 1 in 400"


def test_the_share_is_that_of_an_analysis_of_variance_of_ranks() -> None:
    share, p = share_and_p(["a", "a", "b", "b"], [1.0, 2.0, 3.0, 4.0])
    assert share == pytest.approx(4.0 / 5.0)  # means 1.5 and 3.5 about 2.5, against 5.0 in all
    assert p == pytest.approx(1 / 3, abs=0.05), "2 of the 6 ways to part four ranks are as far apart"
    assert share_and_p(["a", "a"], [1.0, 2.0]) == (None, None)
    assert share_and_p(["a", "b"], [1.0, 1.0]) == (None, None)


@pytest.mark.parametrize(("x", "degrees"), [(3.841459, 1), (5.991465, 2), (7.814728, 3), (18.307038, 10)])
def test_the_tail_of_chi_squared_at_its_tabled_quantiles(x: float, degrees: int) -> None:
    assert chi_squared_tail(x, degrees) == pytest.approx(0.05, rel=1e-6)
    assert chi_squared_tail(0.0, degrees) == 1.0


def test_cells_hold_count_mean_and_best_of_their_trials() -> None:
    run = planted(60, 0.2)
    (found, other) = choice_maps(run, ACCURACY)
    assert found.verdict == "cells differ"
    assert (other.rows, other.columns, other.verdict) == (["matrix"], ["gradient_descent"], "not enough evidence")
    assert sum(cell.n for cell in found.cells) == 60
    for cell in found.cells:
        values = [t.scores["recall/accuracy"]["mean"] for t in run
                  if (t.mixers[0]["bias"], t.mixers[0]["retention"]) == (cell.row, cell.column)]  # fmt: skip
        assert (cell.n, cell.best) == (len(values), max(values))
        assert cell.mean == pytest.approx(fmean(values))
    shades = levels(found, ACCURACY)
    assert {pair[0] for pair, level in shades.items() if level >= 3} == {"l2"}
    assert found.cell("l2", "nothing") is None


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_analyze_prints_within_the_terminal(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = make_run(150)
    assert main(["analyze", str(folder)]) == EXIT_OK
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= columns
    text = " ".join(out.split())
    for part in ("recall accuracy ↑", "influence of drawn values", "bias x retention", "memory x update", "29 trials:"):
        assert part in text


def test_analyze_says_when_there_is_too_little(make_run: MakeRun, capsys: Captured) -> None:
    folder = str(make_run(20))
    assert main(["analyze", folder]) == EXIT_OK
    assert "3 sampled trials that have it: not enough evidence; required: at least 16." in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["analyze", folder, "--metric", "memory_capacity", "--json"]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert data["n"] == 17, "a training-free metric is known of every evaluated trial"
    assert data["objective"]["direction"] == "maximize"
    assert main(["analyze", folder, "--metric", "memory_capacitee"]) == EXIT_INVALID
    assert "Did you mean 'memory_capacity'?" in capsys.readouterr().err
