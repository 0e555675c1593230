"""Causal softmax attention in blocks of queries, in torch on any device.

Without window, decay or cache it is one call of torch's scaled_dot_product_attention, whose kernels never store the
T x T weights. Otherwise blocks of queries meet the stretch of keys that they may see, under a mask or a bias of one
block's size: memory grows with T times the window, not with T squared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from archspec.kernels.softmax.cache import AttentionInputs, KvCache, expand_heads, extend, trim

MIN_BLOCK, MAX_BLOCK = 128, 512
"""Queries at a time: about a window, since a block of Q queries computes Q + window - 1 scores for each."""


def softmax_attention_chunked(
    inputs: AttentionInputs, scale: float, window: int | None, cache: KvCache | None
) -> tuple[Tensor, KvCache]:
    """Run ``softmax_attention`` in blocks; arguments and results as ``softmax_attention_reference``."""
    T = inputs.q.shape[1]
    V = inputs.v.shape[-1]
    kept = extend(inputs, cache)
    S = kept.keys.shape[1]
    query, key, value = (_heads_first(x, inputs.num_heads) for x in (inputs.q, kept.keys, kept.values))
    value = pad(value, (0, max(0, key.shape[-1] - V)))  # the fused kernels want one head dim
    last = trim(kept, window)
    if window is not None and window >= S:
        window = None
    if window is None and S == T and inputs.g is None:
        o = attend_under(query, key, value, scale, causal=T > 1)
    else:
        sums = None if kept.log_decay is None else -kept.log_decay.transpose(1, 2)  # [B, HO, S], from the first token
        size = MAX_BLOCK if window is None else min(MAX_BLOCK, max(MIN_BLOCK, window))
        parts = []
        for start in range(0, T, size):
            rows = torch.arange(S - T + start, S - T + min(start + size, T), device=query.device)
            seen = slice(0 if window is None else max(0, S - T + start - window + 1), S - T + start + len(rows))
            bias = _bias(rows, seen, window, sums, query.dtype)
            parts.append(
                attend_under(query[:, :, start : start + size], key[:, :, seen], value[:, :, seen], scale, bias=bias)
            )
        o = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return o[..., :V].transpose(1, 2), last


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    return expand_heads(x, num_heads).transpose(1, 2)


def _bias(rows: Tensor, seen: slice, window: int | None, sums: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return which of the keys in ``seen`` each row sees, as a mask [Q, S'] or, with decay, a bias [B, HO, Q, S']."""
    columns = torch.arange(seen.start, seen.stop, device=rows.device)
    visible = columns <= rows[:, None]
    if window is not None:
        visible = visible & (columns > rows[:, None] - window)
    if sums is None:
        return None if len(rows) == 1 and window is None else visible
    bias = (sums[:, :, rows][..., None] - sums[:, :, None, seen]).to(dtype)
    return bias.masked_fill(~visible, -torch.inf)


def attend_under(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return softmax(scale q k^T + bias) v; the head dim of q and k is padded to v's where that is larger."""
    more = value.shape[-1] - key.shape[-1]
    if more > 0:
        query, key = pad(query, (0, more)), pad(key, (0, more))
    if scale <= 0:
        # torch masks before it scales: a factor below zero turns what is hidden into +inf, and zero into NaN.
        query, scale = query * scale, 1.0
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, scale=scale)
