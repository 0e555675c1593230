"""DeltaNet (Schlag et al. 2021, equation 24; Yang et al. 2024): one gradient step on 1/2 ||S^T k - v||^2 a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, unit


def delta_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = S_{t-1} - b_t k (S_{t-1}^T k - v)^T, b_t = sigmoid(w x); o = S^T q / sqrt(K); q, k of length one."""
    state, projected = {}, {}
    for name in ("query", "key", "value"):
        mapped = x @ p[f"projections.{name}.source.weight"]
        convolved, state[f"{name}.conv"] = short_convolution(mapped, p[f"projections.{name}.source.conv"])
        projected[name] = heads(silu(convolved), 4)
    q, k, v = unit(projected["query"]), unit(projected["key"]), projected["value"]
    b = 1 / (1 + torch.exp(-x @ p["gates.update/step_size.source.weight"]))  # [B, T, H]
    s = torch.zeros(x.shape[0], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        surprise = torch.einsum("bhkv,bhk->bhv", s, k[:, t]) - v[:, t]
        s = s - b[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], surprise)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return o @ p["output"], {"dual.w": s, **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_deltanet(backend: str) -> None:
    hold("deltanet", delta_net, backend, length=70)
