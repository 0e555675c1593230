"""Normalisations over the last axis, as plain functions.

Statistics are taken in at least fp32 whatever the dtype of the input; the result has the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x / sqrt(||x||^2 + eps)."""
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps)."""
    wide = _wide(x)
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return weight * (x - mean) / sqrt(var + eps) + shift, var the biased variance."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * weight
    if shift is not None:
        normed = normed + shift
    return normed.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
