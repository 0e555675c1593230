"""Models whose pieces are fused against the same models in plain torch; the rule that says which; decoding in place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import archspec
from archspec import pieces
from archspec.blocks.carry import State
from archspec.blocks.declared import Declared
from archspec.blocks.model import SequenceModel
from archspec.decoding import GraphDecoder, position_dependence
from archspec.errors import UnsupportedError
from archspec.forms import FusedPieces
from archspec.kernels import pointwise

BLOCK = """
name: small
model_dim: 24
norm: rms
blocks:
  main:
    mixer: {%s}
    feed_forward: {kind: swiglu, expansion: 1}
layout: {repeat: 2, of: main}
"""
DELTA = "num_heads: 2, key_dim: 16, qkv: {conv: 4, activation: silu}, qk: {norm: l2}, memory: matrix, bias: l2, "
MIXERS = {
    "key decay": DELTA + "retention: {kind: decay, gate: kda}, update: {kind: gradient_descent, step_size: sigmoid}, "
    "readout: {norm: rms, gate: {kind: sigmoid, rank: 8, offset: 0}}",
    "token decay": DELTA + "retention: {kind: decay, gate: gdn}, update: {kind: gradient_descent, step_size: sigmoid}, "
    "readout: {norm: {kind: rms, per_head: true}, gate: silu}",
    "several steps": DELTA + "update: {kind: multi_step, steps: 2, step_size: sigmoid}, readout: {norm: rms}",
    "gate before norm": "num_heads: 2, qkv: {conv: 3, conv_offset: {uniform: [-0.5, 0.5]}, activation: silu}, "
    "memory: {kind: matrix, scale: 1}, bias: dot, retention: {kind: decay, gate: ssd}, update: gradient_descent, "
    "readout: {norm: {kind: rms, over: model}, gate: silu, order: [skip, gate, norm]}",
    "norm over the model": "num_heads: 2, streams: {inner: {dim: 30, conv: 4, activation: silu, norm: rms}}, "
    "key: {from: inner, activation: gelu, conv: 4}, memory: matrix, bias: dot, update: gradient_descent, "
    "readout: {norm: {kind: rms, over: model}, gate: silu}",
    "layer norm": "num_heads: 2, qk: {activation: softmax, conv: 2}, memory: {kind: matrix, normalizer: {kind: sum}}, "
    "bias: dot, update: gradient_descent, readout: {norm: layer, gate: silu}",
}
# Two fp32 computations of the same sums in other orders, through two layers.
TOLERANCE = 2e-4


def build(name: str, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> SequenceModel:
    return archspec.compile(
        archspec.loads(BLOCK % MIXERS[name]), vocab_size=11, backend=backend, device=device, dtype=dtype
    )


def results(model: SequenceModel, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of a whole sequence and its gradients; logits of the same in two stretches and a token."""
    logits = model(tokens).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
    first = model(tokens[:, :2])
    second = model(tokens[:, 2:-1], first.state)
    with torch.no_grad():
        last = model.step(tokens[:, -1], second.state)
    parts = torch.cat([first.logits, second.logits, last.logits[:, None]], dim=1)
    return {"logits": logits, "parts": parts, **dict(zip(names, gradients, strict=True))}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, exact in wanted.items():
        error = float((found[name] - exact).detach().norm() / exact.detach().norm().clamp(min=1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MIXERS)
def test_interpreted_models_compute_what_plain_torch_does(name: str) -> None:
    tokens = torch.randint(11, (1, 7), generator=torch.Generator().manual_seed(0))
    compare(results(build(name, "auto"), tokens), results(build(name, "chunked"), tokens), TOLERANCE)


class TorchPieces(FusedPieces):
    """The fused pieces' torch forms, which serve fp64 too; ``counts`` says how many maps of a tensor were asked for."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def serves(self, x: Tensor) -> bool:
        return True

    def convolution(
        self, x: Tensor, weight: Tensor, offset: Tensor | None, activation: str, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last = pointwise.short_convolution(x, weight, offset, activation, state, True, backend="reference")
        assert last is not None
        return y, last

    def norm(
        self, x: Tensor, kind: str, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
    ) -> Tensor:
        if kind == "l2":
            return pointwise.l2_norm(x, eps, "reference")
        return pointwise.gated_rms_norm(x, gate, weight, activation, eps, "reference")

    def maps(self, x: Tensor, factors: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
        self.counts.append(len(factors))
        return super().maps(x, factors)

    def gated_map(self, gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
        return pointwise.gated_map(gate, up, weight, activation, "reference")

    def log_decay(self, z: Tensor, log_rate: Tensor) -> Tensor:
        return pointwise.log_decay(z, log_rate, backend="reference")


# Of a mixer's input: query, key and value, the step size, the decay and the read-out's gate; of a feed-forward's, two.
MAPS = {
    "key decay": [6, 2],
    "token decay": [6, 2],
    "several steps": [4, 2],
    "norm over the model": [4, 2],
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_one_stream_are_made_together(name: str) -> None:
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    model, used = build(name, "auto", dtype=torch.float64), TorchPieces()
    for module in model.modules():
        if isinstance(module, Declared):
            module.pieces = used
    compare(results(model, tokens), results(build(name, "chunked", dtype=torch.float64), tokens), 1e-10)
    assert used.counts[:4] == 2 * MAPS[name]
    asked = len(used.counts)
    with torch.no_grad():
        model(tokens)
    assert used.counts[asked:] == 2 * MAPS[name][1:]  # nothing is added up: each source runs its own


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_models_on_the_card(name: str) -> None:
    """In bf16 on the card, against fp64: fused pieces are no less exact than the chain of torch operations."""
    tokens = torch.randint(11, (2, 100), generator=torch.Generator().manual_seed(0))
    exact = results(build(name, "chunked", dtype=torch.float64), tokens)["logits"].detach()
    errors = []
    for backend in ("auto", "chunked"):
        with torch.no_grad():
            logits = build(name, backend, "cuda", torch.bfloat16)(tokens.cuda()).logits.cpu().double()
        errors.append(float((logits - exact).norm() / exact.norm()))
    assert errors[0] < 1.2 * errors[1] + 1e-3, errors


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_the_cpu_nothing_changes(name: str, dtype: torch.dtype) -> None:
    tokens = torch.randint(11, (1, 7), generator=torch.Generator().manual_seed(0))
    fused, plain = (results(build(name, backend, dtype=dtype), tokens) for backend in ("auto", "chunked"))
    for key, wanted in plain.items():
        assert torch.equal(fused[key], wanted), key


def test_the_limits_are_those_of_the_kernels() -> None:
    assert (pieces.MAX_CONV_WIDTH, pieces.MAX_NORM_DIM) == (pointwise.MAX_CONV_WIDTH, pointwise.MAX_NORM_DIM)
    assert set(pieces.CONV_ACTIVATIONS.values()) == set(pointwise.CONV_ACTIVATIONS)


FUSED = {
    "key decay": [
        "short convolution + silu (query, key, value)",
        "l2 norm (query, key)",
        "rms norm x sigmoid gate (read-out)",
        "log decay (retention.gate)",
    ],
    "gate before norm": [
        "short convolution + silu (query, key, value)",
        "rms norm (read-out)",
        "log decay (retention.gate)",
    ],
    "norm over the model": [
        "short convolution + silu (inner)",
        "rms norm (inner)",
        "short convolution (key)",
        "rms norm x silu gate (read-out)",
    ],
    "layer norm": ["short convolution (query, key)"],
}


@pytest.mark.parametrize("name", FUSED)
def test_explain_says_what_is_fused(name: str) -> None:
    spec = archspec.loads(BLOCK % MIXERS[name])
    on_card = archspec.explain(spec, device="cuda")
    assert on_card.data()["mixers"]["blocks.main.mixer"]["fused"] == FUSED[name]
    assert f"\n  fused: {FUSED[name][0]}\n" in str(on_card)
    assert "fused" not in str(archspec.explain(spec, device="cpu"))


@pytest.mark.parametrize("name", ["key decay", "norm over the model"])
def test_a_step_may_write_the_state_in_place(name: str) -> None:
    model, tokens = build(name, "auto"), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        state = model(tokens).state
        wanted = model.step(tokens[:, 0], state)
        before = {key: tensor.clone() for key, tensor in state.tensors.items()}
        assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors.items())
        found = model.step(tokens[:, 0], state, inplace=True)
    assert torch.equal(found.logits, wanted.logits)
    memories = [key for key in before if ".dual." in key]
    assert len(memories) == 2
    for key in memories:
        assert found.state.tensors[key] is state.tensors[key]
        assert torch.equal(found.state.tensors[key], wanted.state.tensors[key])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_on_the_card_a_graph_decodes_what_steps_do(name: str) -> None:
    model = build(name, "auto", "cuda", torch.bfloat16).requires_grad_(False)
    tokens = torch.randint(11, (3, 20), generator=torch.Generator().manual_seed(0)).cuda()
    state = model(tokens[:, :10]).state
    decoder = GraphDecoder(model, state)
    for t in range(10, 20):
        output = model.step(tokens[:, t], state)
        state = output.state
        assert torch.equal(decoder.step(tokens[:, t]), output.logits), t
    assert decoder.state.position == state.position


def test_a_model_off_the_card_is_refused_a_graph() -> None:
    with pytest.raises(UnsupportedError) as raised:
        GraphDecoder(build("key decay", "auto"), State())
    assert str(raised.value) == (
        "GraphDecoder: a CUDA graph needs the model on CUDA, found cpu; decode with model.step(token, state)."
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("key decay", None),
        ("retnet", "layers.0.mixer.query has "),
        ("kimi_linear", "the memory of layers.3.mixer grows with every token"),
        ("ttt_linear", "takes gradients at an anchor that moves every 16 tokens"),
        ("titans_mac", "starts a segment every"),
    ],
)
def test_steps_that_depend_on_the_position_are_refused_a_graph(model: str, reason: str | None) -> None:
    compiled = build(model, "auto") if model in MIXERS else archspec.compile(model, vocab_size=11)
    found = position_dependence(compiled)
    assert found is None if reason is None else reason in str(found), found
