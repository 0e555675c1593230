"""How a block of queries reads the tokens that it sees: all by their softmax weights, the best of them, or a fit."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.softmax.chunked import attend_under


def read_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor,
    top_k: int | None = None,
    ridge: Tensor | None = None,
) -> Tensor:
    """Return what queries [B, H, Q, K] read of tokens [B, H, S, K] and [B, H, S, V] under a mask or bias.

    Args:
        bias: what is seen [Q, S], or what is added to the scores [B, H, Q, S].
        top_k: read the tokens with this many highest scores only; None is all.
        ridge: fit a plane around each query, with this ridge [B, H, Q, 1 or K]; None fits a constant.

    Returns:
        [B, H, Q, V] in value's dtype.
    """
    if top_k is None and ridge is None:
        return attend_under(query, key, value, scale, bias=bias)
    dtype = state_dtype(value)
    query, key, stored = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = scale * query @ key.transpose(-1, -2)
    scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[..., -1:]
        # Scores that are equal but for rounding are ties, so that every order of sums reads the same tokens.
        slack = 64 * torch.finfo(scores.dtype).eps * (1 + least.abs())
        scores = scores.masked_fill(scores < least - slack, -torch.inf)
    weights = scores.softmax(-1)
    read = weights @ stored
    if ridge is not None:
        read = read + _slope(query, key, stored, weights, read, ridge)
    return read.to(value.dtype)


def _slope(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, mean: Tensor, ridge: Tensor) -> Tensor:
    """Return C_vk (C_kk + ridge)^-1 (q - kbar), the means and covariances those under the weights [B, H, Q, S].

    Keys enter by their distances from the mean of the block's: covariances do not see it, and lose fewer digits.
    """
    middle = key.mean(-2, keepdim=True)
    query, key = query - middle, key - middle
    center = weights @ key  # kbar, [B, H, Q, K]
    products = (key[..., :, None] * key[..., None, :]).flatten(-2)  # [B, H, S, K K]
    covariance = (weights @ products) - (center[..., :, None] * center[..., None, :]).flatten(-2)
    covariance = covariance.reshape(*center.shape, center.shape[-1])
    direction: Tensor = torch.linalg.solve(covariance + ridge.expand_as(query).diag_embed(), query - center)
    along = direction @ key.transpose(-1, -2) - (direction * center).sum(-1, keepdim=True)  # [B, H, Q, S]
    return (weights * along) @ value
