"""Rules on a matrix under l2 that the delta family's form takes in another layout, against the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import archspec
from archspec.loading import load
from archspec.lowering import plan
from tests.forms import hold_to_the_recurrence

STEP = {"kind": "sigmoid", "scale": 0.2}
GD = {"kind": "gradient_descent", "step_size": STEP}
WINDOW = {"kind": "l2", "window": {"length": 4, "weights": "sigmoid"}}
DECAY = {"kind": "decay", "gate": {"kind": "sigmoid", "offset": 2}}
KEY_DECAY = {"kind": "decay", "gate": {"kind": "sigmoid", "offset": 2, "per": "key"}}

CASES: dict[str, dict[str, Any]] = {
    "window": {"bias": {"kind": "l2", "window": {"length": 3}}, "update": GD},
    "window, decay first": {"bias": WINDOW, "retention": DECAY, "update": GD},
    "window, together": {"bias": WINDOW, "retention": {**KEY_DECAY, "order": "together"}, "update": GD},
    "window, step first": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "bias": {**WINDOW, "read_key": {"norm": "l2", "scale": "sigmoid"}},
        "retention": {**KEY_DECAY, "order": "step_first"},
        "update": {"kind": "gradient_descent", "step_size": {**STEP, "per": "key"}},
    },
    "window of one": {"bias": {"kind": "l2", "window": {"length": 1, "weights": "sigmoid"}}, "update": GD},
}


def document(name: str) -> dict[str, Any]:
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 6, "qk": {"norm": "l2"}, "memory": "matrix", **CASES[name]}
    return {"name": "delta", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    # fp64 and two dozen tokens: the forms differ in the order of sums only
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("length", "cut", "steps"), [(43, 9, 10), (5, 2, 5)])
def test_it_is_the_recurrence_whole_split_and_stepped(name: str, length: int, cut: int, steps: int) -> None:
    mapping = document(name)
    assert plan(load(mapping)).decisions["blocks.main.mixer"].name == "delta/chunkwise/torch"
    hold_to_the_recurrence(mapping, close, length=length, cut=cut, steps=steps)


def test_explain_says_how_a_window_runs() -> None:
    text = str(archspec.explain(load(document("window")), device="cuda"))
    assert "runs as delta / chunkwise on torch: a matrix under l2: the windows of a chunk's tokens solve one" in text
