"""Causal softmax attention token by token over a growing or rolling store: the family's oracle.

Every token's read is the fold of (m, u, w), the running maximum, weighted sum of values and sum of weights, over the
stored tokens; o = u / w (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682).
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.dplr.decay import sum_dtype
from archspec.kernels.softmax.cache import AttentionInputs, KvCache, expand_heads


def softmax_attention_reference(
    inputs: AttentionInputs, scale: float, window: int | None, cache: KvCache | None
) -> tuple[Tensor, KvCache]:
    """Run the recurrence one token at a time.

    Returns:
        o [B, T, HO, V] in v's dtype, and the cache after the last token.
    """
    q, k, v, g = inputs
    g = None if g is None else g.to(sum_dtype(g))
    dtype = state_dtype(v)
    heads = inputs.num_heads
    query = expand_heads(q.to(dtype), heads)
    keys = k if cache is None else torch.cat([cache.keys, k], 1)
    values = v if cache is None else torch.cat([cache.values, v], 1)
    decays = None if g is None else g[:, :0] if cache is None else cache.log_decay  # [B, S, HO], growing
    old = keys.shape[1] - k.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        kept = slice(0 if window is None else max(0, old + t + 1 - window), old + t + 1)
        scores = scale * torch.einsum("bhk,bshk->bsh", query[:, t], expand_heads(keys[:, kept].to(dtype), heads))
        if g is not None and decays is not None:
            decays = torch.cat([decays + g[:, t : t + 1], torch.zeros_like(g[:, :1])], 1)
            decays = decays[:, kept.start - kept.stop :]
            scores = scores + decays.to(dtype)
        largest = scores.amax(1, keepdim=True)  # m
        weights = (scores - largest).exp()
        summed = torch.einsum("bsh,bshv->bhv", weights, expand_heads(values[:, kept].to(dtype), heads))  # u
        outputs.append(summed / weights.sum(1).unsqueeze(-1))
    num_kept = keys.shape[1] if window is None else min(window - 1, keys.shape[1])
    last = KvCache(*(None if x is None else x[:, x.shape[1] - num_kept :] for x in (keys, values, decays)))  # type: ignore[arg-type]
    return torch.stack(outputs, 1).to(v.dtype), last
