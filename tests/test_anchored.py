"""The anchored family: links, windows, orthogonalised steps and strengths of their own, against the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.loading import load
from archspec.lowering import plan
from tests.forms import hold_to_the_recurrence

STEP = {"kind": "sigmoid", "scale": 0.2}
ANCHOR = {"every": 4}
DECAY = {"gate": {"kind": "sigmoid", "offset": 2}, "order": "together"}
LEARNED = {"kind": "matrix", "initial": "learned"}
MLP = {"kind": "mlp", "expansion": 2, "residual": True, "norm": "post"}
GD = {"kind": "gradient_descent", "step_size": STEP, "anchor": ANCHOR}
MOMENTUM = {"kind": "momentum", "step_size": STEP, "momentum": "sigmoid", "anchor": ANCHOR}
MUON = {"kind": "muon", "step_size": STEP, "momentum": "sigmoid", "iterations": 2, "anchor": ANCHOR}
TURNS = {"kind": "complex_decay", "gate": {"kind": "sigmoid", "offset": 2}, "phase": {"kind": "tanh", "scale": 2}}
WINDOW = {"window": {"length": 3, "weights": "sigmoid"}}

CASES: dict[str, dict[str, Any]] = {
    "softmax": {"memory": MLP, "retention": {"kind": "kl", **DECAY}, "update": GD},
    "softmax at anchors": {
        "retention": {"kind": "kl", **DECAY},
        "update": {**MOMENTUM, "anchor": {**ANCHOR, "link": "anchor", "lag": True}},
    },
    "norm": {"memory": LEARNED, "retention": {"kind": "lq", "map": "mirror", **DECAY}, "update": MOMENTUM},
    "sigmoid": {"retention": {"kind": "sigmoid", **DECAY, "order": "step_first"}, "update": GD},
    "threshold": {"memory": MLP, "retention": {"kind": "elastic_net", **DECAY}, "update": GD},
    "threshold fed back": {"retention": {"kind": "elastic_net", "form": "proximal", **DECAY}, "update": MOMENTUM},
    "window": {"memory": MLP, "bias": {"kind": "l2", **WINDOW}, "retention": {"kind": "decay", **DECAY}, "update": GD},
    "window of one": {"bias": {"kind": "lp", "p": 3, "window": {"length": 1, "weights": "sigmoid"}}, "update": GD},
    "window under dot": {"bias": {"kind": "dot", **WINDOW}, "update": {"kind": "momentum", "momentum": "sigmoid"}},
    "orthogonalised": {"memory": MLP, "bias": {"kind": "l2", **WINDOW}, "update": MUON},
    "orthogonalised dot": {"bias": "dot", "update": {**MUON, "anchor": "token"}},
    "lag": {"memory": MLP, "update": {**MOMENTUM, "anchor": {**ANCHOR, "lag": True}}},
    "two strengths": {"update": {**GD, "write_size": "sigmoid"}, "bias": {"kind": "l2", "read_key": {"norm": "l2"}}},
    "erased with the read key": {
        "bias": {"kind": "l2", "read_key": {"norm": "l2", "scale": "sigmoid"}, "erase_key": "read_key"},
        "update": MOMENTUM,
    },
    "per state": {"retention": {"kind": "decay", "gate": "s6"}, "update": MOMENTUM},
    "turning keys": {
        "memory": LEARNED,
        "bias": {"kind": "l2", **WINDOW},
        "retention": {**TURNS, "discretization": "zoh", "order": "step_first"},
        "update": MUON,
    },
    "turning values": {
        "bias": "l1",
        "retention": {**TURNS, "pairs": "value", "discretization": "bilinear", "gain": "sigmoid", "order": "together"},
        "update": MOMENTUM,
    },
    "turning under dot": {"bias": "dot", "retention": TURNS, "update": {**MOMENTUM, "anchor": "token"}},
    "steps under dot": {
        "memory": LEARNED,
        "bias": "dot",
        "retention": {"kind": "kl", **DECAY, "order": "step_first"},
        "update": {"kind": "multi_step", "steps": 3, "step_size": STEP},
    },
    "read before": {
        "retention": {"kind": "kl", **DECAY},
        "update": {**GD, "anchor": {**ANCHOR, "link": "anchor"}},
        "readout": {"read": "before"},
    },
}


def document(name: str) -> dict[str, Any]:
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "qk": {"norm": "l2"}, "memory": "matrix", **CASES[name]}
    return {"name": "anchored", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    # fp64 and two dozen tokens: the forms differ in the order of sums only
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_recurrence_whole_split_and_stepped(name: str) -> None:
    mapping = document(name)
    assert plan(load(mapping)).decisions["blocks.main.mixer"].family == "anchored"
    hold_to_the_recurrence(mapping, close, length=23, cut=9, steps=10)


def test_gradients_at_moving_weights_are_left_to_one_token_after_another() -> None:
    mapping = document("softmax")
    mapping["blocks"]["main"]["mixer"]["update"] = {"kind": "gradient_descent", "step_size": STEP}
    decision = plan(load(mapping)).decisions["blocks.main.mixer"]
    reasons = {rejection.family: rejection.reason for rejection in decision.rejected}
    assert decision.family == "sequential"
    assert reasons["anchored"] == "every token's gradient is taken at the weights that the token before it left"
