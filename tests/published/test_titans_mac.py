"""Titans with memory as context (Behrouz et al. 2025, section 4.1), token by token, in segments of 32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .plain import Parameters, hold
from .titans import Attention, LongTermMemory

SEGMENT = 32


def memory_as_context(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """h_t = M*(q_t), M of the segment's start; y_t attends to P and to each h and x so far; o_t = y_t M_t*(y_t)."""
    memory = LongTermMemory(p, "memory.", x.shape[0])
    learned = p["attention.prefix"]
    start: dict[str, Tensor] = {}
    attention = Attention(p, "attention.")
    looked_up: dict[str, list[Tensor]] = {}
    outputs = []
    for t in range(x.shape[1]):
        token = x[:, t]
        if t % SEGMENT == 0:
            start, attention = dict(memory.w), Attention(p, "attention.")
            for row in learned:
                attention.token(row.expand(x.shape[0], -1))
        attention.token(memory.read(start, memory.project("query", token, looked_up), token))
        y = attention.token(token)
        outputs.append(y * memory.token(y))
    state = {f"memory.{name}": kept for name, kept in memory.state().items()}
    state.update({f"attention.{name}": kept for name, kept in attention.state().items()})
    state.update({f"start.dual.{name}": weight for name, weight in start.items()})
    state["lookup.layers.0.mixer.memory.query.conv"] = torch.stack(looked_up["query"], dim=1)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_titans_mac(backend: str) -> None:
    hold("titans_mac", memory_as_context, backend)
