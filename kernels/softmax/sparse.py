"""Causal softmax attention over a window and a thin set of older tokens, in torch on any device.

Older tokens stay when they are among the first ``sinks``, or when they end a group of ``stride`` tokens. Blocks of
queries meet the keys that any of them may see, under a mask: time and memory grow with T (window + T / stride).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from archspec.kernels.softmax.cache import AttentionInputs, KvCache, expand_heads, extend
from archspec.kernels.softmax.chunked import MAX_BLOCK, MIN_BLOCK
from archspec.kernels.softmax.reads import read_block


def sparse_attention(
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
    sinks: int,
    stride: int | None,
    cache: KvCache | None,
    position: int,
    top_k: int | None = None,
    ridge: Tensor | None = None,
) -> tuple[Tensor, KvCache]:
    """Attend to the last ``window`` tokens, the first ``sinks``, and every token j with (j + 1) % stride = 0.

        o_t = sum_j p_tj v_j,   p_t = softmax_j(scale q_t . k_j + sum_{j<i<=t} g_i)

    Sources: sinks, arXiv:2309.17453; strided tokens beside a window, arXiv:1904.10509.

    Args:
        inputs: q [B, T, HQ, K], k, v and g as in ``softmax_attention``.
        window: None sees all tokens.
        cache: what an earlier call returned; ``position``: how many tokens came before.
        top_k, ridge [B, T, H, 1 or K]: how the tokens that are seen are read, as in ``read_block``.

    Returns:
        o [B, T, HO, V] in v's dtype, and the tokens that later ones may see, oldest first.
    """
    length, heads, channels = inputs.q.shape[1], inputs.num_heads, inputs.v.shape[-1]
    device = inputs.q.device
    window = position + length + 1 if window is None else window  # the next token sees the first one too
    kept = extend(inputs, cache)
    before = _seen(position, position, window, sinks, stride, device)
    places = torch.cat([before, torch.arange(position, position + length, device=device)])  # of the stored tokens
    query, key, value = (expand_heads(x, heads).transpose(1, 2) for x in (inputs.q, kept.keys, kept.values))
    value = pad(value, (0, max(0, key.shape[-1] - channels)))
    sums = None if kept.log_decay is None else -kept.log_decay.transpose(1, 2)  # [B, HO, S]
    size = min(MAX_BLOCK, max(MIN_BLOCK, window))
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        own = torch.arange(len(before) + start, len(before) + stop, device=device)
        rows = places[own]
        seen = _seen(position + start, position + stop, window, sinks, stride, device)
        columns = torch.searchsorted(places, seen)
        visible = (seen <= rows[:, None]) & ((seen > rows[:, None] - window) | _lasts(seen, sinks, stride))
        bias = visible
        if sums is not None:
            faded = (sums[:, :, own][..., None] - sums[:, :, None, columns]).to(query.dtype)
            bias = faded.masked_fill(~visible, -torch.inf)
        block = query[:, :, start : start + size]
        own_ridge = None if ridge is None else ridge[:, start : start + size].transpose(1, 2)
        parts.append(read_block(block, key[:, :, columns], value[:, :, columns], scale, bias, top_k, own_ridge))
    o = torch.cat(parts, dim=2)[..., :channels].transpose(1, 2)
    now = position + length
    stay = torch.searchsorted(places, _seen(now, now, window, sinks, stride, device))
    return o, KvCache(*(None if x is None else x[:, stay] for x in kept))  # type: ignore[arg-type]


def _lasts(places: Tensor, sinks: int, stride: int | None) -> Tensor:
    """Return which tokens are seen from any distance."""
    found = places < sinks
    return found if stride is None else found | ((places + 1) % stride == 0)


def _seen(now: int, end: int, window: int, sinks: int, stride: int | None, device: torch.device) -> Tensor:
    """Return the places before ``end`` that the token at ``now``, or a later one, may see, in order.

    They are laid out from their bounds: to pick them by a mask, the host would have to wait for the device.
    """
    first = max(0, now - window + 1)  # of the window
    far = min(sinks, first)
    parts = [torch.arange(far, device=device)]
    if stride is not None:
        last = far + -(far + 1) % stride  # the first place from there on that ends a group
        parts.append(torch.arange(last, max(last, first), stride, device=device))
    return torch.cat([*parts, torch.arange(first, end, device=device)])
