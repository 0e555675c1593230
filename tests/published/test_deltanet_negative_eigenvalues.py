"""DeltaNet with step sizes up to two (Grazzi et al. 2024): negative eigenvalues along the key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, convolved, hold, rms, sigmoid, unit


def delta_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = (I - b_t k k^T) S_{t-1} + b_t k v^T, b_t = 2 sigmoid(w x); o = S^T q / sqrt(K)."""
    (q, q_kept), (k, k_kept), (v, v_kept) = (convolved(x, p, name, 4) for name in ("query", "key", "value"))
    q, k = unit(q), unit(k)
    b = 2 * sigmoid(x @ p["gates.update/step_size.source.weight"])
    one = torch.eye(q.shape[-1], dtype=x.dtype)
    s = torch.zeros(x.shape[0], 4, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        k_t, b_t = k[:, t], b[:, t, :, None, None]
        s = (one - b_t * k_t[..., :, None] * k_t[..., None, :]) @ s + b_t * k_t[..., :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1), p["norm.weight"]).flatten(2)
    return o @ p["output"], {"dual.w": s, "query.conv": q_kept, "key.conv": k_kept, "value.conv": v_kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_deltanet_negative_eigenvalues(backend: str) -> None:
    hold("deltanet_negative_eigenvalues", delta_net, backend, length=70)
