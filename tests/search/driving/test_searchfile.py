"""Search files: what is refused and where, overrides, defaults, and the frozen form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archspec.errors import SpecError
from archspec.search.report.spectext import spec_text
from archspec.search.searchfile import differences, load_search_file, plain
from archspec.yamltext import parse


def problems(load: Any, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(*overrides)
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("study=a/b", "study: found 'a/b'; required: a folder's name"),
        ("objective=[]", "objective: unknown key 'objective'; known here:"),
        ("objectives=[]", "objectives: there is no objective; required: at least one."),
        ("objectives[0].metric=recall/acuracy", "objectives[0].metric: unknown metric 'recall/acuracy'; known:"),
        ("objectives[0].direction=minimize", "objectives[0].direction: recall/accuracy is better when maximized"),
        ("objectives[1].metric=recall/accuracy", "objectives[1]: recall/accuracy stands twice; keep one."),
        ("objectives[0].at_length=4", "objectives[0]: 'at_length' and 'dtype' belong to state_bytes."),
        ("tasks.recall.kind=recal", "tasks.recall: unknown task 'recal'; known: recall, text. Did you mean 'recall'?"),
        ("ladder=[]", "ladder: the ladder has no rung"),
        ("ladder[1].promote=3", "ladder[1].promote: the last rung promotes to nowhere"),
        ("ladder[0].promote=null", "ladder[0]: needs 'promote'"),
        ("ladder[0].promote.by=[recal_at_init]", "ladder[0].promote.by: unknown metric of this rung 'recal_at_init'"),
        ("ladder[0].candidates=null", "ladder[0]: the first rung needs 'candidates'"),
        ("ladder[0].tokens=5", "ladder[0]: 'tokens' does not belong to a training_free rung."),
        ("ladder[1].tokens={text: 5}", "ladder[1].tokens: must say a number for each task: recall."),
        ("constraints.families=[dleta]", "constraints.families: unknown rule family 'dleta'; known:"),
        ("constraints.parameters={min: 2, max: 1}", "constraints.parameters: min 2 is above max 1."),
        ("fit={vary: blocks.main.nothing, target: 1}", "fit.vary: there is nothing at 'blocks.main.nothing'"),
        (
            "sampler=annealing",
            "sampler.kind: found 'annealing'; required: one of tpe, random, qmc,",
        ),
        ("device=tpu", "device: found 'tpu'; required: cpu or cuda."),
        ("baselines=[{sepc: transformer}]", "baselines[0].sepc: unknown key 'sepc'"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_place(load_tiny: Any, override: str, expected: str) -> None:
    found = problems(load_tiny, override)
    assert any(line.startswith(expected) for line in found), found


def test_a_located_error_names_the_line_of_the_file(tiny_file: Path) -> None:
    tiny_file.write_text(tiny_file.read_text().replace("count: 3, by", "count: 3, buy"))
    with pytest.raises(SpecError, match=r"tiny\.yaml:38 ladder\[0\]\.promote\.buy: unknown key 'buy'"):
        load_search_file(tiny_file)


def test_overrides_reach_into_the_file_and_are_checked_like_it(load_tiny: Any) -> None:
    found = load_tiny("training.batch_size=32", "ladder[1].tokens=99", "space.model_dim=8", "evaluation_timeout_s=5")
    assert found.settings.training.batch_size == 32
    assert found.settings.ladder[1].tokens == 99
    assert found.space.base()["model_dim"] == 8
    assert found.settings.evaluation_timeout_s == 5
    assert problems(load_tiny, "training.batch_size") == [
        ": required: PATH=VALUE, such as --set training.batch_size=32."
    ]
    assert problems(load_tiny, "study.deeper.still=1")[0].startswith("study.deeper.still: there is no 'deeper' to set")
    assert problems(load_tiny, "ladder[7].tokens=1")[0].startswith("ladder[7].tokens: there is no 7 to set")


def test_the_frozen_file_reads_back_as_the_same_search(load_tiny: Any, tmp_path: Path) -> None:
    found = load_tiny()
    path = tmp_path / "frozen.yaml"
    path.write_text(spec_text(found.document))
    assert plain(parse(path.read_bytes(), str(path))) == found.document
    again = load_search_file(path)
    assert list(differences(found.document, again.document)) == []
    assert again.objectives == found.objectives


def test_differences_say_what_and_how_and_leave_out_how_long(load_tiny: Any) -> None:
    changed = load_tiny("seed=4", "trials=99", "timeout_s=5", "workers=7", "tasks.recall.num_kv_pairs=3")
    assert list(differences(load_tiny().document, changed.document)) == [
        "seed: 3 -> 4",
        "tasks.recall.num_kv_pairs: 2 -> 3",
    ]


def test_tasks_follow_from_the_objectives_and_metrics_have_defaults(tiny_file: Path) -> None:
    lines = [line for line in tiny_file.read_text().splitlines() if not line.startswith("  recall:")]
    text = "\n".join(line for line in lines if line != "tasks:")
    start, end = text.index("    metrics:"), text.index("    promote:")
    tiny_file.write_text(text[:start] + text[end:])
    found = load_search_file(tiny_file)
    assert found.settings.tasks["recall"].kind == "recall"
    assert {"recall_at_init", "memory_capacity", "hidden_covariance", "non_embedding_parameters"} <= set(found.metrics)


def test_scores_bear_the_names_that_tasks_have_in_the_file(load_tiny: Any) -> None:
    found = load_tiny("tasks={short: {kind: recall, sequence_length: 16}}", "objectives[0].metric=short/accuracy")
    assert found.objectives[0].name == "short/accuracy"
    assert found.objectives[0].direction == "maximize"


def test_an_unknown_search_suggests_a_shipped_one() -> None:
    with pytest.raises(SpecError, match="no such search file, nor a shipped one"):
        load_search_file("no_such_search")
