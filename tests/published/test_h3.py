"""H3 (Fu et al. 2023), head size 1: shift and diagonal state spaces between two products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold, short_convolution
from .state_spaces import continuous, unrolled

NARROW = """blocks: {main: {mixer: {num_heads: 64, key_dim: 8, gates: {shifted: {conv: 12}}, key: {parts: [
  {kind: constant, value: 1, dim: 4}, {kind: constant, value: 0, dim: 4}]}}}}"""


def h3(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o = q (SSM_diag(k' v) + skip k' v), k' = SSM_shift(k): the state of a shift holds the last keys."""
    k, kept = short_convolution(x @ p["gates.gates/shifted.source.weight"], p["gates.gates/shifted.source.conv"])
    product = k * (x @ p["projections.value.source.weight"])
    factor, held = continuous(p, torch.exp(p["gates.gates/delta.raw"]), 1)
    h = unrolled(factor, held * product[..., None])
    read = p["projections.query.source.vector"]
    c = torch.complex(read[:, :4], -read[:, 4:])
    y = 2 * (c * h).sum(-1).real + p["gates.readout/skip/gate.inner.first.raw"].flatten() * product
    o = (x @ p["gates.readout/gate.source.weight"]) * y
    last = h[:, -1]
    state = torch.cat([last.real, last.imag], dim=-1)[..., None]
    return o @ p["output"], {"dual.w": state, "gates.shifted.conv": kept}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_h3(backend: str) -> None:
    hold("h3", h3, backend, length=70, narrow=NARROW)
