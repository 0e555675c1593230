"""S5 (Smith et al. 2023): one diagonal state space for all channels, by zero-order hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import archspec

from .plain import Parameters, hold
from .state_spaces import unrolled


def s5(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h = exp(D A) h + (exp(D A) - 1) / A (B u);  y = 2 Re(C h) + skip u, B and C complex, D a step for each state."""
    delta = torch.exp(p["gates.retention/gate.inner.step.raw"]).flatten()
    a = torch.complex(-torch.exp(p["gates.retention/gate.log_rate"]), p["gates.retention/phase.inner.second.raw"])
    a = a.flatten()
    factor, held = torch.exp(delta * a), (torch.exp(delta * a) - 1) / a
    weights, output = p["projections.value.source.weight"], p["output_stages.0.weight"]
    states = weights.shape[1] // 2
    b = torch.complex(weights[:, :states], weights[:, states:])
    c = torch.complex(output[:states], -output[states:])
    h = unrolled(factor, held * (x.to(b.dtype) @ b))
    y = 2 * (h @ c).real + p["output_stages.1.weight"] * x
    last = h[:, -1]
    return y, {"dual.w": torch.cat([last.real, last.imag], dim=-1)[:, None, None]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_s5(backend: str) -> None:
    hold("s5", s5, backend, length=70)


def test_s5_starts_at_the_eigenvalues_of_hippo_n() -> None:
    """A - P P^T of HiPPO-LegS, with P_n = sqrt(n + 1/2): normal, its eigenvalues -1/2 +- i w_n."""
    layer: Any = archspec.compile("s5").layers[0]
    states = 256
    n = torch.arange(states, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    legs = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    normal = legs + (root[:, None] * root) / 2
    eigenvalues = torch.linalg.eigvals(normal)
    torch.testing.assert_close(eigenvalues.real, torch.full_like(n, -0.5), rtol=0, atol=1e-6)
    wanted = eigenvalues.imag.sort().values[states // 2 :]
    found = layer.mixer.get_parameter("gates.retention/phase.inner.second.raw").detach().flatten().double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    rate = layer.mixer.get_parameter("gates.retention/gate.log_rate")
    torch.testing.assert_close(rate.exp(), torch.full_like(rate, 0.5))
