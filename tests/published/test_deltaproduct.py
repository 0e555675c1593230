"""Gated DeltaProduct (Siems et al. 2025), equation 7: one decay, then two delta steps a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import SMALL_HEADS, Parameters, convolved, hold, rms, sigmoid, silu, softplus, unit

HEADS, STEPS = 3, 2


def delta_product(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t: a_t S_{t-1}, then S <- (I - b_i k_i k_i^T) S + b_i k_i v_i^T for i = 1, 2; b_i = 2 sigmoid(w_i x)."""
    q, q_kept = convolved(x, p, "query", HEADS)
    k, k_kept = convolved(x, p, "key", STEPS * HEADS)
    v, v_kept = convolved(x, p, "value", STEPS * HEADS)
    q, k = unit(q), unit(k)
    z = x @ p["gates.retention/gate.source.weight"] + p["gates.retention/gate.source.offset"]
    a = torch.exp(-torch.exp(p["gates.retention/gate.log_rate"].flatten()) * softplus(z))  # [B, T, H]
    b = 2 * sigmoid(x @ p["gates.update/step_size.source.weight"])  # [B, T, 2 H]
    s = torch.zeros(x.shape[0], HEADS, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = a[:, t, :, None, None] * s
        for i in range(STEPS):
            of_step = slice(i * HEADS, (i + 1) * HEADS)
            k_i, v_i, b_i = k[:, t, of_step], v[:, t, of_step], b[:, t, of_step, None, None]
            surprise = v_i - torch.einsum("bhk,bhkv->bhv", k_i, s)
            s = s + b_i * torch.einsum("bhk,bhv->bhkv", k_i, surprise)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    gated = silu(x @ p["gates.readout/gate.source.weight"]) * o
    return gated @ p["output"], {"dual.w": s, "query.conv": q_kept, "key.conv": k_kept, "value.conv": v_kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_deltaproduct(backend: str) -> None:
    hold("deltaproduct", delta_product, backend, length=70, narrow=SMALL_HEADS)
