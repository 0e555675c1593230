"""LRU (Orvieto et al. 2023): a linear recurrent unit in the complex plane, normalised by its decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import archspec

from .plain import Parameters, hold
from .state_spaces import gated_linear_unit, unrolled


def lru(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h = lambda h + gamma (B u);  y = Re(C h) + skip u, then GELU and GLU, B and C complex."""
    nu, theta = p["gates.retention/gate.log_rate"].flatten(), p["gates.retention/phase.raw"].flatten()
    factor = torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta)))
    gamma = torch.exp(p["gates.retention/gain.raw"].flatten())
    weights, output = p["projections.value.source.weight"], p["output_stages.0.weight"]
    states = weights.shape[1] // 2
    b = torch.complex(weights[:, :states], weights[:, states:])
    c = torch.complex(output[:states], -output[states:])
    h = unrolled(factor, gamma * (x.to(b.dtype) @ b))
    last = h[:, -1]
    y = (h @ c).real + p["output_stages.1.weight"] * x
    return gated_linear_unit(y, p, 3), {"dual.w": torch.cat([last.real, last.imag], dim=-1)[:, None, None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lru(backend: str) -> None:
    hold("lru", lru, backend, length=70)


def test_lru_starts_in_the_unit_disk_with_states_of_one_size() -> None:
    layer: Any = archspec.compile("lru").layers[1]
    rate, theta, gamma = (
        layer.mixer.get_parameter(f"gates.retention/{name}").detach().exp().flatten()
        for name in ("gate.log_rate", "phase.raw", "gain.raw")
    )
    radius = torch.exp(-rate)
    torch.testing.assert_close(gamma, torch.sqrt(1 - radius**2), rtol=1e-4, atol=1e-6)
    # Even over the disk: a quarter of the states lies within half the radius, and the angles are even over the circle.
    assert 0.15 < float((radius < 0.5).float().mean()) < 0.35
    assert 0.4 < float((theta < 3.14).float().mean()) < 0.6
    assert float(theta.max()) < 6.28
