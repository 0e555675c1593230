"""The tokens that softmax attention keeps, and the checked tensors of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archspec.kernels.dplr.decay import sum_dtype


class KvCache(NamedTuple):
    """The tokens a later query may still see, oldest first.

    Args:
        keys: [B, S, HK, K].
        values: [B, S, HV, V].
        log_decay: sum of g over the tokens after each stored one [B, S, HO], in fp64 where the device has it; None
            without decay.
    """

    keys: Tensor
    values: Tensor
    log_decay: Tensor | None


class AttentionInputs(NamedTuple):
    """Tensors of a softmax_attention call: q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], g [B, T, HO] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None

    @property
    def num_heads(self) -> int:
        """HO, the number of heads of the output."""
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2])

    def at(self, tokens: slice) -> AttentionInputs:
        """Return the inputs of some tokens."""
        return AttentionInputs(*(None if x is None else x[:, tokens] for x in self))  # type: ignore[arg-type]


FORGOTTEN = -1e4
"""Log decays are raised to this: no softmax sees the difference to -inf, and sums of it can be subtracted."""


def extend(inputs: AttentionInputs, cache: KvCache | None) -> KvCache:
    """Return the cache with the inputs' tokens appended, nothing dropped."""
    log_decay = None
    if inputs.g is not None:
        sums = inputs.g.clamp(min=FORGOTTEN).to(sum_dtype(inputs.g)).cumsum(1)
        log_decay = sums[:, -1:] - sums
        if cache is not None and cache.log_decay is not None:
            log_decay = torch.cat([cache.log_decay + sums[:, -1:], log_decay], dim=1)
    if cache is None:
        return KvCache(inputs.k, inputs.v, log_decay)
    return KvCache(torch.cat([cache.keys, inputs.k], 1), torch.cat([cache.values, inputs.v], 1), log_decay)


def trim(cache: KvCache, window: int | None) -> KvCache:
    """Return what the next token may see of a cache: with a window, its last window - 1 tokens."""
    if window is None or cache.keys.shape[1] < window:
        return cache
    kept = slice(cache.keys.shape[1] - window + 1, None)
    return KvCache(*(None if x is None else x[:, kept] for x in cache))  # type: ignore[arg-type]


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, S, heads, d] with each head repeated for the output heads that it serves."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)
