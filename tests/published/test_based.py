"""Based (Arora et al. 2024), section 4: Taylor features in turns with windows of softmax attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import archspec

from .plain import Parameters, heads, hold
from .test_transformer import attention

NARROW = "blocks: {linear: {mixer: {key_dim: 6}}, window: {mixer: {memory: {window: 24}}}}"


def taylor_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o_t = sum_j w_tj v_j / sum_j w_tj, w = 1 + s + s^2 / 2, s = q . k / sqrt(d), over all tokens up to t."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    d = q.shape[-1]
    s = torch.einsum("bthk,bjhk->bhtj", q, k) / d**0.5
    weights = (1 + s + s * s / 2).tril()
    o = torch.einsum("bhtj,bjhv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-12), v).flatten(2)
    # What is kept of keys and values: sum_j phi(k_j) [v_j, 1]^T, the products of two channels once each.
    pairs = [(i, j) for i in range(d) for j in range(i + 1, d)]
    phi = torch.cat(
        [
            torch.ones_like(k[..., :1]),
            k / d**0.25,
            k * k / (2 * d) ** 0.5,
            torch.stack([k[..., i] * k[..., j] for i, j in pairs], dim=-1) / d**0.5,
        ],
        dim=-1,
    )
    state = torch.einsum("bthk,bthv->bhkv", phi, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
    return o @ p["output"], {"dual.w": state}


def windowed(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """Softmax attention over the last 24 tokens."""
    return attention(x, p, window=24)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_based(backend: str) -> None:
    hold("based", taylor_attention, backend, layer=0, length=70, narrow=NARROW)
    hold("based", windowed, backend, layer=1, narrow=NARROW)


def test_shipped_sizes_are_the_papers() -> None:
    spec = archspec.load("based")
    linear, window = (spec.blocks[name].mixer.dump() for name in ("linear", "window"))
    assert (linear["key_dim"]["fixed"], window["memory"]["window"]) == (16, 64)
