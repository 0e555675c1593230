"""Choices outside the sweep of tests/test_compiled.py, each in a small mixer: fast form, split and steps agree with the
recurrence, and sizes are as predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archspec import complexity
from archspec.blocks.carry import Carry
from archspec.blocks.model import SequenceModel, num_parameters
from archspec.canonical import architecture_hash
from archspec.compiler import compile  # noqa: A004
from archspec.errors import SpecError
from archspec.families import Bias, Position
from archspec.loading import load
from tests.forms import moved

LENGTH, SPLIT, VOCABULARY = 12, 5, 11

LINEAR = {"memory": "matrix", "bias": "dot", "update": "gradient_descent"}
ATTENTION = {"memory": "kv", "update": "nonparametric"}
VECTOR = {"memory": "vector", "bias": "dot", "update": "gradient_descent", "key_dim": None}
MIXERS: dict[str, dict[str, Any]] = {
    "exponential features": {**LINEAR, "qk": {"feature": {"kind": "exponential", "degree": 2}}},
    "hadamard features": {**LINEAR, "qk": {"feature": "hadamard"}},
    "silu features": {**LINEAR, "qk": {"position": "rope", "feature": "silu"}},
    "features of length one": {**LINEAR, "bias": "l2", "qk": {"activation": "silu", "feature": "l2norm"}},
    "xpos": {**ATTENTION, "qk": {"position": "xpos"}},
    "xpos on a matrix": {**LINEAR, "key_dim": 5, "qk": {"position": {"kind": "xpos", "scale_base": 8, "modulo": 7}}},
    "alibi": {**ATTENTION, "retention": {"kind": "decay", "gate": "alibi"}},
    "sinks": {**ATTENTION, "memory": {"kind": "kv", "window": 3, "sinks": 2}, "prefix": 1},
    "stride": {**ATTENTION, "memory": {"kind": "kv", "window": 1, "stride": 3}, "qk": {"heads": 1}},
    "fading sinks and stride": {
        **ATTENTION,
        "memory": {"kind": "kv", "window": 2, "sinks": 4, "stride": 3},
        "retention": {"kind": "decay", "gate": "gdn"},
        "value": {"heads": 1},
    },
    "weighted error": {
        **LINEAR,
        "bias": {"kind": "weighted_l2", "weights": {"kind": "softplus", "per": "value"}},
        "update": {"kind": "gradient_descent", "step_size": 0.3},
    },
    "weighted error of a deep memory": {
        "memory": {"kind": "mlp", "expansion": 1},
        "bias": {"kind": "weighted_l2", "weights": {"kind": "sigmoid", "per": "value"}},
        "update": {"kind": "momentum", "momentum": 0.5, "step_size": 0.2, "anchor": 4},
    },
    "running average": {
        **ATTENTION,
        "memory": {"kind": "kv", "cache": "statistics", "scale": 3},
        "query": "learned",
        "qk": {"heads": 1},
        "value": {"heads": 1},
    },
    "learned query": {**ATTENTION, "query": "learned", "value": {"heads": 1}},
    "running softmax": {
        **LINEAR,
        "retention": {"kind": "decay", "gate": {"kind": "running_softmax", "per": "key", "conv": 3}},
        "update": {"kind": "gradient_descent", "step_size": "dt"},
    },
    "rising bound": {
        **LINEAR,
        "gates": {"forget": {"kind": "lower_bounded", "bound": {"kind": "rising", "per": "key"}}},
        "key": {"kind": "constant", "value": 0.5},
        "retention": {"kind": "decay", "gate": "forget"},
        "update": {"kind": "gradient_descent", "step_size": {"kind": "complement", "of": "forget"}},
    },
    "alibi over groups of heads": {**ATTENTION, "qk": {"position": "alibi", "heads": 1}, "value": {"heads": 1}},
    "alibi in a window": {**ATTENTION, "memory": {"kind": "kv", "window": 4}, "qk": {"position": "alibi"}, "prefix": 2},
    "alibi over what fades": {
        **ATTENTION,
        "memory": {"kind": "kv", "window": 2, "sinks": 2, "stride": 3},
        "qk": {"position": "alibi"},
        "retention": {"kind": "decay", "gate": "gdn"},
    },
    "the best of all tokens": {
        **ATTENTION,
        "memory": {"kind": "kv", "top_k": 3},
        "qk": {"heads": 1, "position": "rope"},
        "value": {"heads": 1},
    },
    "the best of a window, sinks and strides": {
        **ATTENTION,
        "memory": {"kind": "kv", "top_k": 2, "window": 3, "sinks": 1, "stride": 4},
        "qk": {"position": "alibi"},
        "prefix": 2,
    },
    "an affine fit": {**ATTENTION, "update": {"kind": "nonparametric", "fit": "affine"}},
    "an affine fit of the best": {
        **ATTENTION,
        "memory": {"kind": "kv", "top_k": 4, "window": 6},
        "retention": {"kind": "decay", "gate": "gdn"},
        "update": {"kind": "nonparametric", "fit": {"ridge": {"kind": "softplus", "per": "key"}}},
        "qk": {"heads": 1},
        "value": {"heads": 1},
    },
    "features of exponentials": {**LINEAR, "qk": {"norm": "l2", "feature": "exp"}},
    "a key that the decay leaves": {
        **LINEAR,
        "key": {"kind": "complement", "activation": "silu", "norm": "l2"},
        "bias": "l2",
        "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "key", "conv": 2}},
        "update": {"kind": "gradient_descent", "step_size": "sigmoid"},
    },
    "stored keys that the decay leaves": {
        **ATTENTION,
        "key": {"kind": "complement"},
        "retention": {"kind": "decay", "gate": "gdn"},
    },
    "output stages": {
        **LINEAR,
        "output": ["silu", {"kind": "linear", "offset": 0}, {"kind": "skip", "init": 0.5}, "gelu", "glu"],
        "prefix": 1,
    },
    "no map at the output": {
        **ATTENTION,
        "value_dim": 4,
        "output": ["skip", {"kind": "activation", "function": "tanh"}],
    },
    "a gain and a step of pairs": {
        **LINEAR,
        "retention": {
            "kind": "complex_decay",
            "gate": {"kind": "ssd", "per": "key"},
            "phase": {"kind": "product", "first": "dt", "second": {"kind": "learned", "per": "key"}},
            "discretization": "bilinear",
            "gain": {"kind": "learned", "per": "key", "start": "normalizing"},
        },
        "update": {"kind": "gradient_descent", "step_size": "dt"},
    },
    "a gain outside the scan": {
        **LINEAR,
        "bias": "l2",
        "retention": {
            "kind": "complex_decay",
            "pairs": "value",
            "gate": {"kind": "sigmoid", "per": "value"},
            "phase": {"kind": "linear", "per": "value"},
            "gain": {"kind": "sigmoid", "per": "value"},
        },
        "update": {"kind": "gradient_descent", "step_size": 0.3},
    },
    "a learned mean": {
        "memory": {"kind": "mlp", "expansion": 1, "offsets": True},
        "update": {
            "kind": "gradient_descent",
            "step_size": {"kind": "sigmoid", "scale": 0.2},
            "anchor": {"every": 4, "reduce": "learned"},
        },
    },
    "a learned mean of steps that write and erase by strengths of their own": {
        "memory": {"kind": "mlp", "expansion": 1},
        "update": {
            "kind": "gradient_descent",
            "step_size": 0.2,
            "write_size": "sigmoid",
            "anchor": {"every": 4, "reduce": "learned"},
        },
    },
    "a learned mean read before": {
        "memory": {"kind": "matrix", "initial": "learned"},
        "bias": "l1",
        "update": {"kind": "gradient_descent", "step_size": 0.2, "anchor": {"every": 5, "reduce": "learned"}},
        "readout": {"read": "before"},
        "prefix": 2,
    },
    "a vector": {
        **VECTOR,
        "value": {"conv": 3, "activation": "silu"},
        "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "value"}},
        "readout": {"gate": "silu", "norm": "rms"},
    },
    "a learned vector under l2": {
        **VECTOR,
        "memory": {"kind": "vector", "initial": "learned", "scale": 0.5},
        "bias": "l2",
        "update": {"kind": "gradient_descent", "step_size": {"kind": "sigmoid", "per": "value"}},
    },
    "a vector of momentum": {
        **VECTOR,
        "bias": "l2",
        "update": {"kind": "momentum", "momentum": "sigmoid", "step_size": {"kind": "sigmoid", "scale": 0.5}},
    },
    "a vector of pairs": {
        **VECTOR,
        "retention": {
            "kind": "complex_decay",
            "pairs": "value",
            "gate": {"kind": "sigmoid", "per": "value"},
            "phase": {"kind": "linear", "per": "value"},
        },
    },
    "learned key": {**LINEAR, "key": {"kind": "learned", "norm": "l2"}, "bias": "l2"},
    "a read-out of experts whose gate keeps a sum": {
        "kind": "routed",
        "experts": 2,
        "of": {"num_heads": 2, "key_dim": 4, "value_dim": 6, **LINEAR},
        "readout": {"gate": "running_softmax"},
        **dict.fromkeys(("num_heads", "key_dim", "value_dim")),
    },
    "an identity that skips": {**LINEAR, "output": {"kind": "skip", "init": "identity"}, "value_dim": 4},
}


def document(mixer: dict[str, Any], layers: int = 1) -> dict[str, Any]:
    mixer = {"num_heads": 2, "key_dim": 4, "value_dim": 6, **mixer}
    block = {"mixer": {name: choice for name, choice in mixer.items() if choice is not None}}
    return {"name": "small", "model_dim": 8, "blocks": {"main": block}, "layout": {"repeat": layers, "of": "main"}}


def perturbed(mixer: dict[str, Any], backend: str = "auto") -> SequenceModel:
    """Return a model of two layers in fp64, every parameter away from its start."""
    model = compile(load(document(mixer, 2)), vocab_size=VOCABULARY, dtype=torch.float64, backend=backend)
    return moved(model, 0.3)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    # fp64 over a dozen tokens: forms differ in the order of sums.
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_forms_split_and_steps_agree_and_sizes_are_as_predicted(name: str) -> None:
    fast, slow = perturbed(MIXERS[name]), perturbed(MIXERS[name], "reference")
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    whole, defined = fast(tokens), slow(tokens)
    close(whole.logits, defined.logits)
    for model, output in ((fast, whole), (slow, defined)):
        output.logits.sin().sum().backward()
        assert model.embedding.weight.grad is not None
    for (path, first), second in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert first.grad is not None, path
        assert second.grad is not None, path
        close(first.grad, second.grad)
    head = fast(tokens[:, :SPLIT])
    close(torch.cat([head.logits, fast(tokens[:, SPLIT:], head.state).logits], dim=1), whole.logits)
    state, steps = None, list[torch.Tensor]()
    for t in range(LENGTH):
        output = fast.step(tokens[:, t], state)
        state = output.state
        steps.append(output.logits)
    close(torch.stack(steps, dim=1), whole.logits)
    predicted = complexity.predict(fast.spec, VOCABULARY)
    assert predicted.parameters == num_parameters(fast)
    assert predicted.state_bytes(LENGTH, "float64") == sum(8 * x[0].numel() for x in whole.state.tensors.values())


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        (
            {**ATTENTION, "query": {"kind": "learned", "rank": 2, "conv": 4}},
            "a learned projection reads no token: remove conv, rank, or use kind 'linear'.",
        ),
        (
            {**LINEAR, "bias": {"kind": "weighted_l2", "weights": {"kind": "softplus", "per": "key"}}},
            "an error has one entry a value channel; found per key.",
        ),
        (
            {**LINEAR, "bias": {"kind": "weighted_l2", "weights": "tanh"}},
            "must not be negative, and tanh ranges over [-1, 1]; use softplus.",
        ),
        (
            {**ATTENTION, "memory": {"kind": "kv", "cache": "statistics"}},
            "statistics need one query for all tokens, and it reads the token; use 'tokens', or query 'learned'.",
        ),
        (
            {**ATTENTION, "memory": {"kind": "kv", "cache": "statistics", "window": 3}, "query": "learned"},
            "what leaves a window cannot be taken out of a sum; remove 'window', or use 'tokens'.",
        ),
        (
            {
                **ATTENTION,
                "memory": {"kind": "kv", "cache": "statistics"},
                "query": "learned",
                "retention": {"kind": "decay", "gate": 0.9},
            },
            "statistics do not fade; remove the decay, or use 'tokens'.",
        ),
        (
            {**ATTENTION, "memory": {"kind": "kv", "sinks": 2}},
            "without a window every token is seen: remove sinks, or add 'window' (1 is the token itself).",
        ),
        (
            {**LINEAR, "key": {"kind": "constant", "offset": 1}},
            "a constant projection reads no token: remove offset, or use kind 'linear'.",
        ),
        (
            {**LINEAR, "retention": {"kind": "decay", "gate": {"kind": "rising", "rank": 2}}},
            "a rising gate reads no token: remove rank, or use a gate such as 'sigmoid'.",
        ),
        (
            {
                **LINEAR,
                "gates": {"strength": "softplus"},
                "retention": {"kind": "decay", "gate": {"kind": "complement", "of": "strength"}},
            },
            "keeps a fraction in [0, 1], and complement ranges over [-inf, 1]; use sigmoid.",
        ),
        (
            {**LINEAR, "update": {"kind": "gradient_descent", "step_size": {"kind": "complement", "of": "nothing"}}},
            "unknown gate 'nothing'",
        ),
        (
            {**LINEAR, "retention": {"kind": "decay", "gate": {"kind": "lower_bounded", "bound": "softplus"}}},
            "keeps a fraction in [0, 1], and softplus ranges over [0, inf]; use sigmoid.",
        ),
        (
            {**ATTENTION, "query": {"position": "alibi"}},
            "query.position: alibi acts on scores, of queries and keys: write it under 'qk'.",
        ),
        (
            {**LINEAR, "qk": {"position": "alibi"}},
            "alibi acts on the scores of stored tokens, and memory matrix has none; "
            "write retention {kind: decay, gate: alibi}.",
        ),
        (
            {**ATTENTION, "qk": [{"dim": 2, "position": "alibi"}, {"dim": 2}]},
            "key.parts[0].position: alibi acts on scores, of whole queries and keys; write it beside 'parts'.",
        ),
        (
            {
                **ATTENTION,
                "memory": {"kind": "kv", "cache": "statistics"},
                "query": {"kind": "learned", "position": "alibi"},
                "key": {"position": "alibi"},
            },
            "statistics do not fade; remove the position, or use 'tokens'.",
        ),
        (
            {**ATTENTION, "memory": {"kind": "kv", "cache": "statistics", "top_k": 2}, "query": "learned"},
            "memory.top_k: statistics hold no token to weigh again for a query; remove it, or use cache 'tokens'.",
        ),
        (
            {**ATTENTION, "update": {"kind": "nonparametric", "fit": {"ridge": "tanh"}}},
            "update.fit.ridge: must be positive, and tanh ranges over [-1, 1]; use softplus.",
        ),
        (
            {**ATTENTION, "update": {"kind": "nonparametric", "fit": {"ridge": {"kind": "sigmoid", "per": "value"}}}},
            "a ridge is on key channels; found per value: use head or key.",
        ),
        (
            {**ATTENTION, "readout": {"read": "before"}},
            "readout.read: the first token would read a memory of no tokens; use 'after'.",
        ),
        (
            {**LINEAR, "key": "complement"},
            "key: complement is what the decay leaves for a key, and nothing decays here.",
        ),
        (
            {**LINEAR, "value": "complement", "retention": {"kind": "decay", "gate": "sigmoid"}},
            "value: complement is what the decay leaves for a key; write it under 'key'.",
        ),
        (
            {
                **LINEAR,
                "key": "complement",
                "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "value"}},
            },
            "a key has key channels, and the decay it is made of varies per value; use head or key.",
        ),
        (
            {**LINEAR, "key": "complement", "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "from": "key"}}},
            "the decay it is made of reads the key; let the decay read the input or a stream.",
        ),
        (
            {
                **LINEAR,
                "gates": {"other": {"kind": "sigmoid", "from": "query"}},
                "key": "complement",
                "retention": {"kind": "decay", "gate": {"kind": "product", "first": "other", "second": 0.9}},
            },
            "the decay it is made of reads the query; let the decay read the input or a stream.",
        ),
        (
            {
                **LINEAR,
                "key": {"kind": "complement", "feature": "polynomial"},
                "query": {"feature": "polynomial"},
                "retention": {"kind": "decay", "gate": "sigmoid"},
            },
            "a key made of the decay has its channels, in every head; remove 'heads' or the feature map.",
        ),
        (
            {**LINEAR, "key": [{"kind": "complement"}], "retention": {"kind": "decay", "gate": "sigmoid"}},
            "key.parts[0]: complement is of whole keys; write it as the key's kind.",
        ),
        (
            {**LINEAR, "key": {"kind": "complement", "conv": 3}, "retention": {"kind": "decay", "gate": "sigmoid"}},
            "a complement projection reads no token: remove conv, or use kind 'linear'.",
        ),
        (
            {**LINEAR, "output": ["skip", "linear"]},
            "output[0]: skip takes 8 channels, and 12 come in; put 'linear' first.",
        ),
        ({**LINEAR, "output": "gelu"}, "output: 12 channels come out and the model has 8; end with 'linear' or 'glu'."),
        ({**LINEAR, "output": "elu"}, "unknown output stage 'elu'; known: activation, glu, linear, skip."),
        (
            {**LINEAR, "readout": {"gate": {"kind": "learned", "start": "sigmoid"}}},
            "'start' takes the place of 'init', for activation none or exp, and reads no token",
        ),
        (
            {**LINEAR, "readout": {"correction": {"kind": "learned", "start": "query_key"}}},
            "'start' takes the place of 'init', for activation none or exp, and reads no token",
        ),
        (
            {
                **LINEAR,
                "readout": {"correction": {"kind": "query_key", "strength": {"kind": "sigmoid", "per": "state"}}},
            },
            "readout.correction.strength: it scales a key, which has key channels; found per state: use head or key.",
        ),
        (
            {**LINEAR, "readout": {"gate": {"kind": "learned", "init_of": "value"}}},
            "'init_of: value' is for activation exp and a law of numbers above zero.",
        ),
        (
            {
                **LINEAR,
                "bias": "l2",
                "retention": {"kind": "complex_decay", "gate": 0.9, "phase": 1, "gain": 0.5},
                "update": "implicit",
            },
            "retention.gain: the implicit step minimises its objective as it is; a factor on it would not.",
        ),
        (
            {
                "kind": "routed",
                "experts": 2,
                "of": {"memory": "matrix", "update": "gradient_descent", "output": "glu"},
                "key_dim": None,
                "value_dim": None,
                "num_heads": None,
            },
            "of.output: what the memories return is combined before one linear map; remove 'output'.",
        ),
        (
            {
                "kind": "routed",
                "experts": 2,
                "of": {"num_heads": 2, "key_dim": 4, "value_dim": 6, **LINEAR},
                "readout": {"gate": {"kind": "silu", "block_size": 4}},
                **dict.fromkeys(("num_heads", "key_dim", "value_dim")),
            },
            "readout.gate.block_size: blocks of 4 need equal widths that it divides; found 8 in and 12 out.",
        ),
        (
            {**VECTOR, "qk": {"norm": "l2"}, "key_dim": 4},
            "memory vector is written and read as a whole: remove 'qk', or use 'matrix'.",
        ),
        (
            {**VECTOR, "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "per": "key"}}},
            "per key has no axis on every weight of memory vector; legal: head, value.",
        ),
        (
            {**LINEAR, "readout": {"gate": "running_softmax"}},
            "running_softmax is a decay, by all tokens so far: write it as the retention's gate.",
        ),
    ],
)
def test_what_means_nothing_is_said(mixer: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(document(mixer))
    assert said in str(caught.value)


def test_xpos_scores_depend_on_the_distance_and_fade() -> None:
    xpos = Position.parse({"kind": "xpos", "scale_base": 16})
    q, k = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(t: int, j: int) -> float:
        at = [xpos.apply(x.expand(1, 1, 1, 6), torch.tensor([i]), is_query=x is q) for x, i in ((q, t), (k, j))]
        return float((at[0] * at[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    # Written out: the pair (i, i + 3) turns by (t - j) 10000^(-i/3) and fades by ((i/3 + 0.4) / 1.4)^((t - j) / 16).
    wanted = 0.0
    for i in range(3):
        turned = torch.complex(q[i], q[i + 3]) * torch.complex(k[i], -k[i + 3])
        angle = torch.tensor(5 * 10000.0 ** (-i / 3), dtype=torch.float64)
        wanted += float((turned * torch.polar(torch.ones_like(angle), angle)).real) * ((i / 3 + 0.4) / 1.4) ** (5 / 16)
    assert score(9, 4) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("alibi", [MIXERS["alibi"], {**ATTENTION, "qk": {"position": "alibi"}}])
def test_alibi_adds_a_slope_times_the_distance_to_the_scores(alibi: dict[str, Any]) -> None:
    model = perturbed(alibi)
    mixer: Any = model.layers[0].mixer  # type: ignore[union-attr]
    x = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (
        (x @ mixer.get_parameter(f"projections.{name}.source.weight")).reshape(7, 2, -1)
        for name in ("query", "key", "value")
    )
    distance = torch.arange(7)[:, None] - torch.arange(7)
    heads = []
    for h, slope in enumerate((2.0**-4, 2.0**-8)):
        scores = q[:, h] @ k[:, h].T / 2 - slope * distance
        heads.append(scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v[:, h])
    close(mixer(x, Carry(None, 0))[0], torch.cat(heads, dim=-1) @ mixer.output)


def test_sinks_and_strided_tokens_are_seen_beyond_the_window() -> None:
    mixer: Any = perturbed({**ATTENTION, "memory": {"kind": "kv", "window": 2, "sinks": 1, "stride": 4}})
    mixer = mixer.layers[0].mixer
    x = torch.randn(1, 300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (
        (x @ mixer.get_parameter(f"projections.{name}.source.weight")).reshape(300, 2, -1)
        for name in ("query", "key", "value")
    )
    wanted = []
    for t in range(300):
        seen = [j for j in range(t + 1) if t - j < 2 or j < 1 or j % 4 == 3]
        weights = (torch.einsum("hk,jhk->jh", q[t], k[seen]) / 2).softmax(0)
        wanted.append(torch.einsum("jh,jhv->hv", weights, v[seen]).flatten())
    carry = Carry(None, 0)
    close(mixer(x, carry)[0], torch.stack(wanted) @ mixer.output)
    kept = [j for j in range(300) if j == 299 or j < 1 or j % 4 == 3]
    close(carry.outgoing[f"{mixer.path}.keys"][0], k[kept])


def test_weights_of_one_are_plain_regression_and_others_scale_the_channels() -> None:
    def written(weights: object) -> str:
        return architecture_hash(load(document({**LINEAR, "bias": {"kind": "weighted_l2", "weights": weights}})))

    assert written(1) == architecture_hash(load(document({**LINEAR, "bias": "l2"})))
    assert written(0.5) != written(1)
    bias = Bias.parse({"kind": "weighted_l2", "weights": 1})
    generator = torch.Generator().manual_seed(0)
    prediction, value, weights = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64)
    prediction.requires_grad_()
    loss = bias.loss(prediction, value, {"weights": weights})
    (slope,) = torch.autograd.grad(loss.sum(), prediction)
    close(bias.gradient(prediction, value, {"weights": weights}), slope)


def test_statistics_return_what_the_stored_tokens_do() -> None:
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    small = perturbed({**ATTENTION, "memory": {"kind": "kv", "cache": "statistics"}, "query": "learned"})
    stored = perturbed({**ATTENTION, "query": "learned"})
    close(small(tokens).logits, stored(tokens).logits)
    mixers = [model.layers[0].mixer for model in (small, stored)]
    pairs = [torch.randn(2, 5, 2, size, dtype=torch.float64) for size in (4, 6)]
    # Pairs are written with themselves as queries: a lone pair is returned whatever the query.
    one = [pair[:, :1] for pair in pairs]
    found = [mixer.associate(*one, pairs[0]) for mixer in mixers]  # type: ignore[union-attr, operator]
    close(found[0], found[1])


def _projected(mixer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Return queries, keys and values [T, H, d] of a mixer without anything between the maps and the memory."""
    names = ("query", "key", "value")
    return [(x[0] @ mixer.get_parameter(f"projections.{n}.source.weight")).reshape(x.shape[1], 2, -1) for n in names]


def test_the_best_tokens_alone_are_read() -> None:
    mixer: Any = perturbed({**ATTENTION, "memory": {"kind": "kv", "top_k": 3}}).layers[0].mixer  # type: ignore[union-attr]
    x = torch.randn(1, 300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = _projected(mixer, x)
    wanted = torch.zeros(300, 2, 6, dtype=torch.float64)
    for t in range(300):
        for h in range(2):
            scores = k[: t + 1, h] @ q[t, h] / 2
            best = scores.argsort(descending=True)[:3]
            wanted[t, h] = scores[best].softmax(0) @ v[best, h]
    close(mixer(x, Carry(None, 0))[0], wanted.flatten(1) @ mixer.output)


def test_tied_tokens_are_all_read() -> None:
    mixer: Any = perturbed({**ATTENTION, "memory": {"kind": "kv", "top_k": 1}}).layers[0].mixer  # type: ignore[union-attr]
    key = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.randn(1, 5, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(mixer.associate(key.expand(1, 5, 2, 4), value, key), value.mean(1, keepdim=True))


def test_an_affine_fit_is_that_of_local_linear_attention() -> None:
    """Equations of arXiv:2510.01450, with weights that sum to 1, against the regression that they solve."""
    fit = {"kind": "nonparametric", "fit": {"ridge": 0.3}}
    mixer: Any = perturbed({**ATTENTION, "update": fit}).layers[0].mixer  # type: ignore[union-attr]
    x = torch.randn(1, 300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = _projected(mixer, x)
    wanted = torch.zeros(300, 2, 6, dtype=torch.float64)
    for t in range(300):
        for h in range(2):
            weights = (k[: t + 1, h] @ q[t, h] / 2).softmax(0)
            design = torch.cat([torch.ones(t + 1, 1, dtype=torch.float64), k[: t + 1, h] - q[t, h]], dim=1)
            penalty = torch.diag(torch.tensor([0.0, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64))
            normal = design.T @ (weights[:, None] * design) + penalty
            wanted[t, h] = torch.linalg.solve(normal, design.T @ (weights[:, None] * v[: t + 1, h]))[0]
    close(mixer(x, Carry(None, 0))[0], wanted.flatten(1) @ mixer.output)


def test_a_plane_is_fitted_exactly_and_a_large_ridge_is_a_constant_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 30, 2, 4, generator=generator, dtype=torch.float64)
    plane = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = {}
    for ridge in (1e-9, 1e9):
        fit = {"kind": "nonparametric", "fit": {"ridge": ridge}}
        mixer: Any = perturbed({**ATTENTION, "update": fit}).layers[0].mixer  # type: ignore[union-attr]
        found[ridge] = mixer.associate(keys, keys @ plane + 1, keys)
    torch.testing.assert_close(found[1e-9], keys @ plane + 1, rtol=1e-6, atol=1e-6)
    constant: Any = perturbed(ATTENTION).layers[0].mixer  # type: ignore[union-attr]
    torch.testing.assert_close(found[1e9], constant.associate(keys, keys @ plane + 1, keys), rtol=1e-6, atol=1e-6)


def test_a_solved_regression_recalls_what_it_was_given() -> None:
    """With four orthogonal keys and a small ridge every value comes back; the sum of k v^T alone would not scale."""
    update = {"kind": "conjugate_gradient", "iterations": 8, "ridge": 1e-6, "step_size": 0.3}
    solving = {"memory": {"kind": "matrix", "scale": 1}, "update": update}
    mixer: Any = perturbed(solving).layers[0].mixer  # type: ignore[union-attr]
    keys = torch.eye(4, dtype=torch.float64)[None, :, None].expand(1, 4, 2, 4)
    values = torch.randn(1, 4, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(mixer.associate(keys, values, keys), values, rtol=1e-4, atol=1e-4)


def test_a_gate_that_starts_as_another_takes_its_value_and_then_learns_by_itself() -> None:
    gain = {"kind": "learned", "per": "value", "activation": "exp", "start": "normalizing"}
    decay = {"kind": "ssd", "step": 1, "rate": {"per": "value", "init": {"uniform": [0.1, 1]}}}
    retention = {"kind": "complex_decay", "pairs": "value", "gate": decay, "phase": 1, "gain": gain}
    mixer: Any = compile(load(document({**VECTOR, "retention": retention}))).layers[0].mixer  # type: ignore[union-attr]
    rate, raw = (mixer.get_parameter(f"gates.retention/{name}") for name in ("gate.log_rate", "gain.raw"))
    assert raw.shape == rate.shape == (2, 1, 3)
    torch.testing.assert_close(raw.exp(), (1 - (-2 * rate.exp()).exp()).sqrt())
    before = raw.detach().clone()
    with torch.no_grad():
        rate.add_(1)
    mixer(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)), Carry(None, 0)).sum().backward()
    assert raw.grad.norm() > 0
    assert torch.equal(raw, before)
