"""Sliding-window linear attention (Behrouz et al. 2025, "ATLAS"): every token writes the last eight again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .miras import gate_input, projected, read_out
from .plain import Parameters, hold, sigmoid, silu
from .test_omeganet import HEADS, NARROW, WINDOW, waiting


def monomials(x: Tensor, p: Parameters, name: str) -> Tensor:
    """Return [sqrt(a_0), sqrt(a_1) x_i, sqrt(a_2) x_i x_j] for x [B, T, H, d]."""
    a = [torch.exp(p[f"projections.{name}.feature.a{n}"]) ** 0.5 for n in range(3)]
    squares = torch.einsum("bthi,bthj->bthij", x, x).flatten(-2)
    return torch.cat([a[0] * torch.ones_like(x[..., :1]), a[1] * x, a[2] * squares], dim=-1)


def sliding_window_linear_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = a_t S_{t-1} + sum over the window of g_i phi(k_i) v_i^T; o_t = S_t^T phi(q_t)."""
    q, k, v, state = projected(x, p, HEADS)
    q, k = monomials(q, p, "query"), monomials(k, p, "key")
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))[..., None]
    g = sigmoid(gate_input(x, p, "bias/window/weights", HEADS))
    s = torch.zeros(x.shape[0], HEADS, k.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        window = slice(max(0, t - WINDOW + 1), t + 1)
        s = decay[:, t] * s + torch.einsum("bthk,bthv->bhkv", g[:, window] * k[:, window], v[:, window])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    gate = silu(x @ p["gates.readout/gate.source.weight"])
    return read_out(outputs, gate, p), {"dual.w": s, **waiting(k, v, g), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_swla(backend: str) -> None:
    hold("swla", sliding_window_linear_attention, backend, narrow=NARROW)
