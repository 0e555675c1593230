"""What the files of this folder share: a compiled mixer at no special point, and the few formulas all papers share.

Nothing here is taken from archspec's components: only the compiled module's raw parameters, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import archspec
from archspec.blocks.carry import Carry
from archspec.blocks.model import SequenceModel

Parameters = Mapping[str, Tensor]
Published = Callable[[Tensor, Parameters], tuple[Tensor, dict[str, Tensor]]]

# fp64 carries 1.1e-16. Forty to some hundred steps, a triangular solve and the backward pass through all of it lose
# three to four digits (1e-13 to 1e-12 is what is seen), and no gradient is near cancellation.
TOLERANCE = 1e-9

# Heads whose sizes are written in numbers do not follow the model's width; a window ends within forty tokens.
SMALL_HEADS = "blocks: {main: {mixer: {key_dim: 16, value_dim: 24}}}"
NARROW = {
    "sliding_window": "blocks: {main: {mixer: {memory: {window: 24}}}}",
    "gated_deltanet": SMALL_HEADS,
    "hybrid_3_1": SMALL_HEADS,
    "mom": "blocks: {main: {mixer: {of: {key_dim: 16, value_dim: 24}}}}",
    "sse": "blocks: {main: {mixer: {adapt: {query: {rank: 8}}}}}",
}


def perturbed(
    name: str, backend: str, enlarged: Mapping[str, float] | None = None, narrow: str | None = None
) -> SequenceModel:
    """Return a shipped model in fp64, 64 wide, every parameter (gates, norms, starts) moved away from its start.

    ``enlarged`` multiplies parameters whose names end so, to reach every branch of a rule; ``narrow`` is an overlay
    for sizes that do not follow the model's width.
    """
    overlay = NARROW.get(name, "") if narrow is None else narrow
    spec = archspec.loads(f"extends: {name}\nname: narrow\nmodel_dim: 64\n{overlay}")
    model = archspec.compile(spec, vocab_size=32, backend=backend, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.add_(0.5 * max(spread, 0.2 if parameter.ndim == 1 else 0.02) * noise)
            for ending, factor in (enlarged or {}).items():
                parameter.mul_(factor if path.endswith(ending) else 1.0)
    return model


def hold(
    name: str,
    published: Published,
    backend: str,
    *,
    length: int = 40,
    layer: int = 0,
    enlarged: Mapping[str, float] | None = None,
    narrow: str | None = None,
    shared: Mapping[str, int] | None = None,
) -> None:
    """Check a layer's mixer against published equations: outputs, final state and the gradient of everything.

    ``shared`` names what the layer reads from an earlier one, with its width: random here, [B, T, H, width], and handed
    to the equations among the parameters.
    """
    model = perturbed(name, backend, enlarged, narrow)
    layers: Any = model.layers
    mixer = layers[layer].mixer
    generator = torch.Generator().manual_seed(2)
    length = min(length, 40) if backend == "reference" else length  # the recurrence has no chunks to cross
    x = torch.randn(2, length, model.spec.model_dim, generator=generator, dtype=torch.float64).requires_grad_()
    lent = {
        key: torch.randn(*x.shape[:2], mixer.dims.num_heads, width, generator=generator, dtype=torch.float64)
        for key, width in (shared or {}).items()
    }
    lent = {key: tensor.requires_grad_() for key, tensor in lent.items()}
    carry = Carry(None, 0, shared=dict(lent))
    output = mixer(x, carry)
    prefix = f"layers.{layer}.mixer."
    found = {"output": output, **{path.removeprefix(prefix): kept for path, kept in carry.outgoing.items()}}
    parameters = dict(mixer.named_parameters())
    published_output, published_state = published(x, {**parameters, **lent})
    wanted = {"output": published_output, **published_state}
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape, key
        assert error(found[key], tensor) < TOLERANCE, key
    leaves = {"x": x, **parameters, **lent}
    weights = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for key, tensor in wanted.items()
    }
    gradients = [
        torch.autograd.grad(sum((run[key] * weights[key]).sum() for key in wanted), list(leaves.values()))  # type: ignore[arg-type]
        for run in (found, wanted)
    ]
    for key, ours, theirs in zip(leaves, *gradients, strict=True):
        assert theirs.norm() > 0, f"nothing depends on {key}"
        assert error(ours, theirs) < TOLERANCE, f"gradient of {key}"


def error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| in the Frobenius norm."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def heads(x: Tensor, count: int) -> Tensor:
    """Return x [B, T, H d] as [B, T, H, d]."""
    return x.reshape(*x.shape[:2], count, -1)


def short_convolution(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return y_t = sum_i taps[:, i] x_{t - W + 1 + i} with zeros before the sequence, and the last W - 1 inputs."""
    width = taps.shape[1]
    padded = torch.cat([torch.zeros_like(x[:, : width - 1]), x], dim=1)
    y = torch.stack(
        [sum(taps[:, i] * padded[:, t + i] for i in range(width)) for t in range(x.shape[1])],  # type: ignore[misc]
        dim=1,
    )
    return y, padded[:, x.shape[1] :]


def convolved(x: Tensor, p: Parameters, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return silu(conv(x W)) of a projection as [B, T, H, d], and what its convolution keeps."""
    mapped, kept = short_convolution(x @ p[f"projections.{name}.source.weight"], p[f"projections.{name}.source.conv"])
    return heads(silu(mapped), count), kept


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x))."""
    return torch.log(1 + torch.exp(x))


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    """Return x / sqrt(||x||^2 + 1e-6)."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + 1e-6)."""
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Return RoPE of x [B, T, H, K]: (x_i, x_{i + K/2}) as a complex number, times exp(i t theta^(-2i/K))."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=-1)
