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
OPEN = {"kind": "sigmoid", "offset": 2}
ANGLE = {"kind": "tanh", "scale": 2}
GD = {"kind": "gradient_descent", "step_size": STEP}
IMPLICIT = {"kind": "implicit", "step_size": STEP}
MANY = {"kind": "multi_step", "steps": 3, "step_size": STEP}
WEIGHTED = {"kind": "weighted_l2", "weights": {"kind": "sigmoid", "per": "value"}}
TURNS = {"kind": "complex_decay", "gate": OPEN, "phase": ANGLE}
WINDOW = {"kind": "l2", "window": {"length": 4, "weights": "sigmoid"}}
DECAY = {"kind": "decay", "gate": OPEN}
KEY_DECAY = {"kind": "decay", "gate": {**OPEN, "per": "key"}}

CASES: dict[str, dict[str, Any]] = {
    "window": {"bias": {"kind": "l2", "window": {"length": 3}}, "update": GD},
    "long window": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "bias": {"kind": "l2", "window": {"length": 8, "weights": "sigmoid"}, "read_key": {"norm": "l2"}},
        "retention": {**DECAY, "order": "step_first"},
        "update": GD,
        "readout": {"read": "before"},
    },
    "window, decay first": {"bias": WINDOW, "retention": DECAY, "update": GD},
    "window, together": {"bias": WINDOW, "retention": {**KEY_DECAY, "order": "together"}, "update": GD},
    "window, step first": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "bias": {**WINDOW, "read_key": {"norm": "l2", "scale": "sigmoid"}},
        "retention": {**KEY_DECAY, "order": "step_first"},
        "update": {"kind": "gradient_descent", "step_size": {**STEP, "per": "key"}},
    },
    "read before": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "retention": DECAY,
        "update": IMPLICIT,
        "readout": {"read": "before"},
    },
    "several steps, read before": {
        "update": {"kind": "multi_step", "steps": 3, "step_size": STEP},
        "readout": {"read": "before"},
    },
    "decay per value": {"retention": {"kind": "decay", "gate": {**OPEN, "per": "value"}}, "update": IMPLICIT},
    "step per value": {"retention": DECAY, "update": {**IMPLICIT, "step_size": {**STEP, "per": "value"}}},
    "several steps per value": {
        "retention": {**DECAY, "order": "step_first"},
        "update": {"kind": "multi_step", "steps": 2, "step_size": {**STEP, "per": "value"}},
    },
    "both per value, step first": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "bias": {"kind": "l2", "read_key": {"norm": "l2", "scale": "sigmoid"}},
        "retention": {"kind": "decay", "gate": {**OPEN, "per": "value"}, "order": "step_first"},
        "update": {**GD, "step_size": {**STEP, "per": "value"}, "write_size": "sigmoid"},
        "readout": {"read": "before"},
    },
    "decay per value, together": {
        "retention": {"kind": "decay", "gate": {**OPEN, "per": "value"}, "order": "together"},
        "update": GD,
    },
    "turns per key, step per key": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "retention": {**TURNS, "phase": {**ANGLE, "per": "key"}, "order": "together"},
        "update": {**IMPLICIT, "step_size": {**STEP, "per": "key"}},
    },
    "turns per key, decay per value": {
        "retention": {**TURNS, "gate": {**OPEN, "per": "value"}, "phase": {**ANGLE, "per": "key"}},
        "update": {**IMPLICIT, "step_size": {**STEP, "per": "value"}},
    },
    "weighted": {"bias": WEIGHTED, "retention": DECAY, "update": GD, "readout": {"read": "before"}},
    "weighted, several steps": {"bias": WEIGHTED, "update": {"kind": "multi_step", "steps": 2, "step_size": STEP}},
    "weighted per head, turns": {
        "bias": {"kind": "weighted_l2", "weights": "sigmoid"},
        "retention": {**TURNS, "pairs": "value"},
        "update": MANY,
    },
    "weighted window": {
        "bias": {**WINDOW, "kind": "weighted_l2", "weights": "sigmoid"},
        "retention": KEY_DECAY,
        "update": GD,
    },
    "turns, together": {"retention": {**TURNS, "order": "together"}, "update": IMPLICIT},
    "turns with a gain": {"retention": {**TURNS, "gain": {"kind": "sigmoid", "per": "key"}}, "update": GD},
    "turns held": {"retention": {**TURNS, "discretization": "zoh"}, "update": MANY},
    "turns received, step per value": {
        "retention": {**TURNS, "discretization": "bilinear", "order": "together"},
        "update": {**GD, "step_size": {**STEP, "per": "value"}},
    },
    "turns of two strengths": {
        "bias": {"kind": "l2", "read_key": {"norm": "l2", "scale": "sigmoid"}, "erase_key": "read_key"},
        "retention": {**TURNS, "order": "decay_first", "phase": {**ANGLE, "per": "key"}},
        "update": {**GD, "write_size": "sigmoid"},
        "readout": {"read": "before"},
    },
    "turns halved, step first": {
        "retention": {
            **TURNS,
            "gate": {**OPEN, "per": "key"},
            "discretization": "bilinear",
            "gain": "sigmoid",
            "order": "step_first",
        },
        "update": {**MANY, "step_size": {**STEP, "per": "key"}},
    },
    "turns of values": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "retention": {**TURNS, "pairs": "value", "gain": {"kind": "sigmoid", "per": "value"}},
        "update": {**GD, "write_size": "sigmoid", "step_size": STEP},
    },
    "turns of values, step first": {
        "retention": {
            **TURNS,
            "pairs": "value",
            "gate": {**OPEN, "per": "value"},
            "phase": {**ANGLE, "per": "value"},
            "order": "step_first",
        },
        "update": {**MANY, "step_size": {**STEP, "conv": 2}},
        "readout": {"read": "before"},
    },
    "window of one": {"bias": {"kind": "l2", "window": {"length": 1, "weights": "sigmoid"}}, "update": GD},
}


def document(choices: dict[str, Any]) -> dict[str, Any]:
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 6, "qk": {"norm": "l2"}, "memory": "matrix", **choices}
    return {"name": "delta", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    # fp64 and two dozen tokens: the forms differ in the order of sums only
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("length", "cut", "steps"), [(43, 9, 10), (5, 2, 5)])
def test_it_is_the_recurrence_whole_split_and_stepped(name: str, length: int, cut: int, steps: int) -> None:
    mapping = document(CASES[name])
    assert plan(load(mapping)).decisions["blocks.main.mixer"].name == "delta/chunkwise/torch"
    hold_to_the_recurrence(mapping, close, length=length, cut=cut, steps=steps)


MOMENTUM = {"kind": "momentum", "momentum": "sigmoid", "step_size": STEP}
MOMENTUM_CASES: dict[str, dict[str, Any]] = {
    "weighted": {"bias": {"kind": "weighted_l2", "weights": "sigmoid"}, "update": MOMENTUM},
    "read before": {"retention": {**DECAY, "order": "together"}, "update": MOMENTUM, "readout": {"read": "before"}},
}


@pytest.mark.parametrize("name", MOMENTUM_CASES)
def test_momentum_is_the_recurrence_whole_split_and_stepped(name: str) -> None:
    mapping = document(MOMENTUM_CASES[name])
    assert plan(load(mapping)).decisions["blocks.main.mixer"].family == "momentum_delta"
    hold_to_the_recurrence(mapping, close, length=43, cut=9, steps=10)


DIAGONAL = {"kind": "implicit", "diagonal": True, "step_size": {**STEP, "per": "value"}}
SCANS: dict[str, dict[str, Any]] = {
    "read before": {"retention": {"kind": "decay", "gate": "s6"}, "update": DIAGONAL, "readout": {"read": "before"}},
    "turns, step first": {
        "bias": "dot",
        "retention": {**TURNS, "discretization": "bilinear", "order": "step_first"},
        "update": GD,
        "readout": {"read": "before"},
    },
}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_is_the_recurrence_whole_split_and_stepped(name: str) -> None:
    mapping = document(SCANS[name])
    assert plan(load(mapping)).decisions["blocks.main.mixer"].family == "scan"
    hold_to_the_recurrence(mapping, close, length=43, cut=9, steps=10)


def test_a_window_too_long_for_its_gates_is_left_to_steps() -> None:
    mapping = document({"bias": {"kind": "l2", "window": {"length": 5}}, "retention": KEY_DECAY, "update": GD})
    decision = plan(load(mapping)).decisions["blocks.main.mixer"]
    reasons = {rejection.family: rejection.reason for rejection in decision.rejected}
    assert decision.family == "sequential"
    assert reasons["delta"].startswith(
        "the loss sums over 5 tokens, with gates per key: as many rows a token cost more"
    )


def test_explain_says_how_a_window_runs() -> None:
    text = str(archspec.explain(load(document(CASES["window"])), device="cuda"))
    assert "runs as delta / chunkwise on torch: a matrix under l2: the windows of a chunk's tokens solve one" in text


AUTOCAST = {
    "plain": {"retention": DECAY, "update": GD},
    "momentum": {"retention": DECAY, "update": MOMENTUM},
    **{name: CASES[name] for name in ("window, decay first", "window, together", "decay per value", "turns held")},
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_leaves_the_state_in_fp32(name: str) -> None:
    spec = load(document(AUTOCAST[name]))
    exact = archspec.compile(spec, vocab_size=11, backend="reference")
    model = archspec.compile(spec, vocab_size=11)
    model.load_state_dict(exact.state_dict())
    x = torch.randint(0, 11, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        last = model.step(x[:, 0], found.state)
    loss: Tensor = found.logits.float().sin().sum()
    torch.autograd.backward(loss)
    for state in (found.state, last.state):
        assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    # bf16 has 8 bits; projections round inputs and outputs a few times
    error = (found.logits.float() - wanted.logits).detach().norm()
    assert float(error / wanted.logits.detach().norm()) < 0.02
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_shapes_follow_on_a_device_without_numbers() -> None:
    for name in AUTOCAST:
        model = archspec.compile(load(document(AUTOCAST[name])), vocab_size=11).to("meta")
        assert model(torch.zeros(2, 9, dtype=torch.long, device="meta")).logits.shape == (2, 9, 11)
