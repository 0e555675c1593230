"""Hedgehog (Zhang et al. 2024), section 4: linear attention with learned softmax features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold


def features(x: Tensor, p: Parameters, name: str) -> Tensor:
    """Return softmax([2 (W x + b), -2 (W x + b)]) of x [B, T, H, d], W and b of each head."""
    weight, offset = p[f"projections.{name}.feature.weight"], p[f"projections.{name}.feature.offset"]
    mapped = torch.stack([x[:, :, h] @ weight[h] + offset[h] for h in range(4)], dim=2)
    powers = torch.exp(torch.cat([2 * mapped, -2 * mapped], dim=-1))
    return powers / powers.sum(-1, keepdim=True)


def hedgehog(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """s_t = s_{t-1} + phi(k) v^T; z_t = z_{t-1} + phi(k); o_t = phi(q)^T s_t / (phi(q)^T z_t + 1e-6)."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    q, k = features(q, p, "query"), features(k, p, "key")
    s = torch.zeros(x.shape[0], 4, k.shape[-1], v.shape[-1], dtype=x.dtype)
    z = torch.zeros(x.shape[0], 4, k.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z = z + k[:, t]
        total = (q[:, t] * z).sum(-1, keepdim=True) + 1e-6
        outputs.append((torch.einsum("bhk,bhkv->bhv", q[:, t], s) / total).flatten(1))
    return torch.stack(outputs, dim=1) @ p["output"], {"dual.w": torch.cat([s, z[..., None]], dim=-1)}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hedgehog(backend: str) -> None:
    hold("hedgehog", hedgehog, backend, length=70)
