"""Longhorn (Liu et al. 2024), theorem 3.1: the closed form of a proximal step, checked against its own objective."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold, short_convolution, sigmoid, silu

PER_CHANNEL = "blocks: {main: {mixer: {num_heads: 32, value_dim: 1, streams: {inner: {dim: 32}}}}}"
DIAGONAL = "blocks: {main: {mixer: {update: {diagonal: true}}}}"


def longhorn(
    x: Tensor, p: Parameters, form: Literal["exact", "diagonal"] = "exact"
) -> tuple[Tensor, dict[str, Tensor]]:
    """S_i = argmin ||S_i - S'_i||^2 + b_i (S_i . k - x_i)^2 for each value channel i, S' the state before; o = S^T q.

    ``diagonal`` is the authors' code: S_i = (1 - e_i k^2) * S'_i + e_i x_i k, e_i = b_i / (1 + b_i k . k).
    """
    inner, kept = short_convolution(x @ p["streams.inner.source.weight"], p["streams.inner.source.conv"])
    inner = silu(inner + p["streams.inner.source.conv_offset"])
    q, k = (inner @ p[f"projections.{name}.source.weight"] for name in ("query", "key"))  # [B, T, N]: all heads'
    gate = "gates.update/step_size.source"
    b = sigmoid(inner @ p[f"{gate}.down"] @ p[f"{gate}.up"] + p[f"{gate}.offset"])
    num_heads = b.shape[-1]
    b = b.repeat_interleave(inner.shape[-1] // num_heads, dim=-1)  # [B, T, channels]
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
    dual = s.reshape(x.shape[0], num_heads, -1, k.shape[-1]).mT
    return (silu(x @ p["gates.readout/gate.source.weight"]) * y) @ p["output"], {
        "dual.w": dual,
        "streams.inner.conv": kept,
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_longhorn(backend: str) -> None:
    hold("longhorn", longhorn, backend, length=70)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_size_for_each_channel(backend: str) -> None:
    hold("longhorn", longhorn, backend, narrow=PER_CHANNEL)


def test_the_diagonal_form_is_the_authors_code() -> None:
    hold("longhorn", lambda x, p: longhorn(x, p, "diagonal"), "auto", narrow=DIAGONAL)
