"""The scan family's form: memories whose every entry decays and grows by itself, as one associative scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.kernels.scan import diagonal_scan, diagonal_scan_step
from archspec.layouts import reading_before
from archspec.rule import Rule

MIN_PIECE, PIECE_SCALARS = 16, 1 << 17


def scan(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = a_t o S_{t-1} + x_t entry by entry, x = w k v^T; under l2, only the diagonal implicit step is so.

    That step erases each entry by e k^2, e = eta / (1 + eta k . k), which its factor takes up: a (1 - e k^2).
    """
    return reading_before(rule, quantities, state, backend, _scan)


def _scan(rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str) -> tuple[Tensor, MemoryState]:
    start = initial_state(rule, quantities) if state is None else state
    dtype = quantities.state_dtype
    query, key = (x.to(dtype)[..., None] for x in (quantities.query, quantities.key))  # [B, T, H, K, 1]
    value = rule.memory.target(quantities.value).to(dtype)[..., None, :]
    name = "step_size" if rule.update.write_size is None else "write_size"
    strength = quantities.gates[f"update.{name}"].to(dtype)
    gates = {
        name: quantities.gates[f"retention.{name}"].to(dtype)
        for name in ("gate", "phase", "gain")
        if f"retention.{name}" in quantities.gates
    }
    pairs = _Pairs(rule.retention, gates) if rule.retention.turns else None
    decay = gates.get("gate", torch.zeros_like(strength))
    fresh = decay
    if rule.update.kind == "implicit":
        strength = strength / (1 + strength * key.square().sum(-2, keepdim=True))
        decay = decay + torch.log1p(-strength * key.square())
    phase = None
    if pairs is not None:
        decay, phase = pairs.decay, pairs.phase
    elif rule.retention.order == "step_first":
        strength = strength * fresh.exp()
    after = start["dual.w"].contiguous()
    reads = []
    for tokens in _pieces(key.shape[1], after.numel()):
        written = (_at(strength, tokens) * key[:, tokens]) * value[:, tokens]
        if pairs is not None:
            written, after = pairs.written(written, tokens, rule.retention.order), pairs.retention.to_complex(after)
        factors = _at(decay, tokens), None if phase is None else _at(phase, tokens)
        if key.shape[1] == 1:
            after = diagonal_scan_step(written[:, 0], factors[0][:, 0], after, _first(factors[1]))
            states = after[:, None]
        else:
            states, after = diagonal_scan(written, *factors, after, backend)
        if pairs is not None:
            states, after = pairs.retention.to_real(states), pairs.retention.to_real(after)
        reads.append(torch.einsum("bthk,bthkv->bthv", query[:, tokens].squeeze(-1), states))
    return rule.memory.finish(torch.cat(reads, dim=1), rule.dims).to(quantities.query.dtype), {"dual.w": after}


class _Pairs:
    """A complex decay on the axes of a weight: the log magnitude and angle of lambda, and what b makes of a write."""

    def __init__(self, retention: Any, gates: Mapping[str, Tensor]) -> None:
        self.retention = retention
        self.decay, self.phase, self.received = retention.polar(gates)

    def written(self, x: Tensor, tokens: slice, order: str) -> Tensor:
        """Return what some tokens add, as complex numbers."""
        found: Tensor = self.retention.to_complex(x)
        if self.received is not None:
            found = found * _at(self.received, tokens)
        return found * _at(torch.polar(self.decay.exp(), self.phase), tokens) if order == "step_first" else found


def _first(phase: Tensor | None) -> Tensor | None:
    return None if phase is None else phase[:, 0]


def _pieces(length: int, size: int) -> list[slice]:
    """Cut a sequence so that the states of one piece, ``size`` scalars a token, stay in a processor's cache."""
    piece = min(length, max(MIN_PIECE, PIECE_SCALARS // size))
    return [slice(first, min(first + piece, length)) for first in range(0, length, piece)]


def _at(gate: Tensor, tokens: slice) -> Tensor:
    return gate[:, tokens] if gate.shape[1] > 1 else gate
