"""What Moneta, Yaad, Memora, Atlas and their relatives share: the two-layer memory and the projections around it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plain import Parameters, convolved, heads, rms, unit

Weights = dict[str, Tensor]
LAYERS = ("w1", "w2")


def gelu(x: Tensor) -> Tensor:
    """Return the tanh form of x Phi(x)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * (x - mean) / sqrt(variance + 1e-6) + shift."""
    centred = x - x.mean(-1, keepdim=True)
    return scale * centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6) + shift


def monomials(x: Tensor, p: Parameters) -> Tensor:
    """Return [sqrt(a_0), sqrt(a_1) x_i, sqrt(a_2) x_i x_j] for x [B, H, d], a_n = exp of what is learned."""
    a = [torch.exp(p[f"memory.feature_a{n}"]) for n in range(3)]  # [H, 1]
    one = torch.ones_like(x[..., :1])
    return torch.cat(
        [a[0] ** 0.5 * one, a[1] ** 0.5 * x, a[2] ** 0.5 * torch.einsum("bhi,bhj->bhij", x, x).flatten(-2)], -1
    )


def exponential(x: Tensor) -> Tensor:
    """Return x^m / sqrt(m!) for every exponent m of total at most three, x [B, H, d]: the first terms of exp(q . k)."""
    channels = range(x.shape[-1])
    found = [torch.ones_like(x[..., 0])]
    found += [x[..., i] for i in channels]
    found += [x[..., i] * x[..., j] / math.sqrt(2 if i == j else 1) for i in channels for j in channels if i <= j]
    for i in channels:
        for j in channels[i:]:
            for k in channels[j:]:
                factorial = 6 if i == k else 2 if j in (i, k) else 1
                found.append(x[..., i] * x[..., j] * x[..., k] / math.sqrt(factorial))
    return torch.stack(found, dim=-1)


def memory(w: Weights, x: Tensor, p: Parameters) -> Tensor:
    """Return M(x) = x + LN(W_1 gelu(W_2 phi(x))) for x [B, H, d]; W_2, the first layer, is ``w1`` here.

    Without LN, and with phi(x) = x, where nothing is learned of them; the exponential's features learn nothing, and
    are there when the first layer has more inputs than x has channels.
    """
    seen = monomials(x, p) if "memory.feature_a0" in p else x
    if seen.shape[-1] < w["w1"].shape[-2]:
        seen = exponential(x)
    inner = torch.einsum("bhji,bhj->bhi", w["w2"], gelu(torch.einsum("bhij,bhi->bhj", w["w1"], seen)))
    if "memory.norm_scale" in p:
        inner = layer_norm(inner, p["memory.norm_scale"][:, 0], p["memory.norm_shift"][:, 0])
    return x + inner


def slopes(w: Weights, k: Tensor, delta: Tensor, p: Parameters) -> Weights:
    """Return J^T delta, J the Jacobian of M(W, k) in the weights: the loss's gradient, delta being that in M."""
    found = torch.autograd.grad(memory(w, k, p), [w[name] for name in LAYERS], delta, create_graph=True)
    return dict(zip(LAYERS, found, strict=True))


def started(p: Parameters, batch: int) -> Weights:
    """Return the learned start weights for a batch."""
    return {name: p[f"memory.{name}"].expand(batch, -1, -1, -1) for name in LAYERS}


def projected(x: Tensor, p: Parameters, num_heads: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return q and k of length one and v, [B, T, H, d], after short convolutions and SiLU, and what these keep."""
    found = {name: convolved(x, p, name, num_heads) for name in ("query", "key", "value")}
    state = {f"{name}.conv": kept for name, (_, kept) in found.items()}
    return unit(found["query"][0]), unit(found["key"][0]), found["value"][0], state


def gate_input(x: Tensor, p: Parameters, name: str, num_heads: int) -> Tensor:
    """Return a gate's linear map [B, T, H, ..], through a low rank or not, with its offset if it has one."""
    source = f"gates.{name}.source"
    z = x @ p[f"{source}.down"] @ p[f"{source}.up"] if f"{source}.down" in p else x @ p[f"{source}.weight"]
    return heads(z + p.get(f"{source}.offset", torch.zeros(())), num_heads)


def by_layer(gate: Tensor) -> Weights:
    """Lay a gate [B, H, 1 or d] on each layer: along the input of the first and the output of the last."""
    return {"w1": gate[..., :, None], "w2": gate[..., None, :]}


def read_out(outputs: list[Tensor], gate: Tensor, p: Parameters) -> Tensor:
    """Return (gate * rms(o)) W_o for the read-outs o [B, H, d] of all tokens."""
    return (gate * rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)) @ p["output"]


def kept(**kinds: Weights) -> dict[str, Tensor]:
    """Return weights by ``kind.layer``, as states name them."""
    return {f"{kind}.{name}": tensor for kind, pair in kinds.items() for name, tensor in pair.items()}
