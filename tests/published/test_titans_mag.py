"""Titans with memory as a gate (Behrouz et al. 2025, section 4.2), token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .titans import Attention, LongTermMemory


def memory_as_gate(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o = SWA([P || x]) M([P || x]), channel by channel; nothing is returned for P."""
    attention, memory = Attention(p, "of.0.", window=32), LongTermMemory(p, "of.1.", x.shape[0])
    learned = p["prefix"]
    tokens = [*(row.expand(x.shape[0], -1) for row in learned), *x.unbind(1)]
    outputs = [attention.token(token) * memory.token(token) for token in tokens]
    state = {f"of.0.{name}": kept for name, kept in attention.state().items()}
    state.update({f"of.1.{name}": kept for name, kept in memory.state().items()})
    return torch.stack(outputs[len(learned) :], dim=1), state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_titans_mag(backend: str) -> None:
    hold("titans_mag", memory_as_gate, backend)
