"""Titans with memory as a layer (Behrouz et al. 2025, section 4.3), token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .titans import Attention, LongTermMemory


def memory_as_layer(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o = SWA(M([P || x])); nothing is returned for P."""
    memory, attention = LongTermMemory(p, "of.0.", x.shape[0]), Attention(p, "of.1.", window=32)
    learned = p["prefix"]
    tokens = [*(row.expand(x.shape[0], -1) for row in learned), *x.unbind(1)]
    outputs = [attention.token(memory.token(token)) for token in tokens]
    state = {f"of.0.{name}": kept for name, kept in memory.state().items()}
    state.update({f"of.1.{name}": kept for name, kept in attention.state().items()})
    return torch.stack(outputs[len(learned) :], dim=1), state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_titans_mal(backend: str) -> None:
    hold("titans_mal", memory_as_layer, backend)
