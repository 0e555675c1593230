"""Mixture of memories (Du et al. 2025) over the gated delta rule: a token is written where the router sends it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, unit

EXPERTS, TAKEN, HEADS = 4, 2, 3


def mixture(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = a S_{t-1} - b k (a S_{t-1}^T k - v)^T in memories that take t, S_{t-1} in the rest; o = sum g S^T q."""
    first, state = "experts.0", {}
    mapped, state[f"{first}.query.conv"] = short_convolution(
        x @ p[f"{first}.projections.query.source.weight"], p[f"{first}.projections.query.source.conv"]
    )
    q = unit(heads(silu(mapped), HEADS))
    chances = torch.exp(x @ p["router.weight"])
    chances = chances / chances.sum(-1, keepdim=True)
    total = torch.zeros((), dtype=x.dtype)
    for name in [*(f"experts.{index}" for index in range(EXPERTS)), "always_on.0"]:
        projected = {}
        for role in ("key", "value"):
            mapped, state[f"{name}.{role}.conv"] = short_convolution(
                x @ p[f"{name}.projections.{role}.source.weight"], p[f"{first}.projections.{role}.source.conv"]
            )
            projected[role] = heads(silu(mapped), HEADS)
        k, v = unit(projected["key"]), projected["value"]
        b = 1 / (1 + torch.exp(-x @ p[f"{name}.gates.update/step_size.source.weight"]))
        z = x @ p[f"{name}.gates.retention/gate.source.weight"] + p[f"{first}.gates.retention/gate.source.offset"]
        rate = torch.exp(p[f"{first}.gates.retention/gate.log_rate"][:, 0, 0])
        a = torch.exp(-rate * torch.log(1 + torch.exp(z)))
        reads, rows = [], []
        for row in range(x.shape[0]):
            s = torch.zeros(HEADS, q.shape[-1], v.shape[-1], dtype=x.dtype)
            outputs = []
            for t in range(x.shape[1]):
                best = sorted(range(EXPERTS), key=lambda index: -chances[row, t, index].item())[:TAKEN]
                index = int(name.rpartition(".")[2])
                taken, weight = True, torch.ones((), dtype=x.dtype)
                if name.startswith("experts"):
                    taken, weight = index in best, chances[row, t, index] / sum(chances[row, t, i] for i in best)
                if taken:
                    kept = a[row, t, :, None, None] * s
                    surprise = torch.einsum("hkv,hk->hv", kept, k[row, t]) - v[row, t]
                    s = kept - b[row, t, :, None, None] * torch.einsum("hk,hv->hkv", k[row, t], surprise)
                read = torch.einsum("hkv,hk->hv", s, q[row, t]) / q.shape[-1] ** 0.5
                outputs.append(weight * read if taken else torch.zeros_like(read))
            reads.append(torch.stack(outputs))
            rows.append(s)
        total = total + torch.stack(reads)
        state[f"{name}.dual.w"] = torch.stack(rows)
    o = rms(total, p["readout.norm.weight"]).flatten(2)
    return (silu(x @ p["readout.gate.source.weight"]) * o) @ p["output"], state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mom(backend: str) -> None:
    hold("mom", mixture, backend)
