"""The merges of the normal form, one by one: true ones share a hash *and* the function, tempting ones do not merge.

The list is that of docs/language.md, "Equal specs".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.canonical import architecture_hash
from archspec.schema import Spec

SIGMOID = {"kind": "sigmoid", "scale": 0.3}
GDN = {"kind": "decay", "gate": "gdn"}
KV = {"memory": "kv", "update": "nonparametric"}
ONE_ROW = {"memory": {"kind": "matrix", "scale": 1}, "qk": "constant", "key_dim": 1}
VECTOR = {"memory": "vector", "key_dim": None}
DESCENT = {"kind": "gradient_descent", "step_size": SIGMOID}


def spec(changes: dict[str, Any]) -> Spec:
    """Return a spec of one mixer with these choices; a whole document where there is a ``text``."""
    if "text" in changes:
        return archspec.loads(changes["text"])
    changes = dict(changes)
    document = {"name": "merge", "model_dim": 8, "layout": changes.pop("layout", "main")}
    block = changes.pop("block", "main")
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 4, "memory": "matrix", "update": DESCENT, **changes}
    mixer = {key: value for key, value in mixer.items() if value is not None}
    return archspec.load({**document, "blocks": {block: {"mixer": mixer}}})


def decay(gate: Any, order: str = "decay_first") -> dict[str, Any]:
    return {"kind": "decay", "gate": gate, "order": order}


def descent(**more: Any) -> dict[str, Any]:
    return {**DESCENT, **more}


def momentum(value: Any) -> dict[str, Any]:
    return {"kind": "momentum", "momentum": value, "step_size": SIGMOID}


PER_KEY = {"kind": "sigmoid", "per": "key"}
LEARNED = {"kind": "matrix", "initial": "learned"}
LQ = {"kind": "lq", "gate": "sigmoid", "q": 3}
PER_VALUE = {"kind": "sigmoid", "per": "value"}
CONSTANT = {"kind": "constant", "value": 0.5}
MLP = {"kind": "mlp", "expansion": 1}

PRESETS: dict[str, dict[str, Any]] = {
    "gdn": {"kind": "ssd", "rate": {"init": {"uniform": [0, 16]}}},
    "kda": {"kind": "ssd", "per": "key", "rank": {"ratio": 1, "of": "value_dim"}},
    "s6": {"kind": "ssd", "per": "value", "rank": {"ratio": 0.0625}, "rate": {"per": "state", "init": {"arange": 1}}},
    "gla": {"kind": "sigmoid", "per": "key", "rank": 16, "temperature": 16, "offset": 0},
    "rwkv7": {
        "kind": "bounded_decay",
        "log_floor": -0.6065306597126334,
        "per": "key",
        "rank": 64,
        "hidden": "tanh",
        "shift": "lerp",
        "offset": {"linspace": [-6, -1]},
    },
    "retnet": {"kind": "constant", "schedule": "retnet"},
    "lightning": {"kind": "constant", "schedule": "lightning"},
    "alibi": {"kind": "constant", "schedule": "alibi"},
}
"""What presets expand to, frozen: another expansion would change the hash of every spec that uses one."""

PLAIN = """
name: plain
model_dim: 8
blocks:
  main:
    mixer: {num_heads: 2, memory: matrix, qk: {norm: l2}, retention: {kind: decay, gate: gdn}, update: gradient_descent}
    feed_forward: mlp
    norm: layer
  other:
    mixer: {num_heads: 2, memory: matrix, qk: {norm: l2}, retention: {kind: decay, gate: gdn}, update: gradient_descent}
    norm: layer
layout: [main, other]
"""
BY_BLOCK = """
name: by_block
model_dim: 8
blocks:
  main: {extends: other, feed_forward: mlp}
  other:
    mixer: {num_heads: 2, memory: matrix, qk: {norm: l2}, retention: {kind: decay, gate: gdn}, update: gradient_descent}
    norm: layer
layout: [main, other]
"""
SHIPPED = (
    "extends: gla\nname: mine\nmodel_dim: 16\nblocks: {main: {mixer: {num_heads: 2}}}\nlayout: {repeat: 1, of: main}"
)
WRITTEN_OUT = """
name: written_out
model_dim: 16
blocks:
  main:
    mixer: {num_heads: 2, key_dim: {ratio: 0.5}, memory: matrix, bias: dot, retention: {kind: decay, gate: gla},
      update: gradient_descent, readout: {norm: rms, gate: silu}}
    feed_forward: {kind: swiglu, expansion: 2.67, multiple_of: 64}
layout: main
"""

TRUE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        f"the preset {name}": ({"bias": "dot", "retention": decay(name)}, {"bias": "dot", "retention": decay(written)})
        for name, written in PRESETS.items()
    },
    "a block that extends another": ({"text": BY_BLOCK}, {"text": PLAIN}),
    "a document that extends another": ({"text": SHIPPED}, {"text": WRITTEN_OUT}),
    "a list where a projection stands": (
        {"key": [{"dim": 1}, {"dim": 3}]},
        {"key": {"kind": "linear", "parts": [{"dim": 1}, {"dim": 3}]}},
    ),
    "a number where a gate stands": (
        {"update": descent(step_size=0.5)},
        {"update": descent(step_size={"kind": "constant", "value": 0.5})},
    ),
    "a constant and its scale": (
        {"update": descent(step_size={"kind": "constant", "value": 0.25, "scale": 2})},
        {"update": descent(step_size=0.5)},
    ),
    "a short form": ({"bias": "l2"}, {"bias": {"kind": "l2"}}),
    "a preset": ({"retention": GDN}, {"retention": decay({"kind": "ssd", "rate": {"init": {"uniform": [0, 16]}}})}),
    "a default": ({}, {"bias": "l2", "retention": "none"}),
    "a resolved size": ({"key_dim": 4}, {"key_dim": {"ratio": 1}}),
    "a repeat": ({"layout": {"repeat": 2, "of": "main"}}, {"layout": ["main", "main"]}),
    "a cycle": ({"layout": {"cycle": 2, "of": "main"}}, {"layout": ["main", "main"]}),
    "a block's name": ({"block": "main"}, {"block": "other", "layout": "other"}),
    "a loop of one": ({"layout": {"loop": 1, "of": "main"}}, {"layout": "main"}),
    "a constant along an axis": (
        {"update": descent(step_size={**CONSTANT, "per": "key"})},
        {"update": descent(step_size=0.5)},
    ),
    "a decay of one": ({"retention": decay(1)}, {"retention": "none"}),
    "a decay of one in another order": ({"retention": decay(1, "step_first")}, {"retention": "none"}),
    "momentum zero": ({"update": momentum(0)}, {"update": DESCENT}),
    "one of several steps": ({"update": {"kind": "multi_step", "steps": 1, "step_size": SIGMOID}}, {"update": DESCENT}),
    "orders under dot": (
        {"bias": "dot", "retention": decay("gdn")},
        {"bias": "dot", "retention": decay("gdn", "together")},
    ),
    "an anchor under dot": ({"bias": "dot", "update": descent(anchor=4)}, {"bias": "dot", "update": DESCENT}),
    "an anchor under dot behind a link": (
        {"memory": LEARNED, "bias": "dot", "retention": LQ, "update": descent(anchor=4)},
        {"memory": LEARNED, "bias": "dot", "retention": LQ, "update": DESCENT},
    ),
    "orders under dot behind a link": (
        {"bias": "dot", "retention": {"kind": "kl", "gate": "sigmoid"}},
        {"bias": "dot", "retention": {"kind": "kl", "gate": "sigmoid", "order": "together"}},
    ),
    "an anchor of one": (
        {"update": descent(anchor=1), "retention": decay("gdn")},
        {"update": DESCENT, "retention": decay("gdn", "together")},
    ),
    "lq at two, printed": (
        {"memory": {"kind": "matrix", "initial": "learned"}, "retention": {"kind": "lq", "gate": "sigmoid", "q": 2}},
        {"memory": {"kind": "matrix", "initial": "learned"}, "retention": decay("sigmoid")},
    ),
    "lq at two, mirror": (
        {
            "memory": {"kind": "matrix", "initial": "learned"},
            "retention": {"kind": "lq", "gate": "sigmoid", "q": 2, "map": "mirror"},
        },
        {"memory": {"kind": "matrix", "initial": "learned"}, "retention": decay("sigmoid")},
    ),
    "lp at one": ({"bias": {"kind": "lp", "p": 1}}, {"bias": "l1"}),
    "lp at two": ({"bias": {"kind": "lp", "p": 2}}, {"bias": "l2"}),
    "huber's forms at one channel": (
        {"value_dim": 1, "bias": {"kind": "huber", "form": "norm"}},
        {"value_dim": 1, "bias": {"kind": "huber", "form": "coordinate"}},
    ),
    "huber's mixture at one channel": (
        {"value_dim": 1, "bias": {"kind": "huber", "form": "mixture"}},
        {"value_dim": 1, "bias": "huber"},
    ),
    "weights of one": ({"bias": {"kind": "weighted_l2", "weights": 1}}, {"bias": "l2"}),
    "a window of one": ({"bias": {"kind": "l2", "window": {"length": 1, "weights": 1}}}, {"bias": "l2"}),
    "alibi and its decay": ({**KV, "qk": {"position": "alibi"}}, {**KV, "retention": decay("alibi")}),
    "alibi over a decay of one": (
        {**KV, "qk": {"position": "alibi"}, "retention": decay(1)},
        {**KV, "retention": decay("alibi")},
    ),
    "one linear map at the output": ({"output": "linear"}, {}),
    "a vector and a matrix of one row": (VECTOR, ONE_ROW),
    "a learned vector under a decay of its channels": (
        {**VECTOR, "memory": {"kind": "vector", "initial": "learned"}, "retention": decay(PER_VALUE)},
        {
            **ONE_ROW,
            "memory": {"kind": "matrix", "scale": 1, "initial": "learned"},
            "retention": decay(PER_VALUE),
        },
    ),
    "a write as strong as the step": (
        {"update": {"kind": "gradient_descent", "step_size": 0.5, "write_size": 0.5}},
        {"update": {"kind": "gradient_descent", "step_size": 0.5}},
    ),
}

TEMPTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothed lp at two and l2": ({"bias": {"kind": "lp", "p": 2, "smoothing": 10}}, {"bias": "l2"}),
    "lp near two and l2": ({"bias": {"kind": "lp", "p": 2.0001}}, {"bias": "l2"}),
    "huber with a far threshold and l2": ({"bias": {"kind": "huber", "threshold": 1e6}}, {"bias": "l2"}),
    "step first and decay first under dot": (
        {"bias": "dot", "retention": decay("gdn", "step_first")},
        {"bias": "dot", "retention": decay("gdn")},
    ),
    "orders of a network under dot": (
        {"memory": MLP, "bias": "dot", "retention": decay("gdn", "together")},
        {"memory": MLP, "bias": "dot", "retention": decay("gdn")},
    ),
    "an anchored network under dot": (
        {"memory": MLP, "bias": "dot", "update": descent(anchor=4)},
        {"memory": MLP, "bias": "dot"},
    ),
    "an anchored matrix under l2": ({"update": descent(anchor=4)}, {}),
    "orders of a matrix under l2": ({"retention": decay("gdn", "together")}, {"retention": decay("gdn")}),
    "a step twice as large": ({"update": descent(step_size={"kind": "sigmoid", "scale": 0.6})}, {}),
    "a decay and a step from the undecayed weights, per key": (
        {"retention": decay(PER_KEY, "together")},
        {"retention": decay(PER_KEY)},
    ),
    "a decay before and after the step, per key": (
        {"retention": decay(PER_KEY, "step_first")},
        {"retention": decay(PER_KEY)},
    ),
    "a decay after the step and in one sum with it, per key": (
        {"retention": decay(PER_KEY, "step_first")},
        {"retention": decay(PER_KEY, "together")},
    ),
    "a link at anchors and at tokens, under dot": (
        {"memory": LEARNED, "bias": "dot", "retention": LQ, "update": descent(anchor={"every": 4, "link": "anchor"})},
        {"memory": LEARNED, "bias": "dot", "retention": LQ, "update": descent(anchor=4)},
    ),
    "lq near two and decay": (
        {"memory": LEARNED, "retention": {"kind": "lq", "gate": "sigmoid", "q": 2.0001}},
        {"memory": LEARNED, "retention": decay("sigmoid")},
    ),
    "lq at three, printed and mirror": (
        {"memory": LEARNED, "retention": {"kind": "lq", "gate": "sigmoid", "q": 3}},
        {"memory": LEARNED, "retention": {"kind": "lq", "gate": "sigmoid", "q": 3, "map": "mirror"}},
    ),
    "slices of kl over inputs and over outputs": (
        {"retention": {"kind": "kl", "gate": "sigmoid", "over": "input"}},
        {"retention": {"kind": "kl", "gate": "sigmoid", "over": "output"}},
    ),
    "a step of one and of several with a key each": (
        {"update": {"kind": "multi_step", "steps": 2, "step_size": SIGMOID}},
        {"update": {"kind": "multi_step", "steps": 3, "step_size": SIGMOID}},
    ),
    "an anchor of one with a learned share and the token": (
        {"update": descent(anchor={"every": 1, "reduce": "learned"})},
        {"update": DESCENT},
    ),
    "an implicit and an explicit step": ({"update": {"kind": "implicit", "step_size": SIGMOID}}, {}),
    "two steps and one": ({"update": {"kind": "multi_step", "steps": 2, "step_size": SIGMOID}}, {}),
    "a low rank that is full": ({"key": {"rank": 8}}, {}),
    "a network of one layer and a matrix": ({"memory": {"kind": "mlp", "depth": 1}}, {}),
    "a convolution of one and none": ({"key": {"conv": 1}}, {}),
    "a loop and a repeat": (
        {"layout": {"loop": 2, "of": "main"}},
        {"layout": {"repeat": 2, "of": "main"}},
    ),
    "a long window and all tokens": ({"memory": {"kind": "kv", "window": 4096}, "update": "nonparametric"}, KV),
    "a scaled query before a norm": (
        {"qk": {"norm": "l2"}, "memory": {"kind": "matrix", "scale": 2}},
        {"qk": {"norm": "l2"}},
    ),
    "alibi and a decay of another law": ({**KV, "qk": {"position": "alibi"}}, {**KV, "retention": decay("retnet")}),
    "an output with an offset and one without": ({"output": {"kind": "linear", "offset": 0}}, {}),
    "alibi and rope": ({**KV, "qk": {"position": "alibi"}}, {**KV, "qk": {"position": "rope"}}),
    "kl and decay": ({"retention": {"kind": "kl", "gate": 0.5}}, {"retention": decay(0.5)}),
}


@pytest.mark.parametrize("name", TRUE)
def test_true_merges_share_hash_parameters_outputs_and_state(name: str) -> None:
    first, second = map(spec, TRUE[name])
    assert architecture_hash(first) == architecture_hash(second)
    models = [archspec.compile(found, vocab_size=5, dtype=torch.float64) for found in (first, second)]
    own, other = (list(model.parameters()) for model in models)
    assert [p.shape for p in own] == [p.shape for p in other]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, its in zip(own, other, strict=True):
            mine.add_(0.3 * torch.randn(mine.shape, generator=generator, dtype=torch.float64))
            its.copy_(mine)
        for length in (1, 6, 11):
            tokens = torch.randint(0, 5, (2, length), generator=generator)
            found, expected = (model(tokens) for model in models)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
            kept = [sum(x[0].numel() for x in output.state.tensors.values()) for output in (found, expected)]
            assert kept[0] == kept[1]


@pytest.mark.parametrize("name", TEMPTING)
def test_tempting_merges_hash_apart(name: str) -> None:
    first, second = map(spec, TEMPTING[name])
    assert architecture_hash(first) != architecture_hash(second)


SAME_HERE = {
    "huber with a far threshold and l2",  # no error passes the threshold
    "a long window and all tokens",  # no sequence is as long
}
"""What agrees at these values and lengths, and not at all: hashed apart, since a merge must hold for every one."""


@pytest.mark.parametrize("name", TEMPTING)
def test_tempting_merges_are_other_functions(name: str) -> None:
    """Of the same parameters, where these correspond; some need other parameters altogether."""
    models = [archspec.compile(spec(found), vocab_size=5, dtype=torch.float64) for found in TEMPTING[name]]
    own, other = (list(model.parameters()) for model in models)
    if [p.shape for p in own] != [p.shape for p in other]:
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, its in zip(own, other, strict=True):
            mine.add_(0.3 * torch.randn(mine.shape, generator=generator, dtype=torch.float64))
            its.copy_(mine)
        tokens = torch.randint(0, 5, (2, 11), generator=generator)
        found, expected = (model(tokens).logits for model in models)
    assert (float((found - expected).abs().max()) < 1e-9) is (name in SAME_HERE)
