"""Sparse state expansion (Pan et al. 2025): partitions of one state, written and read by the router's weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, silu

PARTITIONS, HEADS = 4, 4


def expanded(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S^n_t = Diag(a) S^n_{t-1} + k (e_n v)^T in the partition that takes t; o = e_n S^n^T q + S^+^T (q + lora)."""
    first = "experts.0"
    raw = x @ p[f"{first}.projections.query.source.weight"]
    below = "always_on.0.projections.query.source"
    adapted = raw + (x @ p[f"{below}.adapt_down"]) @ p[f"{below}.adapt_up"]
    q, q_always = (heads(silu(z), HEADS) for z in (raw, adapted))
    scores = torch.exp(heads(x @ p[f"{first}.projections.key.source.weight"], HEADS))
    k = scores / scores.sum(-1, keepdim=True)
    v = heads(silu(x @ p[f"{first}.projections.value.source.weight"]), HEADS)
    gate = f"{first}.gates.retention/gate.source"
    z = (x @ p[f"{gate}.down"]) @ p[f"{gate}.up"] + p[f"{gate}.offset"]
    a = heads((1 / (1 + torch.exp(-z))) ** (1 / 16), HEADS)
    e = torch.exp(x @ p["router.weight"])
    e = e / e.sum(-1, keepdim=True)
    scale = q.shape[-1] ** -0.5
    rows, finals = [], []
    for row in range(x.shape[0]):
        states = [torch.zeros(HEADS, q.shape[-1], v.shape[-1], dtype=x.dtype) for _ in range(PARTITIONS + 1)]
        outputs = []
        for t in range(x.shape[1]):
            best = int(e[row, t].argmax())
            weight = e[row, t, best]
            written = torch.einsum("hk,hv->hkv", k[row, t], v[row, t])
            states[best] = a[row, t, :, :, None] * states[best] + weight * written
            states[-1] = a[row, t, :, :, None] * states[-1] + written
            routed = weight * torch.einsum("hkv,hk->hv", states[best], q[row, t])
            outputs.append(scale * (routed + torch.einsum("hkv,hk->hv", states[-1], q_always[row, t])))
        rows.append(torch.stack(outputs))
        finals.append(states)
    o = rms(torch.stack(rows), p["readout.norm.weight"]).flatten(2)
    names = [*(f"experts.{index}" for index in range(PARTITIONS)), "always_on.0"]
    state = {f"{name}.dual.w": torch.stack([kept[n] for kept in finals]) for n, name in enumerate(names)}
    return (silu(x @ p["readout.gate.source.weight"]) * o) @ p["output"], state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sse(backend: str) -> None:
    hold("sse", expanded, backend)
