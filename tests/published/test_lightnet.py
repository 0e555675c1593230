"""LightNet (Qin et al. 2024), section 3.2: additive decay. The weights of all tokens so far, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, silu


def light_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o_t = sum_{j <= t} (q_t . e^(k_j) / sum_{i <= t} e^(k_i)) v_j / sqrt(K): the recurrence, unrolled."""
    q = silu(heads(x @ p["projections.query.source.weight"], 2))
    v = heads(x @ p["projections.value.source.weight"], 2)
    k = heads(x @ p["gates.retention/gate.source.weight"], 2)
    total = torch.zeros_like(k[:, 0])
    summed = torch.zeros(x.shape[0], 2, k.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        total = total + torch.exp(k[:, t])
        summed = summed + torch.exp(k[:, t])[..., None] * v[:, t, :, None]
        s = summed / total[..., None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s) / q.shape[-1] ** 0.5)
    o = rms(torch.stack(outputs, dim=1).flatten(2), p["norm.weight"])
    gate = "gates.readout/gate.source"
    gated = o * silu(x @ p[f"{gate}.down"] @ p[f"{gate}.up"])
    return gated @ p["output"], {"dual.w": s, "retention.gate.total": torch.log(total)[:, None, :, :, None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lightnet(backend: str) -> None:
    hold("lightnet", light_net, backend, length=70)
