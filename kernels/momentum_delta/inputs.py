"""Checked tensors of one momentum_delta_rule call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from archspec.kernels.delta.inputs import Order

__all__ = ["MomentumDeltaInputs", "MomentumDeltaState", "Order"]


class MomentumDeltaState(NamedTuple):
    """What passes from one stretch of tokens to the next: the weights S and the momentum P, both [B, HV, K, V]."""

    weights: Tensor
    momentum: Tensor


class MomentumDeltaInputs(NamedTuple):
    """Tensors of a momentum_delta_rule call with every head expanded to HV.

    Args:
        q, k: [B, T, HV, K].
        v: [B, T, HV, V].
        step: theta, [B, T, HV] or [B, T, HV, K].
        momentum: mu, [B, T, HV].
        g: log decay [B, T, HV], or None.
        write_step: strength of the write where it differs from the erasure's; like step.
        read_key: where the prediction is read, [B, T, HV, K]; None stands for k.
        erase_key: along which key it is erased, [B, T, HV, K]; None stands for k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    momentum: Tensor
    g: Tensor | None
    write_step: Tensor | None
    read_key: Tensor | None
    erase_key: Tensor | None
