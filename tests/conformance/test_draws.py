"""Anything legal runs: random documents from the whole grammar, each held to everything a spec promises."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from archspec.component import FAMILIES
from archspec.composition import inside
from archspec.errors import SpecError
from archspec.loading import load, loads
from archspec.rule import Rule
from archspec.schema import MemoryMixer
from benchmarks.drawing import Drawer
from benchmarks.draws import report, run, sequential
from benchmarks.promises import Diverges, Failure, check, largest

DRAWS = 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_every_legal_draw_trains_and_agrees_in_all_forms(seed: int) -> None:
    tally = run(DRAWS, seed)
    assert not tally.failures, "\n".join(f"{message}\n{json.dumps(document)}" for message, document in tally.failures)
    assert tally.legal >= 0.6 * DRAWS
    assert len(tally.diverging) <= 0.05 * tally.legal


def test_a_few_draws_run_in_every_check() -> None:
    tally = run(8, 1000)
    assert (tally.drawn, tally.failures) == (8, [])
    assert tally.legal > 3
    text = report(tally, 1000, 1.0)
    assert f"| legal | {tally.legal} (" in text


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    drawer = Drawer(random.Random(0), 0.1)
    return [drawer.draw() for _ in range(100)]


def test_every_registered_choice_gets_drawn(documents: list[dict[str, Any]]) -> None:
    text = json.dumps(documents)
    for family in ("memory", "bias", "retention", "update", "mixer"):
        kinds = set(FAMILIES[family].members) - {"cell", "memory"}
        assert not {kind for kind in kinds if f'"kind": "{kind}"' not in text}, family


def test_gradients_are_taken_at_tokens_and_at_anchors_alike(documents: list[dict[str, Any]]) -> None:
    """The evaluation point is a coordinate: where it makes another function, both are drawn about as often."""
    points = {"token": 0, "anchor": 0}
    for document in documents:
        try:
            spec = load(document)
        except SpecError:
            continue
        for _, mixer in inside(spec.blocks["main"].mixer):
            if isinstance(mixer, MemoryMixer):
                rule = Rule.of(mixer, spec.model_dim)
                # Of the rules that have no anchor, several steps a token and implicit ones cannot have one.
                if rule.update.anchor is not None:
                    points["anchor"] += 1
                elif sequential(rule) and rule.update.kind not in ("multi_step", "implicit"):
                    points["token"] += 1
    assert sum(points.values()) >= 25
    assert 0.25 <= points["anchor"] / sum(points.values()) <= 0.75


def test_the_schema_alone_draws_documents_that_are_refused() -> None:
    """The conditions matter: without them most documents are illegal, and each is refused with a reason."""
    drawer, refused = Drawer(random.Random(0), conditional=False), 0
    for _ in range(60):
        try:
            load(drawer.draw())
        except SpecError as error:
            refused += bool(error.problems)
    assert refused > 30


EXPLODING = """
name: exploding
model_dim: 8
blocks:
  main:
    mixer:
      memory: {kind: mlp, gated: true}
      update: {kind: gradient_descent, step_size: 30}
layout: main
"""


def test_divergence_is_told_from_failure() -> None:
    with pytest.raises(Diverges, match=r"not finite; the recurrence reaches .* in fp64"):
        check(loads(EXPLODING))


def test_what_counts_as_reached_is_computed() -> None:
    """Memory that nothing has been written to is no number that the recurrence reaches."""
    assert largest(lambda: torch.empty(10_000).fill_(2.0)) == 2
    assert largest(lambda: torch.full((3,), 1e20).sum()) == pytest.approx(3e20)
    assert largest(lambda: torch.tensor([1e5], dtype=torch.float64).exp()) == math.inf
    assert largest(lambda: torch.tensor([0.0]).log().exp()) == 0


def test_a_broken_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that forgets its state is caught by the comparison of stretches."""
    spec = loads(EXPLODING.replace("30", "0.1").replace("{kind: mlp, gated: true}", "matrix"))
    check(spec)
    from archspec.blocks.carry import Carry

    monkeypatch.setattr(Carry, "take_all", lambda self, path: None)
    with pytest.raises((Failure, KeyError)):
        check(spec)


@pytest.mark.parametrize(
    ("change", "by_nature"),
    [
        ("memory: matrix", False),
        ("memory: {kind: mlp}", True),
        ("memory: matrix\n      bias: l1", True),
        ("memory: {kind: matrix, initial: learned}\n      retention: {kind: kl, gate: sigmoid}", True),
        ("memory: matrix\n      bias: dot", False),
    ],
)
def test_what_is_sequential_by_nature(change: str, by_nature: bool) -> None:
    spec = loads(EXPLODING.replace("memory: {kind: mlp, gated: true}", change))
    mixer = spec.blocks["main"].mixer
    assert sequential(Rule.of(mixer, 8)) is by_nature  # type: ignore[arg-type]


def test_the_command_reports_and_exits_with_0() -> None:
    command = [sys.executable, "-m", "benchmarks.draws", "--draws", "3", "--seed", "7"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "| legal and failing | 0 |" in found.stdout


@pytest.mark.parametrize(
    "ends",
    [
        "input: {kind: continuous, dim: 2}\noutput: {kind: classes, num_classes: 3}",
        "input: {kind: continuous, dim: 2}\noutput: {tied: false}",
        "output: {kind: continuous, dim: 2, pool: max}",
    ],
)
def test_models_that_are_not_of_tokens_are_held_to_their_promises(ends: str) -> None:
    check(loads(EXPLODING.replace("30", "0.1").replace("{kind: mlp, gated: true}", "matrix") + ends))


MATRIX = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "memory": "matrix", "update": "gradient_descent"}
KV = {"num_heads": 1, "key_dim": 3, "value_dim": 4, "qk": {"norm": "l2"}, "update": "nonparametric"}


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param({**KV, "memory": {"kind": "kv", "top_k": 2}}, id="equal tokens tie whatever the order of sums"),
        pytest.param({**MATRIX, "output": {"kind": "skip", "init": "fan_in"}}, id="a vector has a fan-in of one"),
    ],
)
def test_what_draws_have_found_stays_mended(mixer: dict[str, Any]) -> None:
    check(load({"name": "found", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": ["main"] * 3}))


def test_a_gate_after_routing_has_no_memory_to_be_derived_from() -> None:
    routed = {
        "kind": "routed",
        "experts": 2,
        "of": {**MATRIX, "retention": {"kind": "decay", "gate": "ssd"}},
        "readout": {"gate": {"kind": "product", "first": "dt", "second": "sigmoid"}},
    }
    with pytest.raises(SpecError, match=r"readout.gate: there is no quantity of a memory to derive it from"):
        load({"name": "found", "model_dim": 8, "blocks": {"main": {"mixer": routed}}, "layout": "main"})
