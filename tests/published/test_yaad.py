"""Yaad (Behrouz et al. 2025), equations 13 to 16 and section 5, gradients at the start of chunks of 16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, unit

CHUNK = 16


def gelu(x: Tensor) -> Tensor:
    """Return the tanh form of x Phi(x)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * (x - mean) / sqrt(variance + 1e-6) + shift."""
    centred = x - x.mean(-1, keepdim=True)
    return scale * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6) + shift


def memory(w: dict[str, Tensor], x: Tensor, p: Parameters) -> Tensor:
    """Return M(x) = x + LN(W_1 gelu(W_2 x)) for x [B, H, d]; the paper's W_2 is the first layer, ``w1`` here."""
    hidden = gelu(torch.einsum("bhij,bhi->bhj", w["w1"], x))
    inner = torch.einsum("bhji,bhj->bhi", w["w2"], hidden)
    return x + layer_norm(inner, p["memory.norm_scale"][:, 0], p["memory.norm_shift"][:, 0])


def yaad(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """W_t = a_t W_{t-1} - eta_t grad 1/2 ||r||^2 where ||r|| <= d_t, else - eta_t d_t grad ||r||_1."""
    state, projected = {}, {}
    for name in ("query", "key", "value"):
        mapped = x @ p[f"projections.{name}.source.weight"]
        convolved, state[f"{name}.conv"] = short_convolution(mapped, p[f"projections.{name}.source.conv"])
        projected[name] = heads(silu(convolved), 4)
    q, k, v = unit(projected["query"]), unit(projected["key"]), projected["value"]

    def low_rank(name: str) -> Tensor:
        z = x @ p[f"gates.{name}.source.down"] @ p[f"gates.{name}.source.up"]
        return heads(z + p.get(f"gates.{name}.source.offset", torch.zeros(())), 4)

    a = 1 / (1 + torch.exp(-low_rank("retention/gate")))  # [B, T, H, d]: channels of the model-sized axis
    eta = torch.log(1 + torch.exp(low_rank("update/step_size")))
    threshold = torch.log(1 + torch.exp(low_rank("bias/threshold")))  # [B, T, H, 1]
    w = {name: p[f"memory.{name}"].expand(x.shape[0], -1, -1, -1) for name in ("w1", "w2")}
    anchor, outputs, inside = w, [], []
    for t in range(x.shape[1]):
        if t % CHUNK == 0:
            anchor = dict(w)
        r = memory(anchor, k[:, t], p) - v[:, t]
        size = torch.sqrt((r * r).sum(-1, keepdim=True))
        inside.append((size <= threshold[:, t]).double().mean().item())
        # Both losses' gradients with respect to the weights at the anchor; each head takes the one its error asks for.
        squared = torch.autograd.grad((0.5 * r * r).sum(), [anchor["w1"], anchor["w2"]], create_graph=True)
        absolute = torch.autograd.grad(
            (threshold[:, t] * r.abs()).sum(), [anchor["w1"], anchor["w2"]], create_graph=True
        )
        small = (size <= threshold[:, t])[..., None]
        slopes = [torch.where(small, two, one) for two, one in zip(squared, absolute, strict=True)]
        a_t, eta_t = a[:, t, :, None, :], eta[:, t, :, None, :]  # [B, H, 1, d]: the output axis of the last layer ...
        w = {  # ... and the input axis of the first.
            "w1": a_t.mT * w["w1"] - eta_t.mT * slopes[0],
            "w2": a_t * w["w2"] - eta_t * slopes[1],
        }
        outputs.append(memory(w, q[:, t], p))
    assert 0.1 < sum(inside) / len(inside) < 0.9, "both branches of the rule must be taken"
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    for kind, pair in {"dual": w, "anchor": anchor}.items():
        state.update({f"{kind}.{name}": tensor for name, tensor in pair.items()})
    return ((x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_yaad(backend: str) -> None:
    # A LayerNorm makes errors of about sqrt(16) long: thresholds of that size lie on both sides of them.
    hold("yaad", yaad, backend, enlarged={"threshold.source.up": 5.0})
