"""Lightning attention in TransNormerLLM (Qin et al. 2023, 2024): decays fixed by head and layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, silu

HEADS, LAYERS = 4, 4


def lightning(x: Tensor, p: Parameters, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = exp(-(8 h / H)(1 - l / L)) S_{t-1} + k v^T; o = (S^T q / (||S^T q|| / sqrt(D))) * (x W_u)."""
    q, k, v = (x @ p[f"projections.{name}.source.weight"] for name in ("query", "key", "value"))
    q, k, v = heads(silu(q), HEADS), heads(silu(k), HEADS), heads(v, HEADS)
    slopes = [math.exp(-8 * h / HEADS * (1 - layer / LAYERS)) for h in range(HEADS)]
    decay = torch.tensor(slopes, dtype=x.dtype)[:, None, None]
    s = torch.zeros(x.shape[0], HEADS, k.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        s = decay * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s).flatten(1))
    o = torch.stack(outputs, dim=1)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-6)
    return (o * (x @ p["gates.readout/gate.source.weight"])) @ p["output"], {"dual.w": s}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lightning_attention(backend: str) -> None:
    hold("lightning_attention", lambda x, p: lightning(x, p, 0), backend, layer=0, length=70)
    hold("lightning_attention", lambda x, p: lightning(x, p, 2), backend, layer=2, length=70)
