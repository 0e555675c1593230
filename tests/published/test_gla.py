"""Gated linear attention (Yang et al. 2023), equation 3 and section 4.4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, silu


def gated_linear_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = Diag(a_t) S_{t-1} + k v^T, a_t = sigmoid(x W_1 W_2 + b)^(1/16), W_1 of rank 16; o = S^T q / sqrt(K)."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    gate = "gates.retention/gate.source"
    z = x @ p[f"{gate}.down"] @ p[f"{gate}.up"] + p[f"{gate}.offset"]
    assert p[f"{gate}.down"].shape[1] == 16
    a = heads((1 / (1 + torch.exp(-z))) ** (1 / 16), 4)  # one number for each key channel
    s = torch.zeros(x.shape[0], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = a[:, t, :, :, None] * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return (silu(x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], {"dual.w": s}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gla(backend: str) -> None:
    hold("gla", gated_linear_attention, backend, length=70)
