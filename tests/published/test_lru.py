"""LRU (Orvieto et al. 2023): a linear recurrent unit in the complex plane, normalised by its decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .state_spaces import unrolled


def lru(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h = lambda h + sqrt(1 - |lambda|^2) (B u);  y = Re(C h), B and C complex."""
    nu, theta = p["gates.retention/gate.log_rate"].flatten(), p["gates.retention/phase.raw"].flatten()
    factor = torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta)))
    gamma = torch.sqrt(1 - factor.abs() ** 2)
    weights, output = p["projections.value.source.weight"], p["output"]
    states = weights.shape[1] // 2
    b = torch.complex(weights[:, :states], weights[:, states:])
    c = torch.complex(output[:states], -output[states:])
    h = unrolled(factor, gamma * (x.to(b.dtype) @ b))
    last = h[:, -1]
    return (h @ c).real, {"dual.w": torch.cat([last.real, last.imag], dim=-1)[:, None, None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lru(backend: str) -> None:
    hold("lru", lru, backend, length=70)
