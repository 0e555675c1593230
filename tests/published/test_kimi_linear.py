"""Kimi Linear (Kimi Team 2025): three layers of delta attention to one of multi-head latent attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import archspec

from .plain import Parameters, heads, hold, rms
from .test_kda import kimi_delta_attention

NARROW = """
blocks:
  main: {mixer: {key_dim: 16, value_dim: 24, readout: {gate: {rank: 8}}}}
  mla:
    mixer:
      key_dim: 24
      value_dim: 20
      streams: {latent: {dim: 32}}
      key: [{from: latent, dim: 16}, {dim: 8, heads: 1}]
"""


def latent_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """c = rms(W_c x); k^h = [W_k^h c, W_r x], v^h = W_v^h c; softmax of q . k / sqrt(K), no positions."""
    latent = rms(x @ p["streams.latent.source.weight"], p["streams.latent.norm.weight"])
    q = heads(x @ p["projections.query.source.weight"], 2)
    own = heads(latent @ p["projections.key.parts.0.source.weight"], 2)
    common = x @ p["projections.key.parts.1.source.weight"]  # one vector for all heads
    k = torch.cat([own, torch.stack([common, common], dim=2)], dim=-1)
    v = heads(latent @ p["projections.value.source.weight"], 2)
    outputs = []
    for t in range(x.shape[1]):
        scores = torch.einsum("bhk,bjhk->bhj", q[:, t], k[:, : t + 1]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), v[:, : t + 1]).flatten(1))
    return torch.stack(outputs, dim=1) @ p["output"], {"keys": k, "values": v}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_kimi_linear(backend: str) -> None:
    hold("kimi_linear", kimi_delta_attention, backend, layer=2, narrow=NARROW)
    hold("kimi_linear", latent_attention, backend, layer=3, narrow=NARROW)


def test_every_fourth_layer_attends() -> None:
    assert list(archspec.load("kimi_linear").layout.names()) == 2 * ["main", "main", "main", "mla"]
