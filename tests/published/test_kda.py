"""Kimi Delta Attention (Kimi Team 2025), equation 1: a decay for every key channel before the delta step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, convolved, heads, hold, rms, sigmoid, softplus, unit

NARROW = "blocks: {main: {mixer: {key_dim: 16, value_dim: 24, readout: {gate: {rank: 8}}}}}"


def kimi_delta_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = (I - b k k^T) Diag(a_t) S_{t-1} + b k v^T, a_t = exp(-A softplus(x W_1 W_2 + dt)), W_1 of rank V."""
    (q, q_kept), (k, k_kept), (v, v_kept) = (convolved(x, p, name, 2) for name in ("query", "key", "value"))
    q, k = unit(q), unit(k)
    gate = "gates.retention/gate"
    z = x @ p[f"{gate}.source.down"] @ p[f"{gate}.source.up"] + p[f"{gate}.source.offset"]
    assert p[f"{gate}.source.down"].shape[1] == v.shape[-1]
    assert p[f"{gate}.log_rate"].numel() == 2  # A: one number a head
    a = torch.exp(-torch.exp(p[f"{gate}.log_rate"].reshape(2, 1)) * heads(softplus(z), 2))  # [B, T, H, K]
    b = sigmoid(x @ p["gates.update/step_size.source.weight"])
    one = torch.eye(q.shape[-1], dtype=x.dtype)
    s = torch.zeros(x.shape[0], 2, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        k_t, b_t = k[:, t], b[:, t, :, None, None]
        erase = one - b_t * torch.einsum("bhi,bhj->bhij", k_t, k_t)
        s = erase @ (a[:, t, :, :, None] * s) + b_t * torch.einsum("bhk,bhv->bhkv", k_t, v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    gate = "gates.readout/gate.source"
    gated = sigmoid(x @ p[f"{gate}.down"] @ p[f"{gate}.up"] + p[f"{gate}.offset"]) * o
    return gated @ p["output"], {"dual.w": s, "query.conv": q_kept, "key.conv": k_kept, "value.conv": v_kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_kda(backend: str) -> None:
    hold("kda", kimi_delta_attention, backend, length=70, narrow=NARROW)
