"""One token of a memory that solves its regression exactly: statistics decay and grow, the query solves for them."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities
from archspec.rule import Rule


def solve(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Advance H and S by one token and read: H = a H + b k k^T, S = a S + b k v^T, o = S^T (H + diag ridge)^-1 q."""
    key, value = token.key.transpose(-1, -2), token.value  # [B, H, K, 1], [B, H, 1, V]
    strength = token.gates["update.step_size"]
    alpha = (
        token.gates["retention.gate"].exp()
        if rule.retention.decay_gate is not None
        else torch.ones((), dtype=key.dtype, device=key.device)
    )
    covariance = alpha * state["covariance.w"] + strength * key @ key.transpose(-1, -2)
    dual = alpha * state["dual.w"] + strength * key @ value
    ridge = token.gates["update.ridge"].squeeze(-1).expand(*key.shape[:2], -1)  # [B, H, K]
    solution = rule.update.solve(  # type: ignore[attr-defined]
        lambda x: (covariance @ x.unsqueeze(-1)).squeeze(-1) + ridge * x, token.query.squeeze(2), ridge
    )
    read = solution.unsqueeze(-2) @ dual
    return rule.memory.finish(read, rule.dims).squeeze(2), {"dual.w": dual, "covariance.w": covariance}
