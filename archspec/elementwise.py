"""The scan family's form: memories whose every entry decays and grows by itself, as one associative scan."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.kernels.scan import diagonal_scan, diagonal_scan_step
from archspec.rule import Rule

MIN_PIECE, PIECE_SCALARS = 16, 1 << 17


def scan(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = a_t o S_{t-1} + x_t entry by entry, x = w k v^T; under l2, only the diagonal implicit step is so.

    That step erases each entry by e k^2, e = eta / (1 + eta k . k), which its factor takes up: a (1 - e k^2).
    """
    start = initial_state(rule, quantities) if state is None else state
    dtype = quantities.state_dtype
    query, key = (x.to(dtype)[..., None] for x in (quantities.query, quantities.key))  # [B, T, H, K, 1]
    value = rule.memory.target(quantities.value).to(dtype)[..., None, :]
    name = "step_size" if rule.update.write_size is None else "write_size"
    strength = quantities.gates[f"update.{name}"].to(dtype)
    log_decay = quantities.gates.get("retention.gate")
    decay = torch.zeros_like(strength) if log_decay is None else log_decay.to(dtype)
    fresh = decay
    if rule.update.kind == "implicit":
        strength = strength / (1 + strength * key.square().sum(-2, keepdim=True))
        decay = decay + torch.log1p(-strength * key.square())
    if rule.retention.order == "step_first":
        strength = strength * fresh.exp()
    if key.shape[1] == 1:
        written = strength * key * value
        after = diagonal_scan_step(written[:, 0], decay[:, 0], start["dual.w"])
        read = torch.einsum("bthk,bthkv->bthv", query.squeeze(-1), after[:, None])
    else:
        after = start["dual.w"].contiguous()
        reads = []
        for tokens in _pieces(key.shape[1], after.numel()):
            written = (_at(strength, tokens) * key[:, tokens]) * value[:, tokens]
            states, after = diagonal_scan(written, _at(decay, tokens), None, after, backend)
            reads.append(torch.einsum("bthk,bthkv->bthv", query[:, tokens].squeeze(-1), states))
        read = torch.cat(reads, dim=1)
    return rule.memory.finish(read, rule.dims).to(quantities.query.dtype), {"dual.w": after}


def _pieces(length: int, size: int) -> list[slice]:
    """Cut a sequence so that the states of one piece, ``size`` scalars a token, stay in a processor's cache."""
    piece = min(length, max(MIN_PIECE, PIECE_SCALARS // size))
    return [slice(first, min(first + piece, length)) for first in range(0, length, piece)]


def _at(gate: Tensor, tokens: slice) -> Tensor:
    return gate[:, tokens] if gate.shape[1] > 1 else gate
