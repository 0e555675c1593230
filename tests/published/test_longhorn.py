"""Longhorn (Liu et al. 2024), theorem 3.1: the closed form of a proximal step, checked against its own objective."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold, short_convolution, sigmoid, silu

EXACT = """blocks: {main: {mixer: {num_heads: 32, value_dim: 1, qk: {heads: 1}, streams: {inner: {dim: 32}},
  update: {diagonal: false, step_size: {per: head}}}}}"""


def longhorn(
    x: Tensor, p: Parameters, form: Literal["exact", "diagonal"] = "diagonal"
) -> tuple[Tensor, dict[str, Tensor]]:
    """S_i = (1 - e_i k^2) * S'_i + e_i x_i k, e_i = b_i / (1 + b_i k . k), for each channel i; o = S^T q.

    ``exact`` is the theorem: S_i = argmin ||S_i - S'_i||^2 + b_i (S_i . k - x_i)^2.
    """
    inner, kept = short_convolution(x @ p["streams.inner.source.weight"], p["streams.inner.source.conv"])
    inner = silu(inner + p["streams.inner.source.conv_offset"])
    q, k = (inner @ p[f"projections.{name}.source.weight"] for name in ("query", "key"))  # [B, T, N]: all heads'
    gate = "gates.update/step_size.source"
    b = sigmoid(inner @ p[f"{gate}.down"] @ p[f"{gate}.up"] + p[f"{gate}.offset"])
    one = torch.eye(k.shape[-1], dtype=x.dtype)
    s = torch.zeros(*inner.shape[::2], k.shape[-1], dtype=x.dtype)  # [B, channels, N]
    outputs = []
    for t in range(x.shape[1]):
        k_t, b_t, x_t = k[:, t, None, :], b[:, t, :, None], inner[:, t, :, None]
        if form == "exact":
            # The objective's gradient is zero where (I + b k k^T) S_i = S'_i + b x_i k.
            matrix = one + b_t[..., None] * k_t[..., :, None] * k_t[..., None, :]
            s = torch.linalg.solve(matrix, (s + b_t * x_t * k_t)[..., None])[..., 0]
        else:
            e = b_t / (1 + b_t * (k_t * k_t).sum(-1, keepdim=True))
            s = (1 - e * k_t * k_t) * s + e * x_t * k_t
        outputs.append(torch.einsum("bcn,bn->bc", s, q[:, t]))
    y = torch.stack(outputs, dim=1) + p["gates.readout/skip/gate.raw"].flatten() * inner
    dual = s[..., None] if form == "exact" else s.mT[:, None]  # a head for each channel, or one for all
    return (silu(x @ p["gates.readout/gate.source.weight"]) * y) @ p["output"], {
        "dual.w": dual,
        "streams.inner.conv": kept,
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_longhorn(backend: str) -> None:
    hold("longhorn", longhorn, backend, length=70)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_closed_form_minimises_the_objective(backend: str) -> None:
    hold("longhorn", lambda x, p: longhorn(x, p, "exact"), backend, narrow=EXACT)
