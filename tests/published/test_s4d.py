"""S4D (Gu et al. 2022): a diagonal state space for every channel, as the recurrence of its zero-order hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .state_spaces import continuous, gated_linear_unit, unrolled

NARROW = """blocks: {main: {mixer: {num_heads: 64, key_dim: 8, key: {parts: [
  {kind: constant, value: 1, dim: 4}, {kind: constant, value: 0, dim: 4}]}}}}"""


def s4d(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h = exp(D A) h + (exp(D A) - 1) / A u;  y = 2 Re(C h) + skip u [B, T, d] from h [B, T, d, N]; GELU and GLU."""
    delta = torch.exp(p["gates.gates/delta.raw"])  # [d, 1, 1]
    factor, held = continuous(p, delta, 1)
    h = unrolled(factor, held * x[..., None])
    read = p["projections.query.source.vector"]
    c = torch.complex(read[:, :4], -read[:, 4:])
    y = 2 * (c * h).sum(-1).real + p["gates.readout/skip/gate.raw"].flatten() * x
    last = h[:, -1]
    return gated_linear_unit(y, p, 1), {"dual.w": torch.cat([last.real, last.imag], dim=-1)[..., None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_s4d(backend: str) -> None:
    hold("s4d", s4d, backend, length=70, narrow=NARROW)
