"""Linear attention (Katharopoulos et al. 2020), equations 7 and 16 to 20."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold


def linear_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """s_t = s_{t-1} + phi(k) v^T; z_t = z_{t-1} + phi(k); o_t = phi(q)^T s_t / (phi(q)^T z_t + 1e-6)."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    q, k = (torch.where(u > 0, u + 1, torch.exp(u)) for u in (q, k))  # elu(u) + 1
    s = torch.zeros(*q.shape[:1], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    z = torch.zeros(*q.shape[:1], 4, q.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z = z + k[:, t]
        numerator = torch.einsum("bhk,bhkv->bhv", q[:, t], s)
        denominator = torch.einsum("bhk,bhk->bh", q[:, t], z) + 1e-6
        outputs.append((numerator / denominator[..., None]).flatten(1))
    # The normaliser is kept as one more value channel.
    return torch.stack(outputs, dim=1) @ p["output"], {"dual.w": torch.cat([s, z[..., None]], dim=-1)}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_linear_attention(backend: str) -> None:
    hold("linear_attention", linear_attention, backend, length=70)
