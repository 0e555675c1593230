"""Gated DeltaNet (Yang et al. 2024), equation 10: the decay precedes the read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, unit


def gated_delta_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = (I - b k k^T) a_t S_{t-1} + b k v^T, a_t = exp(-A softplus(w x + dt)), b_t = sigmoid(w' x)."""
    state, projected = {}, {}
    for name in ("query", "key", "value"):
        mapped = x @ p[f"projections.{name}.source.weight"]
        convolved, state[f"{name}.conv"] = short_convolution(mapped, p[f"projections.{name}.source.conv"])
        projected[name] = heads(silu(convolved), 3)
    q, k, v = unit(projected["query"]), unit(projected["key"]), projected["value"]
    z = x @ p["gates.retention/gate.source.weight"] + p["gates.retention/gate.source.offset"]
    rate = torch.exp(p["gates.retention/gate.log_rate"].flatten())
    a = torch.exp(-rate * torch.log(1 + torch.exp(z)))  # [B, T, H]
    b = 1 / (1 + torch.exp(-x @ p["gates.update/step_size.source.weight"]))
    one = torch.eye(q.shape[-1], dtype=x.dtype)
    s = torch.zeros(x.shape[0], 3, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        k_t, b_t = k[:, t], b[:, t, :, None, None]
        erase = one - b_t * torch.einsum("bhi,bhj->bhij", k_t, k_t)
        s = erase @ (a[:, t, :, None, None] * s) + b_t * torch.einsum("bhk,bhv->bhkv", k_t, v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return (silu(x @ p["gates.readout/gate.source.weight"]) * o) @ p["output"], {"dual.w": s, **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gated_deltanet(backend: str) -> None:
    hold("gated_deltanet", gated_delta_net, backend, length=70)
