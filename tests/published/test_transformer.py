"""Softmax attention with rotary positions: "Attention is all you need", equation 1, in Llama's form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rotated


def attention(x: Tensor, p: Parameters, window: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """o_t = sum_{t - window < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j, then W_o."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    q, k = rotated(q), rotated(k)
    outputs = []
    for t in range(x.shape[1]):
        first = 0 if window is None else max(0, t - window + 1)
        scores = torch.einsum("bhk,bjhk->bhj", q[:, t], k[:, first : t + 1]) / q.shape[-1] ** 0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        outputs.append(torch.einsum("bhj,bjhv->bhv", weights, v[:, first : t + 1]).flatten(1))
    kept = 0 if window is None else max(0, x.shape[1] - window + 1)
    return torch.stack(outputs, dim=1) @ p["output"], {"keys": k[:, kept:], "values": v[:, kept:]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_transformer(backend: str) -> None:
    hold("transformer", attention, backend, length=70)
