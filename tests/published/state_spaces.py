"""What S4D, S5, LRU and H3 share: a complex diagonal recurrence, written with complex numbers, and their last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .plain import Parameters, sigmoid


def continuous(p: Parameters, delta: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return exp(D A) and (exp(D A) - 1) / A for A = -exp(log_rate) + i pi w; ``axis`` holds the states."""
    real = -torch.exp(p["gates.retention/gate.log_rate"])
    imaginary = torch.pi * p["gates.retention/phase.inner.second.raw"]
    a = torch.complex(real, imaginary).flatten(axis)
    delta = delta.flatten(axis)
    return torch.exp(delta * a), (torch.exp(delta * a) - 1) / a


def unrolled(factor: Tensor, written: Tensor) -> Tensor:
    """Return h_t = factor h_{t-1} + written_t for written [B, T, ...]."""
    h, states = torch.zeros_like(written[:, 0]), []
    for t in range(written.shape[1]):
        h = factor * h + written[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


def gated_linear_unit(y: Tensor, p: Parameters, stage: int) -> Tensor:
    """Return (g W + b) sigmoid(g U + c) of g = GELU(y) = y / 2 (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3)))."""
    g = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    at = f"output_stages.{stage}"
    return (g @ p[f"{at}.weight"] + p[f"{at}.offset"]) * sigmoid(g @ p[f"{at}.gate_weight"] + p[f"{at}.gate_offset"])
