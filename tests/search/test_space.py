"""Spaces: nodes, variables, sizes, names, and errors at the line where a value stands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archspec import loading
from archspec.errors import SpecError
from archspec.search.space import Fixed, Range, Space, label, open_space
from archspec.yamltext import LocatedMap, parse

SPACE = """
name: candidate
model_dim: {choice: [32, 48]}
blocks:
  main:
    mixer:
      num_heads: 2
      key_dim: {var: head_dim}
      value_dim: {var: head_dim}
      memory: matrix
      bias:
        choice:
          - dot
          - l2
          - {kind: lp, p: {range: [1.5, 4.0]}}
          - {kind: huber, threshold: {choice: [0.5, 1.0]}}
      update: {kind: gradient_descent, step_size: sigmoid, anchor: 8}
layout: {repeat: {range: [1, 3]}, of: main}
"""
VARIABLES = "head_dim: {choice: [8, 16]}"


class Random:
    """Draws uniformly and writes down what it was asked."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.asked: list[str] = []

    def choose(self, name: str, options: Sequence[str]) -> str:
        self.asked.append(name)
        return self.generator.choice(list(options))

    def number_in(self, name: str, limits: Range) -> float | int:
        self.asked.append(name)
        if limits.whole:
            return self.generator.randint(int(limits.low), int(limits.high))
        return self.generator.uniform(limits.low, limits.high)


def document(text: str) -> LocatedMap:
    found = parse(text, "space.yaml")
    assert isinstance(found, LocatedMap)
    return found


def space(text: str = SPACE, variables: str = VARIABLES) -> Space:
    return open_space(document(text), document(variables))


def problems(text: str, variables: str = VARIABLES) -> list[str]:
    with pytest.raises(SpecError) as caught:
        space(text, variables)
    return [str(problem) for problem in caught.value.problems]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_every_draw_is_a_legal_spec_whose_parameters_were_asked_once(seed: int) -> None:
    chooser = Random(seed)
    drawn = space().draw(chooser)
    spec = loading.validate(drawn)
    assert len(chooser.asked) == len(set(chooser.asked))
    bias = drawn["blocks"]["main"]["mixer"]["bias"]
    conditional = {"blocks.main.mixer.bias/lp.p", "blocks.main.mixer.bias/huber.threshold"} & set(chooser.asked)
    kind = bias["kind"] if isinstance(bias, dict) else bias
    assert conditional == (
        {f"blocks.main.mixer.bias/{kind}.{'p' if kind == 'lp' else 'threshold'}"} if bias != kind else set()
    )
    mixer: Any = spec.blocks["main"].mixer
    assert mixer.key_dim == mixer.value_dim


def test_the_size_counts_distinct_settings_and_a_variable_once() -> None:
    size = space().size
    # 2 widths x 2 head sizes x (dot, l2, lp, two hubers) x 3 depths
    assert (size.settings, size.discrete, size.continuous) == (2 * 2 * 5 * 3, 5, 1)


def test_a_variable_that_only_one_option_uses_counts_only_there() -> None:
    text = SPACE.replace("{var: head_dim}", "8").replace("anchor: 8", "anchor: {choice: [token, {var: chunk}]}")
    found = space(text, "chunk: {choice: [4, 8, 16]}")
    assert found.size.settings == 2 * 5 * 3 * (1 + 3)


def test_the_base_takes_every_first_option() -> None:
    base = space().base()
    assert base["model_dim"] == 32
    assert base["blocks"]["main"]["mixer"]["bias"] == "dot"
    assert base["layout"]["repeat"] == 1


def test_options_are_named_by_what_they_say_so_that_a_grown_space_keeps_its_names() -> None:
    before, after = Fixed({}), Fixed({})
    space().draw(before)
    space(SPACE.replace("choice: [32, 48]", "choice: [24, 32, 48]").replace("- dot", "- l1\n          - dot")).draw(
        after
    )
    assert set(before.met) == set(after.met)
    for name, options in before.met.items():
        assert set(options) <= set(after.met[name])
    assert before.met["blocks.main.mixer.bias"][2] == "bias:lp{p: *}"
    assert label([1.0, True, None, {"a": 1}]) == "[1.0, true, null, {a: 1}]"


def test_two_options_of_one_kind_have_parameters_of_different_names() -> None:
    options = "[{kind: lp, p: {range: [1.5, 2]}}, {kind: lp, p: {range: [3, 4]}, smoothing: 0.1}]"
    text = (
        SPACE[: SPACE.index("      bias:")]
        + f"      bias: {{choice: {options}}}\n"
        + SPACE[SPACE.index("      update") :]
    )
    names = set()
    for option in ("bias:lp{p: *}", "bias:lp{p: *, smoothing: 0.1}"):
        chooser = Fixed({"blocks.main.mixer.bias": option})
        space(text).draw(chooser)
        names |= {name for name in chooser.met if name.endswith(".p")}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("- l2", "- hubber", "space.yaml:14 blocks.main.mixer.bias: unknown attentional bias 'hubber'; known"),
        ("p: {range", "q: {range", "space.yaml:15 blocks.main.mixer.bias.q: unknown key 'q'; known here"),
        ("[0.5, 1.0]", "[0.5, wide]", "space.yaml:16 blocks.main.mixer.bias.threshold: unknown gate 'wide'; known"),
        ("choice: [32, 48]", "choice: []", "space.yaml:3 model_dim: 'choice' must be a list of at least one value."),
        ("choice: [32, 48]", "choice: [32, 32]", "space.yaml:3 model_dim: the option 32 stands twice; keep one."),
        ("choice: [32, 48]", "range: [48, 32]", "space.yaml:3 model_dim: the range [48, 32] is empty; required"),
        ("choice: [32, 48]", "range: [0, 8], log: true", "space.yaml:3 model_dim: a logarithmic range must start"),
        ("choice: [32, 48]", "range: [32, 48], step: 64", "space.yaml:3 model_dim: the step 64 is wider than"),
        ("choice: [32, 48]", "range: [32]", "space.yaml:3 model_dim: 'range' must be two numbers"),
        ("choice: [32, 48]", "choice: [32], log: true", "space.yaml:3 model_dim: unknown key 'log' beside 'choice'"),
        ("key_dim: {var: head_dim}", "key_dim: {var: headdim}", "space.yaml:8 blocks.main.mixer.key_dim: unknown vari"),
        ("kind: gradient_descent", "kind: {choice: [a]}", "space.yaml:17 blocks.main.mixer.update.kind: a node cannot"),
        (
            "range: [1, 3]",
            "range: [0, 3]",
            "space.yaml:18 layout.repeat: found 0; required: greater than or equal to 1.",
        ),
    ],
)
def test_every_option_is_checked_at_load_with_its_line(before: str, after: str, expected: str) -> None:
    assert before in SPACE
    found = problems(SPACE.replace(before, after, 1))
    assert any(line.startswith(expected) for line in found), found


def test_a_variable_may_not_refer_to_another() -> None:
    found = problems(SPACE, "head_dim: {choice: [8, {var: other}]}\nother: {choice: [1]}")
    assert found == [
        "space.yaml:1 variables.head_dim.choice[1]: a variable cannot refer to another; write its options here."
    ]


def test_a_space_over_a_shipped_model_amends_it() -> None:
    text = """
extends: hybrid_3_1
blocks: {main: {mixer: {retention: {gate: {choice: [gdn, kda]}}, bias: {choice: [dot, l2]}}}}
layout: {cycle: 4, of: [{repeat: {choice: [1, 2]}, of: main}, attention]}
"""
    found = open_space(loading.resolve(document(text), Path.cwd()), document("{}"))
    assert found.size.settings == 8
    for seed in range(8):
        drawn = found.draw(Random(seed))
        drawn.put("name", "candidate", drawn.mark)
        assert list(loading.validate(drawn).layout.names()).count("attention") in (1, 2)
