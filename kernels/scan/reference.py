"""The diagonal recurrence, token by token: the specification that the scan and the convolution are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_scan_reference(
    x: Tensor, g: Tensor, phase: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(g_t + i phase_t) h_{t-1} + x_t one token at a time.

    Args:
        x: [B, T, ...], complex where there is a phase.
        g, phase: [B or 1, T or 1, ...], broadcasting against x; phase or None.
        initial_state: h_0 [B, ...], or None for zeros.

    Returns:
        h [B, T, ...] and the last state [B, ...], in x's dtype.
    """
    state = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    states = []
    for t in range(x.shape[1]):
        factor = g[:, t if g.shape[1] > 1 else 0].exp()
        if phase is not None:
            angle = phase[:, t if phase.shape[1] > 1 else 0]
            factor = factor * torch.complex(angle.cos(), angle.sin())
        state = factor * state + x[:, t]
        states.append(state)
    return torch.stack(states, dim=1), state
