"""Before anything is built: legality, constraints, the iso-parameter fit, and resized baselines."""

from __future__ import annotations

from typing import Any

import pytest

from archspec import loading
from archspec.compiler import compile as compile_spec
from archspec.errors import RunError
from archspec.search.baselines import TOLERANCE, baselines, budget
from archspec.search.candidates import Candidate, Rejection, admit, closest, named
from archspec.search.searchfile import SearchFile
from archspec.search.space import Fixed


def drawn(search: SearchFile, **decided: Any) -> Candidate | Rejection:
    document = search.space.draw(Fixed({name.replace("__", "."): value for name, value in decided.items()}))
    return admit(named(document, "candidate"), search)


def accepted(search: SearchFile, **decided: Any) -> Candidate:
    found = drawn(search, **decided)
    assert isinstance(found, Candidate), found
    return found


def rejected(search: SearchFile, **decided: Any) -> Rejection:
    found = drawn(search, **decided)
    assert isinstance(found, Rejection)
    return found


def test_the_figures_are_those_of_the_compiled_module(load_tiny: Any) -> None:
    search = load_tiny()
    found = accepted(search)
    model = compile_spec(found.spec, vocab_size=16)
    assert found.figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found.figures["non_embedding_parameters"] == found.figures["parameters"] - 16 * 16
    assert found.plan.families() == ["linear"]


@pytest.mark.parametrize(
    ("override", "rule", "reason"),
    [
        ("constraints.parameters.max=10", "constraint parameters", "over the maximum 10"),
        ("constraints.flops_per_token.min=1e12", "constraint flops_per_token", "under the minimum 1,000,000,000,000"),
        ("constraints.layers.min=2", "constraint layers", "layers is 1, under the minimum 2"),
        ("constraints.families=[softmax]", "constraint families", "lowered to linear; allowed: softmax"),
        ("constraints.state_bytes={max: 16, at_length: 9}", "constraint state_bytes", "state_bytes is 512, over"),
    ],
)
def test_a_broken_constraint_is_named_with_its_figure(load_tiny: Any, override: str, rule: str, reason: str) -> None:
    found = rejected(load_tiny(override))
    assert found.rule == rule
    assert reason in found.reason
    assert found.excess[rule.removeprefix("constraint ")] > 0


def test_a_bound_on_the_state_is_about_its_own_length(load_tiny: Any) -> None:
    layout = {"layout": "layout:attention"}
    per_token = 2 * 2 * 8 * 4  # keys and values of two heads of 8, in float32
    assert accepted(load_tiny(f"constraints.state_bytes={{max: {32 * per_token}, at_length: 32}}"), **layout)
    found = rejected(load_tiny(f"constraints.state_bytes={{max: {32 * per_token - 1}, at_length: 32}}"), **layout)
    assert "state_bytes is 4,096" in found.reason


def test_an_illegal_combination_is_rejected_with_the_rules_own_sentence(load_tiny: Any) -> None:
    search = load_tiny("space.blocks.main.mixer.memory={choice: [matrix, kv]}")
    found = rejected(search, blocks__main__mixer__memory="memory:kv")
    assert found.rule == "illegal blocks.main.mixer.update"
    assert "stores tokens and has no weights for gradient_descent to move" in found.reason


def test_equal_architectures_have_one_hash_whatever_they_are_called(load_tiny: Any) -> None:
    search = load_tiny("space.blocks.main.mixer.retention={choice: [none, {kind: decay, gate: 1.0}]}")
    plain = accepted(search)
    same = accepted(search, blocks__main__mixer__retention="retention:decay{gate: 1.0}")
    assert plain.document != same.document
    assert plain.hash == same.hash


@pytest.mark.parametrize("layout", ["layout:main", "layout:[main, attention]"])
def test_the_fit_meets_its_target_at_every_draw(load_tiny: Any, layout: str) -> None:
    search = load_tiny(
        "fit={vary: blocks.main.feed_forward.expansion, target: 4000, tolerance: 0.02}",
        "space.blocks.main.mixer.memory=matrix",
    )
    found = accepted(search, layout=layout)
    assert found.figures["non_embedding_parameters"] == pytest.approx(4000, rel=0.02)
    assert loading.load(found.document) == found.spec


def test_a_fit_out_of_reach_says_what_is_closest(load_tiny: Any) -> None:
    found = rejected(load_tiny("fit={vary: model_dim, target: 4000, tolerance: 0.0001, multiple_of: 4}"))
    assert found.rule == "fit"
    assert "the closest is" in found.reason


def test_a_width_is_solved_in_the_steps_that_its_heads_need(load_tiny: Any) -> None:
    found = accepted(load_tiny("fit={vary: model_dim, target: 4000, tolerance: 0.2, multiple_of: 4}"))
    assert found.spec.model_dim % 4 == 0
    assert found.figures["non_embedding_parameters"] == pytest.approx(4000, rel=0.2)


def test_the_solver_finds_whole_and_real_roots() -> None:
    assert closest(lambda x: x * x, 3, 1000.0) == 32
    assert closest(lambda x: x * x, 40, 1000.0) == 32
    # Four significant digits are kept.
    assert closest(lambda x: x * x, 1.0, 1000.0) == pytest.approx(1000**0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["transformer", "gated_deltanet", "titans_lmm"])
def test_baselines_keep_their_coordinates_at_the_bases_size(load_tiny: Any, name: str) -> None:
    search = load_tiny(f"baselines=[{name}]", "space.model_dim=48")
    (found,) = baselines(search)
    published = loading.load(name)
    assert found.name == name
    assert found.candidate.figures["non_embedding_parameters"] == pytest.approx(budget(search), rel=TOLERANCE)
    assert list(found.candidate.spec.layout.names()) == list(published.layout.names())
    for block, mine in found.candidate.spec.blocks.items():
        theirs: Any = published.blocks[block].mixer
        ours: Any = mine.mixer
        assert (ours.num_heads, ours.memory, ours.bias, ours.retention, ours.update) == (
            theirs.num_heads,
            theirs.memory,
            theirs.bias,
            theirs.retention,
            theirs.update,
        )
    assert f"model_dim {published.model_dim} -> {found.candidate.spec.model_dim}" in found.note
    compile_spec(found.candidate.spec, vocab_size=16)


def test_baselines_are_exempt_from_constraints_and_can_keep_their_size(load_tiny: Any) -> None:
    search = load_tiny("baselines=[{spec: transformer, resize: false, name: full}]")
    (found,) = baselines(search)
    assert found.candidate.figures["non_embedding_parameters"] > 9_000
    assert (found.name, found.note) == ("full", "as published; not resized")


def test_two_baselines_of_one_name_are_an_error(load_tiny: Any) -> None:
    with pytest.raises(RunError, match="two are called 'transformer'; give one a 'name'"):
        baselines(load_tiny("baselines=[transformer, transformer]"))


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_spec_that_is_not_of_tokens_is_rejected(load_tiny: Any, end: str) -> None:
    search = load_tiny()
    document = search.space.draw(Fixed({}))
    sizes = {"input": {"kind": "continuous", "dim": 3}, "output": {"kind": "classes", "num_classes": 2}}
    document[end] = loading.located(sizes[end], "tiny.yaml")
    if end == "input":
        document["output"] = loading.located({"tied": False}, "tiny.yaml")
    found = admit(named(document, "candidate"), search)
    assert isinstance(found, Rejection)
    assert found.rule == f"illegal {end}"
    assert f"sequences of tokens, found {sizes[end]['kind']}" in found.reason
