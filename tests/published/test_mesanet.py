"""MesaNet (von Oswald et al. 2025), equations 5 to 7, its linear systems solved by elimination."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import SMALL_HEADS, Parameters, convolved, heads, hold, rms, sigmoid, softplus, unit


def mesa_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """H = a H + b k k^T; S = a S + b k v^T; o = S^T (H + diag(l))^-1 q; q and k convolved and of length one."""
    (q, q_kept), (k, k_kept) = (convolved(x, p, name, 2) for name in ("query", "key"))
    q, k, v = unit(q), unit(k), heads(x @ p["projections.value.source.weight"], 2)

    def gate(name: str) -> Tensor:
        return sigmoid(x @ p[f"gates.{name}.source.weight"] + p[f"gates.{name}.source.offset"])[..., None, None]

    a, b = gate("retention/gate"), gate("update/step_size")
    ridge = torch.diag_embed(0.25 + softplus(p["gates.update/ridge.raw"][..., 0]))  # [H, K, K]
    s = torch.zeros(x.shape[0], 2, q.shape[-1], v.shape[-1], dtype=x.dtype)
    h = torch.zeros(x.shape[0], 2, q.shape[-1], q.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        h = a[:, t] * h + b[:, t] * torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        s = a[:, t] * s + b[:, t] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        solution = torch.linalg.solve(h + ridge, q[:, t, :, :, None])
        outputs.append((s.mT @ solution)[..., 0])
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return o @ p["output"], {"dual.w": s, "covariance.w": h, "query.conv": q_kept, "key.conv": k_kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mesanet(backend: str) -> None:
    # Thirty conjugate-gradient steps in sixteen dimensions leave nothing of the residual that fp64 could show.
    hold("mesanet", mesa_net, backend, length=70, narrow=SMALL_HEADS)
