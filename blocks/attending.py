"""One token of a memory that stores tokens: keep one more key and value, read all that are kept by a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities
from archspec.rule import Rule


def attend(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Keep one more key and value, and read all that are kept: o = sum_j softmax_j(s q.k_j + G_t - G_j) v_j."""
    if rule.memory.cache == "statistics":  # type: ignore[attr-defined]
        return _average(rule, token, state)
    keys = torch.cat([state["keys"], token.key.transpose(1, 2)], dim=1)
    values = torch.cat([state["values"], token.value.transpose(1, 2)], dim=1)
    seen, kept = _sight(rule, position, keys.shape[1], keys.device)
    groups = rule.dims.num_heads // keys.shape[2]
    every_key, every_value = (x[:, seen].repeat_interleave(groups, dim=2) for x in (keys, values))
    after = {"keys": keys[:, kept], "values": values[:, kept]}
    bias = None
    if "log_decay" in state:
        # log_decay of a stored token is the sum of log(alpha) over the tokens after it.
        log_alpha = token.gates["retention.gate"][..., 0, 0].expand(keys.shape[0], -1)[:, None]  # [B, 1, H]
        sums = torch.cat([state["log_decay"] + log_alpha, torch.zeros_like(log_alpha)], dim=1)
        bias = sums[:, seen].transpose(1, 2)[:, :, None]
        after["log_decay"] = sums[:, kept]
    ridge = token.gates.get("update.fit.ridge")
    return regress(rule, token.query, every_key, every_value, bias, ridge).squeeze(2), after


def regress(
    rule: Rule, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, ridge: Tensor | None
) -> Tensor:
    """Return what queries read of stored tokens: kernel regression as the rule has it, written out.

    Args:
        query: [B, H, M, K]; keys: [B, S, H, K]; values: [B, S, H, V].
        bias: added to the scores, [B, H, M or 1, S].
        ridge: of an affine fit, [B or 1, H, 1 or K, 1].

    Returns:
        [B, H, M, V].
    """
    memory: Any = rule.memory
    scores = torch.einsum("bhmk,bshk->bhms", query, keys) * memory.temperature(rule.dims)
    if bias is not None:
        scores = scores + bias
    if memory.top_k is not None and memory.top_k < scores.shape[-1]:
        least = scores.topk(memory.top_k).values[..., -1:]
        # Scores that are equal but for rounding are ties, so that every order of sums reads the same tokens.
        slack = 64 * torch.finfo(scores.dtype).eps * (1 + least.abs())
        scores = scores.masked_fill(scores < least - slack, -torch.inf)
    weights = scores.softmax(-1)
    if ridge is not None:
        offset = keys.transpose(1, 2)[:, :, None] - query[:, :, :, None]  # z_j = k_j - q, [B, H, M, S, K]
        mean = torch.einsum("bhms,bhmsk->bhmk", weights, offset)
        moment = torch.einsum("bhms,bhmsk,bhmsl->bhmkl", weights, offset, offset)
        slope = torch.linalg.solve(moment + ridge.transpose(-1, -2).expand_as(mean).diag_embed(), mean)
        along = torch.einsum("bhmsk,bhmk->bhms", offset, slope)
        weights = weights * (1 - along) / (1 - (mean * slope).sum(-1, keepdim=True))
    return torch.einsum("bhms,bshv->bhmv", weights, values)


def _sight(rule: Rule, position: int, length: int, device: torch.device) -> tuple[slice, Tensor | slice]:
    """Return which of the stored tokens the one at ``position``, the last of them, sees, and which the next will."""
    memory: Any = rule.memory
    window = memory.window
    if window is None:
        return slice(None), slice(None)
    if not memory.sparse:
        return slice(max(0, length - window), None), slice(max(0, length - window + 1), None)
    # What is stored is what the token before could see, and itself: its places follow from how many there have been.
    far = {j for j in range(position + 1) if j < memory.sinks or (memory.stride and (j + 1) % memory.stride == 0)}
    stored = [j for j in range(position + 1) if j > position - window or j in far]
    kept = [index for index, j in enumerate(stored) if j > position + 1 - window or j in far]
    return slice(None), torch.tensor(kept, device=device, dtype=torch.long)


def _average(rule: Rule, token: Quantities, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Add one token to the running maximum, weight and weighted value of all; the read-out is their quotient."""
    groups = rule.dims.num_heads // token.key.shape[1]
    key, value = (x.squeeze(2).repeat_interleave(groups, dim=1) for x in (token.key, token.value))  # [B, H, d]
    score = (token.query.squeeze(2) * key).sum(-1) * rule.memory.temperature(rule.dims)  # type: ignore[attr-defined]
    maximum = torch.maximum(state["statistics.maximum"], score)
    faded, added = (state["statistics.maximum"] - maximum).exp(), (score - maximum).exp()
    weight = faded * state["statistics.weight"] + added
    total = faded[..., None] * state["statistics.value"] + added[..., None] * value
    after = {"statistics.maximum": maximum, "statistics.weight": weight, "statistics.value": total}
    return total / weight[..., None], after
