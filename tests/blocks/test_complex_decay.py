"""The complex decay: every axis, discretisation and order in every form, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import SpecError
from archspec.loading import load
from archspec.lowering import plan
from tests.forms import compiled, hold_to_the_recurrence

AWAY = 0.3  # of parameters from their start
CASES = [
    (pairs, per, ("exact", "zoh", "bilinear")[index % 3])
    for index, (pairs, per) in enumerate(itertools.product(("key", "value"), ("head", "key", "value", "state")))
]


def document(**retention: Any) -> dict[str, Any]:
    mixer = {
        "num_heads": 2,
        "key_dim": 4,
        "value_dim": 6,
        "memory": "matrix",
        "bias": "dot",
        "retention": {
            "kind": "complex_decay",
            "gate": {"kind": "sigmoid", "offset": 1},
            "phase": "linear",
            **retention,
        },
        "update": {"kind": "gradient_descent", "step_size": "sigmoid"},
    }
    return {"name": "turning", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    # fp64 and forty tokens: the forms differ in the order of sums only
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("pairs", "per", "discretization"), CASES)
def test_scan_split_and_steps_are_the_recurrence(pairs: str, per: str, discretization: str) -> None:
    gates = {"gate": {"kind": "sigmoid", "per": per, "offset": 1}, "phase": {"kind": "linear", "per": per}}
    order = "step_first" if per == "key" else "decay_first"
    mapping = document(pairs=pairs, discretization=discretization, order=order, **gates)
    assert plan(load(mapping)).decisions["blocks.main.mixer"].family == "scan"
    hold_to_the_recurrence(mapping, close, by=AWAY, length=40, cut=17, steps=20)


def test_a_phase_of_zero_is_a_real_decay() -> None:
    turning = document(phase=0.0)
    plain = document()
    plain["blocks"]["main"]["mixer"]["retention"] = {"kind": "decay", "gate": {"kind": "sigmoid", "offset": 1}}
    first, second = compiled(turning, "auto", AWAY), compiled(plain, "reference", AWAY)
    second.load_state_dict(first.state_dict())
    x = torch.randint(0, 11, (2, 30), generator=torch.Generator().manual_seed(0))
    close(first(x).logits, second(x).logits)


def test_zero_order_hold_is_exact_integration() -> None:
    """With u constant, h' = A h + u over one token of length D, from 0, gives (exp(D A) - 1) / A u."""
    retention: Any = load(document(discretization="zoh")).blocks["main"].mixer.retention  # type: ignore[attr-defined]
    gate, phase = torch.tensor([[[-0.3], [-0.3]]]).double(), torch.tensor([[[2.0], [2.0]]]).double()
    factor, written = retention.factors({"gate": gate, "phase": phase})
    steps = 20000
    h, small = torch.zeros_like(factor), torch.complex(torch.tensor(-0.3), torch.tensor(2.0)) / steps
    for _ in range(steps):
        h = h + small * h + 1 / steps
    assert float((h - written).abs().max()) < 1e-4  # Euler's error is of the order of |a|^2 / steps
    still = retention.factors({name: torch.zeros(1, 2, 1).double() for name in ("gate", "phase")})[1]
    close(still.real, torch.ones(1, 1, 1).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_dim": 5}, "pairs need an even key_dim; found 5"),
        ({"memory": {"kind": "matrix", "normalizer": {}}}, "turns pairs of a plain matrix's channels"),
        ({"memory": "mlp", "value_dim": 4}, "turns pairs of a plain matrix's channels"),
        (
            {"bias": "l2", "update": {"kind": "implicit", "diagonal": True}},
            "the diagonal step treats every state alone",
        ),
    ],
)
def test_what_cannot_turn_is_refused(change: dict[str, Any], message: str) -> None:
    mapping = document()
    mapping["blocks"]["main"]["mixer"] |= change
    with pytest.raises(SpecError, match=message):
        load(mapping)


def test_a_normalizing_gate_needs_a_decay() -> None:
    mapping = document()
    mapping["blocks"]["main"]["mixer"] |= {
        "retention": "none",
        "update": {"kind": "gradient_descent", "step_size": "normalizing"},
    }
    with pytest.raises(SpecError, match="normalizing follows the retention's decay, and nothing decays here"):
        load(mapping)
