"""The plain torch forms that define the pieces around a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from archspec.kernels.backend import state_dtype


def short_convolution_reference(
    x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> Tensor:
    """y_t = act(sum_i w_i x_{t - W + 1 + i} + b), x before the first token from ``state``; sums in fp32 or fp64."""
    wide, width = state_dtype(x), weight.shape[-1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[-1]) if state is None else state
    padded = torch.cat([before.to(wide), x.to(wide)], dim=1)
    z = sum(padded[:, i : i + x.shape[1]] * weight[:, i].to(wide) for i in range(width))
    z = torch.as_tensor(z) if offset is None else z + offset.to(wide)
    return activated(activation, z).to(x.dtype)


def head_norm_reference(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float
) -> Tensor:
    """x / sqrt(sum or mean of squares + eps) over the last axis, times the weight, times act(gate)."""
    wide = x.to(state_dtype(x))
    square = wide.square()
    total = square.sum(-1, keepdim=True) if kind == "l2" else square.mean(-1, keepdim=True)
    y = wide * (total + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if gate is not None:
        y = y * activated(activation, gate.to(wide.dtype))
    return y.to(x.dtype)


def gated_product_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) up in up's dtype, computed in fp32 or fp64."""
    wide = state_dtype(up)
    return (activated(activation, gate.to(wide)) * up.to(wide)).to(up.dtype)


def log_decay_reference(z: Tensor, log_rate: Tensor, offset: Tensor | None) -> Tensor:
    """-exp(log_rate) softplus(z + offset) in fp32 or fp64."""
    wide = z.to(state_dtype(z))
    if offset is not None:
        wide = wide + offset.to(wide.dtype).reshape(wide.shape[-2:])
    return -log_rate.to(wide.dtype).exp() * functional.softplus(wide)


def activated(name: str, x: Tensor) -> Tensor:
    """Return the named function of x: ``none``, ``silu`` or ``sigmoid``."""
    if name == "none":
        return x
    return functional.silu(x) if name == "silu" else x.sigmoid()
