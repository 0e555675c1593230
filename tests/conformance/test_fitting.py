"""What does not fit is refused with the place and the reason; what only looks as if it did not compiles and agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.blocks.model import num_parameters
from archspec.complexity import predict
from archspec.errors import SpecError
from archspec.kernels.softmax import softmax_attention
from archspec.rule import Rule
from archspec.schema import MemoryMixer, Spec


def document(**changes: Any) -> dict[str, Any]:
    if "kind" in changes:
        return {"name": "fitting", "model_dim": 8, "blocks": {"main": {"mixer": changes}}, "layout": "main"}
    mixer = {
        "num_heads": 2,
        "key_dim": 4,
        "value_dim": 4,
        "memory": "matrix",
        "update": "gradient_descent",
        **changes,
    }
    return {
        "name": "fitting",
        "model_dim": 8,
        "blocks": {"main": {"mixer": mixer}},
        "layout": {"repeat": 2, "of": "main"},
    }


def problems(**changes: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        archspec.load(document(**changes))
    return [str(problem) for problem in caught.value.problems]


STEPS = {"kind": "multi_step", "steps": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key": [[{"dim": 2}, {"dim": 2}]]}, "key.parts[0].parts: a part has no parts of its own"),
        (
            {"key": [{"blend": {"with": "first_layer", "gate": "sigmoid"}}]},
            "key.parts[0].blend: a blend is of the whole projection; write it beside 'parts'.",
        ),
        (
            {"qk": [{"feature": "polynomial"}]},
            "parts[0].feature: the feature map changes the part's size from 4 to ",
        ),
        ({"value": [{"position": "rope"}]}, "value.parts[0].position: positions act on queries and keys"),
        ({"key": [{"heads": 3}]}, "key.parts[0].heads: 3 groups do not divide the projection's 2."),
        (
            {"key": [{"kind": "identity", "dim": 2}, {"dim": 2}]},
            "key.parts[0]: an identity of a source of width 8 cannot be 4 wide; use kind 'linear'.",
        ),
        (
            {"key": [{"block_size": 2, "dim": 2}, {"dim": 2}]},
            "key.parts[0].block_size: blocks of 2 need equal widths that it divides; found 8 in and 4 out.",
        ),
        (
            {"value": {"blend": {"with": "first_layer", "gate": {"kind": "sigmoid", "per": "key"}}}},
            "value.blend.gate: a value has value channels; found per key: use head or value.",
        ),
        (
            {"key": {"blend": {"with": "first_layer", "gate": "toward_step"}}},
            "key.blend.gate: toward_step is derived from what comes after the projections; use sigmoid.",
        ),
        (
            {"key": {"blend": {"with": "first_layer", "gate": {"kind": "sigmoid", "from": "value"}}}},
            "key.blend.gate.from: unknown stream 'value'; known here: input.",
        ),
        (
            {"value": {"heads": 1, "blend": {"with": "first_layer", "gate": "sigmoid"}}},
            "value.blend: a blend has one gate a head, and the heads share this projection.",
        ),
        (
            {"update": STEPS, "readout": {"gate": {"kind": "silu", "from": "value"}}},
            "readout.gate: a token has 2 values here; read the input or a stream.",
        ),
        (
            {"update": STEPS, "readout": {"skip": {"of": "key"}}},
            "readout.skip.of: a token has 2 keys here; skip the input or a stream.",
        ),
        ({"update": STEPS, "readout": {"correction": 1}}, "readout.correction: a token has 2 keys here"),
        (
            {"retention": {"kind": "decay", "gate": {"kind": "sigmoid", "block_size": 3}}},
            "retention.gate.block_size: blocks of 3 need equal widths that it divides; found 8 in and 2 out.",
        ),
        (
            {"readout": {"gate": {"kind": "silu", "offset": "fan_in"}}},
            "an offset is a vector, and fan_in is no law of vectors; use a number, 'dt', 'by_depth' or a range.",
        ),
        (
            {"retention": {"kind": "decay", "gate": {"kind": "ssd", "rate": {"init": {"normal": 1.0}}}}},
            "a rate is stored as its logarithm: its law must draw numbers above zero only.",
        ),
        (
            {"retention": {"kind": "decay", "gate": 0}},
            "retention.gate: a decay of 0 keeps nothing, and its logarithm does not exist; use a positive fraction.",
        ),
        (
            {"retention": {"kind": "decay", "gate": {"kind": "ssd", "step": "tanh"}}},
            "retention.gate.step: must not be negative, and tanh ranges over [-1, 1]; use softplus.",
        ),
        (
            {
                "memory": "kv",
                "update": "nonparametric",
                "gates": {"fade": {"kind": "sigmoid", "per": "key"}},
                "retention": {"kind": "decay", "gate": "fade"},
            },
            "retention.gate: a memory of tokens fades per head: its softmax has one weight a token.",
        ),
        (
            {
                "gates": {"down": {"kind": "sigmoid", "scale": 1.0}},
                "retention": {"kind": "decay", "gate": {"kind": "named", "name": "down", "scale": -1.0}},
            },
            "retention.gate: keeps a fraction in [0, 1], and named ranges over [-1, 0]",
        ),
        (
            {
                "value": {
                    "blend": {"with": "first_layer", "gate": {"kind": "ssd", "step": {"kind": "sigmoid", "per": "key"}}}
                }
            },
            "value.blend.gate: a value has value channels; found per key: use head or value.",
        ),
        (
            {"streams": {"side": {"dim": 8, "block_size": 3}}},
            "streams.side.block_size: blocks of 3 need equal widths that it divides; found 8 in and 8 out.",
        ),
        (
            {
                "update": STEPS,
                "retention": {"kind": "decay", "gate": {"kind": "ssd", "step": {"kind": "softplus", "from": "key"}}},
            },
            "retention.gate.step: a token has 2 keys here; read the input or a stream.",
        ),
        (
            {"update": {**STEPS, "step_size": "sigmoid"}, "readout": {"correction": "toward_step"}},
            "readout.correction: a token has 2 step sizes here, and toward_step is derived from one.",
        ),
        (
            {"bias": {"kind": "l2", "read_key": {"scale": {"kind": "sigmoid", "per": "value"}}}},
            "bias.read_key.scale: a key has key channels; found per value: use head or key.",
        ),
        (
            {"readout": {"correction": {"kind": "query_key", "strength": "dt"}}},
            "readout.correction.strength: dt is the token step of a decay such as 'ssd'",
        ),
        (
            {"memory": {"kind": "mlp", "offsets": True}, "retention": {"kind": "lq", "gate": "sigmoid"}},
            "and b1, b2 of memory mlp starts at zero; start it from a law, or leave it out.",
        ),
        (
            {
                "kind": "routed",
                "experts": 2,
                "of": {"memory": "matrix", "update": "gradient_descent"},
                "router": {"block_size": 2},
            },
            "router.block_size: blocks of 2 need equal widths that it divides; found 8 in and 2 out.",
        ),
        (
            {
                "kind": "memory_as_context",
                "attention": {"memory": "kv", "update": "nonparametric"},
                "memory": {
                    "memory": "matrix",
                    "update": "gradient_descent",
                    "readout": {"gate": {"kind": "ssd", "step": {"kind": "softplus", "from": "key"}}},
                },
            },
            "memory.readout.gate: a look-up has no key and no value; read the query, 'input' or a stream.",
        ),
    ],
)
def test_what_does_not_fit_names_the_place_and_the_reason(changes: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(**changes)), problems(**changes)


def mixer(spec: Spec) -> MemoryMixer:
    found = spec.blocks["main"].mixer
    assert isinstance(found, MemoryMixer)
    return found


SSD = {"kind": "ssd", "per": "key", "rate": {"per": "value"}}


@pytest.mark.parametrize(
    ("gate", "varies"),
    [
        ({"kind": "sigmoid", "per": "key"}, "key"),
        (SSD, "state"),
        ({"kind": "ssd", "step": {"kind": "softplus", "per": "key"}}, "key"),
        ({"kind": "ssd", "step": {"kind": "softplus", "per": "key"}, "rate": {"per": "value"}}, "state"),
        ("shared", "value"),
    ],
)
def test_a_derived_gate_varies_over_what_it_is_derived_from(gate: Any, varies: str) -> None:
    changes = {"gates": {"shared": {"kind": "sigmoid", "per": "value"}}, "retention": {"kind": "decay", "gate": gate}}
    spec = archspec.load(document(bias="dot", **changes))
    rule = Rule.of(mixer(spec), spec.model_dim)
    assert rule.retention.decay_gate is not None
    assert rule.granularity(rule.retention.decay_gate) == varies


def agrees(changes: dict[str, Any]) -> None:
    """Whole, split and step forms of the compiled spec agree, with parameters away from special values."""
    spec = archspec.load(document(**changes))
    model = archspec.compile(spec, vocab_size=5, dtype=torch.float64)
    assert num_parameters(model) == predict(spec, 5).parameters
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = torch.randint(0, 5, (2, 7), generator=generator)
        whole = model(x).logits
        head = model(x[:, :3])
        torch.testing.assert_close(torch.cat([head.logits, model(x[:, 3:], head.state).logits], 1), whole)
        state, steps = None, []
        for t in range(x.shape[1]):
            found = model.step(x[:, t], state)
            state = found.state
            steps.append(found.logits)
        torch.testing.assert_close(torch.stack(steps, 1), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {"heads": 1}, "readout": {"correction": 0.5}},
        {"value": {"heads": 1}, "readout": {"gate": {"kind": "silu", "from": "value"}}},
        {"qk": {"heads": 1}, "readout": {"skip": {"of": "value", "gate": {"kind": "query_key"}}}},
        {"value": {"blend": {"with": "first_layer", "gate": "sigmoid"}}},
        {"value": {"blend": {"with": "first_layer", "gate": {"kind": "sigmoid", "per": "value", "conv": 2}}}},
        {"key": {"blend": {"with": "first_layer", "gate": {"kind": "sigmoid", "per": "key", "shift": "lerp"}}}},
        {"qk": [{"dim": 1, "position": "xpos"}, {"dim": 3, "position": "rope"}]},
        {"gates": {"eta": "sigmoid"}, "update": {"kind": "multi_step", "steps": 2, "step_size": "eta"}},
        {"update": {"kind": "multi_step", "steps": 2, "step_size": {"kind": "sigmoid", "per": "key"}}},
        {"memory": {"kind": "kv", "scale": -0.5}, "update": "nonparametric"},
        {"memory": {"kind": "kv", "scale": 0.0, "window": 3}, "update": "nonparametric"},
        {"retention": {"kind": "decay", "gate": {"kind": "ssd", "step": {"kind": "softplus", "shift": "lerp"}}}},
        {
            "bias": "dot",
            "retention": {"kind": "decay", "gate": SSD},
            "update": {"kind": "gradient_descent", "step_size": "dt"},
        },
    ],
    ids=str,
)
def test_what_fits_runs_in_every_form(changes: dict[str, Any]) -> None:
    agrees(changes)


def test_heads_that_share_a_key_are_corrected_by_it() -> None:
    """Two heads with one key, against the same model with that key written out for both."""
    shared = archspec.compile(
        archspec.load(document(key={"heads": 1}, readout={"correction": 0.5})), vocab_size=5, dtype=torch.float64
    )
    apart = archspec.compile(archspec.load(document(readout={"correction": 0.5})), vocab_size=5, dtype=torch.float64)
    sizes = {name: tensor.shape for name, tensor in apart.state_dict().items()}
    written = {
        name: tensor if tensor.shape == sizes[name] else torch.cat([tensor, tensor], -1)
        for name, tensor in shared.state_dict().items()
    }
    assert any(written[name].shape != tensor.shape for name, tensor in shared.state_dict().items())
    apart.load_state_dict(written)
    x = torch.arange(5)[None]
    torch.testing.assert_close(shared(x).logits, apart(x).logits)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_softmax_may_be_scaled_by_what_is_not_positive(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    found = softmax_attention(q, k, v, scale=scale)[0]
    for t in range(6):
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1])
        torch.testing.assert_close(found[:, t], torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, : t + 1]))


def test_the_first_layer_blends_with_itself() -> None:
    """lerp(x, x, gate) is x: one layer with a blend is the layer without."""
    blend = {"with": "first_layer", "gate": "sigmoid"}
    models = []
    for value in ({}, {"blend": blend}):
        written = document(value=value) | {"layout": "main"}
        models.append(archspec.compile(archspec.load(written), vocab_size=5, dtype=torch.float64))
    plain, blended = models
    blended.load_state_dict(plain.state_dict(), strict=False)
    x = torch.arange(5)[None]
    torch.testing.assert_close(blended(x).logits, plain(x).logits)
