"""Mamba (Gu and Dao 2023), algorithm 2: the selective state space between its convolution, skip and gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold, short_convolution, silu, softplus


def selective_state_space(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h_cn = exp(-D_c A_cn) h_cn + D_c B_n x_c; y_c = sum_n C_n h_cn + skip_c x_c, times silu(z)."""
    inner, kept = short_convolution(x @ p["streams.inner.source.weight"], p["streams.inner.source.conv"])
    inner = silu(inner + p["streams.inner.source.conv_offset"])  # [B, T, channels]
    b, c = (inner @ p[f"projections.{name}.source.weight"] for name in ("key", "query"))  # [B, T, N]
    gate = "gates.retention/gate"
    delta = softplus(inner @ p[f"{gate}.source.down"] @ p[f"{gate}.source.up"] + p[f"{gate}.source.offset"])
    assert p[f"{gate}.source.down"].shape[1] == x.shape[-1] // 16
    rate = torch.exp(p[f"{gate}.log_rate"][0].T)  # [channels, N]
    h = torch.zeros(x.shape[0], *rate.shape, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        d = delta[:, t, :, None]
        h = torch.exp(-d * rate) * h + d * b[:, t, None, :] * inner[:, t, :, None]
        outputs.append(torch.einsum("bcn,bn->bc", h, c[:, t]))
    y = torch.stack(outputs, dim=1) + p["gates.readout/skip/gate.raw"].flatten() * inner
    z = x @ p["gates.readout/gate.source.weight"]
    return (y * silu(z)) @ p["output"], {"dual.w": h.mT[:, None], "streams.inner.conv": kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mamba(backend: str) -> None:
    hold("mamba", selective_state_space, backend, length=70)
