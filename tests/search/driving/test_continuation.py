"""Rungs that continue from the one below, and budgets in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archspec import search
from archspec.errors import SpecError
from archspec.search.recipe import Recipe
from archspec.search.searchfile import SearchFile

Load = Callable[..., SearchFile]
RECIPE = "training={learning_rates: [3e-3], batch_size: 4, eval_tokens: 256, eval_every_tokens: 256, "
CONSTANT = RECIPE + "schedule: constant, warmup_tokens: 256, decay: 0.25}"


def ladder(*, continues: bool) -> str:
    return (
        "ladder=[{rung: short_train, tokens: 1536, candidates: 2, promote: {count: 1, random: 0}}, "
        f"{{rung: short_train, tokens: 3072, continues: {str(continues).lower()}}}]"
    )


def test_until_the_decay_constant_runs_of_every_length_are_the_same_run() -> None:
    recipe = Recipe(schedule="constant", warmup_tokens=10, decay=0.25, floor=0.0)
    short, long = ([recipe.learning_rate_at(step, steps, 1.0) for step in range(steps)] for steps in (40, 80))
    assert short[:30] == long[:30]
    assert short[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert short[10:30] == [1.0] * 20
    assert short[30:] == pytest.approx([1 - (step + 1) / 10 for step in range(10)])
    assert recipe.decay_start(40) == 30
    cosine = Recipe()
    assert [cosine.learning_rate_at(step, 40, 1.0) for step in (4, 39)] == pytest.approx([1.0, 0.1])


def test_a_continued_run_takes_the_steps_of_an_uninterrupted_one(tmp_path: Path, tiny_file: Path) -> None:
    def start(name: str, *, continues: bool) -> dict[str, Any]:
        overrides = [CONSTANT, ladder(continues=continues), "cost.measure=false", "baselines=[]"]
        found = search.run(
            tiny_file, study=name, runs_dir=tmp_path, executor="inprocess", overrides=overrides, trials=2
        )
        (trial,) = found.run.trained
        assert trial.low_fidelity[0]["recall/accuracy"]["n"] == 1
        return trial.result("1/train/recall")["value"]["result"]["runs"][0]  # type: ignore[no-any-return]

    fresh, continued = start("fresh", continues=False), start("continued", continues=True)
    # 1536 tokens are 24 steps; the decay takes the last 6, so that the longer run continues after 18, at 1152 tokens
    points = {point["tokens"]: point for point in fresh["curve"]}
    assert [point["tokens"] for point in continued["curve"]] == [tokens for tokens in points if tokens > 1152]
    for point in continued["curve"]:
        assert point["validation"] == points[point["tokens"]]["validation"]
    assert continued["curve"][1:] == [point for point in fresh["curve"] if point["tokens"] > 1280]
    assert continued["tokens"] == fresh["tokens"] == 3072
    assert len(list((tmp_path / "continued" / "results").glob("*.3.checkpoint"))) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((ladder(continues=True),), r"ladder\[1\]\.continues: a run can only be continued under training: {schedule"),
        ((CONSTANT, "ladder[1].continues=true"), r"ladder\[1\]\.continues: there is no short_train rung below"),
        (
            (CONSTANT, ladder(continues=True), "ladder[1].tokens=1536"),
            r"ladder\[1\]\.continues: needs more tokens than the rung below",
        ),
        ((CONSTANT, ladder(continues=True), "ladder[1].seeds=2"), r"continues: has more seeds than the rung below"),
        (("ladder[1].seconds=3",), r"'tokens' and 'seconds' are two ways to say the same"),
    ],
)
def test_what_cannot_be_continued_is_refused_with_its_place(
    load_tiny: Load, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        load_tiny(*overrides)


def test_a_budget_in_seconds_is_tokens_at_the_speed_measured(tmp_path: Path, tiny_file: Path) -> None:
    overrides = ["ladder[1]={rung: short_train, seconds: 0.5}", "cost.measure=false", "baselines=[]"]
    overrides += ["ladder[0].candidates=1", "ladder[0].metrics=[non_embedding_parameters]"]
    overrides += ["ladder[0].promote={count: 1, by: [non_embedding_parameters]}", "training.eval_tokens=64"]
    found = search.run(tiny_file, runs_dir=tmp_path, executor="inprocess", overrides=overrides)
    (trial,) = found.run.trained
    result = trial.result("1/train/recall")["value"]["result"]["runs"][0]
    assert result["tokens"] > 640
    assert 0.1 < result["tokens"] / result["tokens_per_s"] < 2.5  # half a second, as far as a busy machine keeps time
