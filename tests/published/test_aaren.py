"""Aaren (Feng et al. 2024), section 3: attention of a learned query as a recurrence of (maximum, sum, weighted sum)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold


def attention_as_a_recurrence(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """m_t = max(m, s_t), u_t = u e^(m - m_t) + e^(s_t - m_t), w_t likewise with v_t; o_t = w_t / u_t; s_t = q . k_t."""
    k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("key", "value"))
    s = torch.einsum("hk,bthk->bth", p["projections.query.source.vector"], k) / k.shape[-1] ** 0.5
    m = torch.full_like(s[:, 0], -torch.inf)
    u, w = torch.zeros_like(m), torch.zeros_like(v[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        top = torch.maximum(m, s[:, t])
        fade, added = torch.exp(m - top), torch.exp(s[:, t] - top)
        m, u, w = top, u * fade + added, w * fade[..., None] + added[..., None] * v[:, t]
        outputs.append((w / u[..., None]).flatten(1))
    return torch.stack(outputs, dim=1) @ p["output"], {
        "statistics.maximum": m,
        "statistics.weight": u,
        "statistics.value": w,
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_aaren(backend: str) -> None:
    hold("aaren", attention_as_a_recurrence, backend, length=70)
