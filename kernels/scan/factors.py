"""What a state is multiplied by at each token."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(g: Tensor, phase: Tensor | None) -> Tensor:
    """Return exp(g + i phase), real without a phase; exactly zero for g = -inf."""
    size = g.exp()
    return size if phase is None else size * torch.polar(torch.ones_like(phase), phase)
