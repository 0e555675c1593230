"""The checked tensors of one delta_rule call, and how they are cut along time."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from archspec.errors import UnsupportedError, unknown
from archspec.kernels.dplr.decay import sum_dtype

Order = Literal["decay_first", "together", "step_first"]
"""Whether a token decays the memory before its step, in one sum with it, or after it."""


def check_order(op: str, order: str) -> None:
    """Check that there is such an order.

    Raises:
        UnsupportedError: there is none.
    """
    if order not in get_args(Order):
        raise UnsupportedError(f"{op}: {unknown('order', order, get_args(Order))}")


class DecaySums(NamedTuple):
    """Sums of log decays inside chunks, [M, N, C, ..] each, in the precision that differences of them need.

    Up to a token (G), when its prediction is read (R) and when its step is added (W): G, or G before its own decay.
    """

    sums: Tensor
    read: Tensor
    write: Tensor

    @classmethod
    def of(cls, g: Tensor, order: Order) -> DecaySums:
        """Return the sums of clamped log decays g [M, N, C, ..]."""
        precise = g.to(sum_dtype(g))
        sums = precise.cumsum(2)
        earlier = sums - precise
        return cls(sums, sums if order == "decay_first" else earlier, earlier if order == "step_first" else sums)


def later_tokens(count: int, device: torch.device) -> Tensor:
    """Return which columns of [C, C] are no earlier than their rows."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu()


def decays_between(ends: Tensor, writes: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the decays e^(ends_t - writes_s) [.., C, C] of sums [.., C], zero where hidden."""
    return (ends[..., :, None] - writes[..., None, :]).to(dtype).masked_fill(hidden, -torch.inf).exp()


class DeltaInputs(NamedTuple):
    """Tensors of a delta_rule call with every key head expanded to HV.

    q, k, read_key, erase_key [B, T, HV, K]; v [B, T, HV, V]; beta, write_beta [B, T, HV] or [B, T, HV, K]; g log
    decay [B, T, HV] or [B, T, HV, K]. ``None`` stands for: k, for the two keys; beta, for write_beta; no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    write_beta: Tensor | None
    read_key: Tensor | None
    erase_key: Tensor | None

    def at(self, tokens: slice) -> DeltaInputs:
        """Return the inputs of some tokens."""
        return DeltaInputs(*(None if x is None else x[:, tokens] for x in self))  # type: ignore[arg-type]
