"""Mamba-2 (Dao and Gu 2024): scalar decays, one group of B and C, the gate before the norm over all heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, rms, short_convolution, silu, softplus

HEADS = 8
NARROW = "blocks: {main: {mixer: {key_dim: 16, value_dim: 12}}}"


def state_space_duality(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = exp(-A_h D_t) S_{t-1} + D_t B_t x_t^T; y = S^T C + skip_h x; rms(y * silu(z)) W_o."""
    state, found = {}, {}
    for name in ("query", "key", "value"):
        source = f"projections.{name}.source"
        mapped, state[f"{name}.conv"] = short_convolution(x @ p[f"{source}.weight"], p[f"{source}.conv"])
        found[name] = silu(mapped + p[f"{source}.conv_offset"])
    c, b, v = found["query"], found["key"], heads(found["value"], HEADS)
    gate = "gates.retention/gate"
    delta = softplus(x @ p[f"{gate}.source.weight"] + p[f"{gate}.source.offset"])  # [B, T, H]
    a = torch.exp(-torch.exp(p[f"{gate}.log_rate"].flatten()) * delta)
    s = torch.zeros(x.shape[0], HEADS, b.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        write = torch.einsum("bn,bhp->bhnp", b[:, t], delta[:, t, :, None] * v[:, t])
        s = a[:, t, :, None, None] * s + write
        outputs.append(torch.einsum("bn,bhnp->bhp", c[:, t], s))
    y = torch.stack(outputs, dim=1) + p["gates.readout/skip/gate.raw"].reshape(HEADS, 1) * v
    gated = y.flatten(2) * silu(x @ p["gates.readout/gate.source.weight"])
    return rms(gated, p["norm.weight"]) @ p["output"], {"dual.w": s, **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mamba2(backend: str) -> None:
    hold("mamba2", state_space_duality, backend, length=70, narrow=NARROW)
