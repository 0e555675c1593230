"""RetNet (Sun et al. 2023), equations 5 to 8, with RoPE and RMS norm where the spec says it differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, rotated, silu


def retention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = gamma_h S_{t-1} + k v^T, gamma_h = 1 - 2^(-5 - h); o = S^T q / sqrt(K); silu(W_g x) * norm(o), W_o."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    q, k = rotated(q), rotated(k)
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(4)], dtype=x.dtype)[:, None, None]
    s = torch.zeros(x.shape[0], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = gamma * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return (silu(x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], {"dual.w": s}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_retnet(backend: str) -> None:
    hold("retnet", retention, backend, length=70)
