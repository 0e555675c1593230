"""S5 (Smith et al. 2023): one diagonal state space for all channels, by zero-order hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .state_spaces import continuous, unrolled


def s5(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h = exp(D A) h + (exp(D A) - 1) / A (B u);  y = 2 Re(C h), B and C complex."""
    factor, held = continuous(p, torch.exp(p["gates.gates/delta.raw"]), 0)
    weights, output = p["projections.value.source.weight"], p["output"]
    states = weights.shape[1] // 2
    b = torch.complex(weights[:, :states], weights[:, states:])
    c = torch.complex(output[:states], -output[states:])
    h = unrolled(factor, held * (x.to(b.dtype) @ b))
    y = 2 * (h @ c).real
    last = h[:, -1]
    return y, {"dual.w": torch.cat([last.real, last.imag], dim=-1)[:, None, None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_s5(backend: str) -> None:
    hold("s5", s5, backend, length=70)
