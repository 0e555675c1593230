"""What must hold of every composed mixer, whatever it is made of: state passing, causality, gradients, predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import archspec
from archspec.blocks.model import SequenceModel, num_parameters
from tests.forms import moved

# fp64 carries 1.1e-16; a few dozen tokens through two layers of chunked and token-wise forms lose three to four
# digits of it (1e-13 is what is seen).
TOLERANCE = 1e-10
VOCAB = 11

MATRIX: dict[str, Any] = {
    "num_heads": 2,
    "qkv": {"conv": 3, "activation": "silu"},
    "qk": {"norm": "l2"},
    "memory": "matrix",
    "bias": "l2",
    "retention": {"kind": "decay", "gate": "gdn"},
    "update": {"kind": "gradient_descent", "step_size": "sigmoid"},
}
ATTENTION: dict[str, Any] = {
    "num_heads": 2,
    "qk": {"position": "rope"},
    "memory": "kv",
    "update": "nonparametric",
}
ONLINE: dict[str, Any] = {
    "num_heads": 2,
    "qkv": {"conv": 2},
    "qk": {"norm": "l2"},
    "memory": {"kind": "mlp", "depth": 2, "expansion": 2},
    "bias": "l2",
    "retention": {"kind": "decay", "gate": {"kind": "sigmoid", "offset": 3}, "order": "together"},
    "update": {"kind": "momentum", "momentum": "sigmoid", "step_size": "sigmoid", "anchor": 4},
    "readout": {"norm": "rms", "gate": "silu"},
}


def document(mixer: dict[str, Any], layers: int = 2) -> dict[str, Any]:
    """Return a small spec around a mixer."""
    block = {"mixer": mixer, "feed_forward": {"kind": "swiglu", "expansion": 1}}
    return {"name": "composed", "model_dim": 16, "blocks": {"main": block}, "layout": {"repeat": layers, "of": "main"}}


def compiled(spec: dict[str, Any], backend: str) -> SequenceModel:
    """Return the module in fp64, with every parameter moved away from its start."""
    model = archspec.compile(spec, vocab_size=VOCAB, dtype=torch.float64, backend=backend)
    return moved(model, 0.1, seed=3)


def first_mixer(spec: dict[str, Any]) -> Any:
    """Return the module of the first layer's mixer, in fp64."""
    layers: Any = compiled(spec, "auto").layers
    return layers[0].mixer


def hold(spec: dict[str, Any], length: int = 23, cuts: tuple[int, ...] = (1, 9)) -> None:
    """Check a spec on every backend, at every kind of cut, and against what is predicted of it."""
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(4))
    models = {backend: compiled(spec, backend) for backend in ("auto", "reference")}
    logits = {backend: model(tokens).logits for backend, model in models.items()}
    assert close(logits["auto"], logits["reference"])
    for model in models.values():
        for cut in cuts:
            _passes_state(model, tokens, cut)
    _steps(models["auto"], tokens)
    _is_causal(models["auto"], tokens)
    _learns_everything(models["auto"], tokens)
    _is_predicted(spec, tokens)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Say whether two tensors agree to what fp64 allows."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE * (1 + wanted.abs().max()))


def _passes_state(model: SequenceModel, tokens: Tensor, cut: int) -> None:
    whole, first = model(tokens), model(tokens[:, :cut])
    second = model(tokens[:, cut:], first.state)
    assert close(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    assert set(second.state.tensors) == set(whole.state.tensors)
    for path, tensor in whole.state.tensors.items():
        assert tensor.numel() == 0 or close(second.state.tensors[path], tensor), path


def _steps(model: SequenceModel, tokens: Tensor) -> None:
    state, found = None, []
    for token in tokens.unbind(1):
        output = model.step(token, state)
        state = output.state
        found.append(output.logits)
    assert close(torch.stack(found, dim=1), model(tokens).logits)


def _is_causal(model: SequenceModel, tokens: Tensor) -> None:
    """Changing one token changes nothing before it, and something from it on."""
    place = tokens.shape[1] // 2
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % VOCAB
    before, after = model(tokens).logits, model(other).logits
    assert close(before[:, :place], after[:, :place])
    assert (before[:, place:] - after[:, place:]).abs().amax() > 1e-6


def _learns_everything(model: SequenceModel, tokens: Tensor) -> None:
    output = model(tokens)
    loss = output.logits.square().sum()
    if output.auxiliary_loss is not None:
        loss = loss + output.auxiliary_loss
    loss.backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.norm() > 0, path


def _is_predicted(spec: dict[str, Any], tokens: Tensor) -> None:
    """Parameters and state bytes are predicted without torch."""
    model, length = archspec.compile(spec, vocab_size=VOCAB), tokens.shape[1]
    found = archspec.predict(archspec.load(spec), vocab_size=VOCAB, context=length)
    assert found.parameters == num_parameters(model)
    for count in (1, length // 2, length):
        state = model(tokens[:, :count]).state
        held = sum(tensor[0].numel() * tensor.element_size() for tensor in state.tensors.values())
        assert held == found.state_bytes(count), count
