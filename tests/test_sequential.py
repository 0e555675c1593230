"""The sequential family: rules whose gradients see moved weights, recorded token by token, against the recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import archspec
from archspec import sequential
from archspec.blocks.model import Output, SequenceModel
from archspec.blocks.rule import Quantities
from archspec.families import Bias
from archspec.loading import load
from archspec.lowering import plan
from tests.forms import compiled, hold_to_the_recurrence, read_out

STEP = {"kind": "sigmoid", "scale": 0.2}
DECAY = {"gate": {"kind": "sigmoid", "offset": 2}}
LEARNED = {"kind": "matrix", "initial": "learned"}
MLP = {"kind": "mlp", "expansion": 2, "residual": True, "norm": "post", "offsets": True}
GD = {"kind": "gradient_descent", "step_size": STEP}
MUON = {"kind": "muon", "step_size": STEP, "momentum": "sigmoid", "iterations": 2}
MANY = {"kind": "multi_step", "steps": 3, "step_size": STEP}

CASES: dict[str, dict[str, Any]] = {
    "decay first": {"memory": MLP, "retention": {"kind": "decay", **DECAY}, "update": GD},
    "step first": {"memory": MLP, "retention": {"kind": "decay", **DECAY, "order": "step_first"}, "update": MUON},
    "l1": {"bias": "l1", "retention": {"kind": "decay", **DECAY}, "update": GD},
    "gated": {"memory": {"kind": "mlp", "gated": True, "expansion": 1}, "bias": "huber", "update": MANY},
    "softmax": {"memory": MLP, "retention": {"kind": "kl", **DECAY}, "update": GD},
    "norm": {"memory": LEARNED, "bias": {"kind": "lp", "p": 3}, "retention": {"kind": "lq", **DECAY}, "update": GD},
    "fed back": {"retention": {"kind": "elastic_net", "form": "proximal", **DECAY}, "update": MANY},
    "window": {"memory": MLP, "bias": {"kind": "l2", "window": {"length": 3}}, "update": MUON},
    "weighed window": {
        "bias": {"kind": "huber", "window": {"length": 4, "weights": "sigmoid"}, "threshold": "softplus"},
        "retention": {"kind": "decay", **DECAY},
        "update": {**GD, "step_size": {"kind": "sigmoid", "scale": 0.1, "conv": 3}},
    },
    "two strengths": {
        "memory": MLP,
        "bias": {"kind": "l2", "read_key": {"norm": "l2", "scale": "sigmoid"}},
        "retention": {"kind": "decay", **DECAY},
        "update": {**GD, "write_size": "sigmoid"},
    },
    "read before": {
        "bias": "l1",
        "update": {"kind": "momentum", "momentum": "sigmoid", "step_size": STEP},
        "readout": {"read": "before"},
    },
    "mean of two strengths": {
        "memory": MLP,
        "update": {**GD, "write_size": "sigmoid", "anchor": {"every": 4, "reduce": "mean"}},
    },
    "turning": {
        "retention": {
            "kind": "complex_decay",
            "gate": "sigmoid",
            "phase": "tanh",
            "pairs": "value",
            "order": "together",
        },
        "update": {"kind": "implicit", "step_size": STEP},
    },
}


def document(name: str) -> dict[str, Any]:
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "qk": {"norm": "l2"}, "memory": "matrix", **CASES[name]}
    return {"name": "sequential", "model_dim": 8, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    # fp64 and two dozen tokens: the operations are the same, up to the order of sums.
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def with_states(output: Output) -> Tensor:
    return read_out(output) + sum(x.cos().sum() for x in output.state.tensors.values())


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several stretches in a short sequence."""
    monkeypatch.setattr(sequential, "STRETCH", 8)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_recurrence_whole_split_and_stepped(name: str) -> None:
    mapping = document(name)
    decision = plan(load(mapping)).decisions["blocks.main.mixer"]
    assert decision.name == "sequential/step/torch"
    hold_to_the_recurrence(mapping, close, length=21, cut=9, steps=10, loss=with_states)


def test_a_token_is_recorded_once_and_keeps_its_states_only() -> None:
    """Going back needs the states between tokens, not what a token computed on its way."""
    sequential._programs.clear()
    mapping = document("decay first")
    model = compiled(mapping, "auto")
    x = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(x).logits.sum().backward()
    assert len(sequential._programs) == 1
    layers: Any = model.layers
    rule = layers[0].mixer.rule
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    quantities = random_quantities(model, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sequential.sequential(rule, quantities, None, 0, "auto")
    weights = sum(d_in * d_out for d_in, d_out in rule.memory.weights(rule.dims).values())
    # 16 tokens of 2 sequences and 2 heads: their states, and the weights that are read side by side.
    assert sum(kept) < 4 * 16 * 4 * weights


def random_quantities(model: SequenceModel, length: int) -> Quantities:
    """Quantities of a mixer whose gates ask for gradients."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, length, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    gates = {
        path: -torch.rand(2, length, 2, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
        for path in ("retention.gate", "update.step_size")
    }
    layers: Any = model.layers
    memory = layers[0].mixer.memory
    return Quantities(q, k, v, gates, memory.start(), memory.network())


def test_a_component_that_looks_at_numbers_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that chooses by a number has no one list of operations; the recurrence runs it."""
    kind = type(Bias.parse("l1"))

    def gradient(self: Bias, prediction: Tensor, value: Tensor, gates: Any) -> Tensor:
        error = prediction - value
        return error.sign() if bool(error.sum() > 0) else error

    monkeypatch.setattr(kind, "gradient", gradient)
    sequential._programs.clear()
    fast, slow = compiled(document("l1"), "auto"), compiled(document("l1"), "reference")
    x = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(0))
    close(fast(x).logits, slow(x).logits)
    assert list(sequential._programs.values()) == [None]
    sequential._programs.clear()


def test_explain_says_why_one_token_follows_another() -> None:
    text = str(archspec.explain(load(document("l1"))))
    assert "runs as sequential / step on torch: every token's gradient sees the weights" in text
    assert "note: one token after another" in text
