"""Decoding one token with softmax attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import default_scale, state_dtype
from archspec.kernels.softmax.cache import FORGOTTEN, AttentionInputs, KvCache, expand_heads, extend, trim


def softmax_attention_step(
    q: Float[Tensor, "B HQ K"],
    k: Float[Tensor, "B HK K"],
    v: Float[Tensor, "B HV V"],
    cache: KvCache | None = None,
    g: Float[Tensor, " HO"] | Float[Tensor, "B HO"] | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Float[Tensor, "B HO V"], KvCache]:
    """Append one token to the cache and read it: ``softmax_attention`` without its time axis.

    Args:
        q, k, v, g, scale, window: as in ``softmax_attention``, of one token.
        cache: what earlier tokens left; None at the start of a sequence.

    Returns:
        o_t in v's dtype, and the cache for the next token.
    """
    gate = None if g is None else g.to(state_dtype(g)).expand(q.shape[0], g.shape[-1]).unsqueeze(1)
    inputs = AttentionInputs(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), gate)
    kept = trim(extend(inputs, cache), None if window is None else window + 1)
    heads = inputs.num_heads
    dtype = state_dtype(v)
    query = expand_heads(inputs.q.to(dtype), heads).transpose(1, 2)  # [B, HO, 1, K]
    keys, values = (expand_heads(x.to(dtype), heads).transpose(1, 2) for x in (kept.keys, kept.values))
    scores = default_scale(scale, q.shape[-1]) * (query @ keys.transpose(-1, -2))  # [B, HO, 1, S]
    if kept.log_decay is not None:
        scores = scores + kept.log_decay.clamp(min=FORGOTTEN).to(dtype).transpose(1, 2).unsqueeze(2)
    o = (torch.softmax(scores, dim=-1) @ values).squeeze(2)
    return o.to(v.dtype), trim(kept, window)
