"""The TTT layer of Sun et al. 2024, section 2, in its Mamba backbone, by its primal form."""

from __future__ import annotations

import torch
from torch import Tensor

from .miras import gelu, layer_norm
from .plain import Parameters, heads, rotated, short_convolution, sigmoid

BATCH, HEADS = 16, 4
Weights = dict[str, Tensor]


def inner_model(w: Weights, x: Tensor, p: Parameters) -> Tensor:
    """Return f(x) = x + LN(x W + b), or with two layers x + LN(gelu(x W_1 + b_1) W_2 + b_2), for x [B, H, d]."""
    y = torch.einsum("bhi,bhij->bhj", x, w["w1"]) + w["b1"][..., 0, :]
    if "w2" in w:
        y = torch.einsum("bhi,bhij->bhj", gelu(y), w["w2"]) + w["b2"][..., 0, :]
    return x + layer_norm(y, p["memory.norm_scale"][:, 0], p["memory.norm_shift"][:, 0])


def restarted(x: Tensor) -> Tensor:
    """Return RoPE of x [B, T, H, K] with positions that restart every mini-batch."""
    return torch.cat([rotated(x[:, i : i + BATCH]) for i in range(0, x.shape[1], BATCH)], dim=1)


def ttt(x: Tensor, p: Parameters, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
    """W_i = W_0 - c_i sum_{j <= i} eta_j grad l(W_0; k_j, v_j), eta = rate sigmoid(w x + c); o_i = f(W_i, q_i).

    c_i = max(0, 1/i + d_i), i the place in the mini-batch, d learned.
    """
    common = x @ p["streams.common.source.weight"]
    q, q_kept = short_convolution(common, p["projections.query.source.conv"])
    k, k_kept = short_convolution(common, p["projections.key.source.conv"])
    q, k = q + p["projections.query.source.conv_offset"], k + p["projections.key.source.conv_offset"]
    q, k = restarted(heads(q, HEADS)), restarted(heads(k, HEADS))
    v = heads(x @ p["projections.value.source.weight"], HEADS)
    gate = "gates.update/step_size.source"
    eta = rate * sigmoid(x @ p[f"{gate}.weight"] + p[f"{gate}.offset"])
    names = [name for name in ("w1", "b1", "w2", "b2") if f"memory.{name}" in p]
    w = start = {name: p[f"memory.{name}"].expand(x.shape[0], -1, -1, -1) for name in names}
    sums: Weights = {}
    outputs = []
    for t in range(x.shape[1]):
        if t % BATCH == 0:
            start, sums = w, {name: torch.zeros_like(w[name]) for name in names}
        loss = 0.5 * (inner_model(start, k[:, t], p) - v[:, t]).square().sum()
        slopes = torch.autograd.grad(loss, [start[name] for name in names], create_graph=True)
        for name, slope in zip(names, slopes, strict=True):
            sums[name] = sums[name] + eta[:, t, :, None, None] * slope
        share = torch.relu(1 / (t % BATCH + 1) + p["memory.anchor_share"][t % BATCH])
        w = {name: start[name] - share * sums[name] for name in names}
        outputs.append(inner_model(w, q[:, t], p).flatten(1))
    o = layer_norm(torch.stack(outputs, dim=1), p["norm.weight"], p["norm.shift"])
    state = {f"dual.{name}": w[name] for name in names} | {f"anchor.{name}": start[name] for name in names}
    state |= {f"steps.{name}": -sums[name] for name in names}
    gated = gelu(x @ p["gates.readout/gate.source.weight"]) * o
    return gated @ p["output"], {**state, "query.conv": q_kept, "key.conv": k_kept}
