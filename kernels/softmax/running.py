"""Softmax attention whose scores do not depend on who reads: a running average, in a state of constant size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.linear import linear_attention


class Statistics(NamedTuple):
    """What is kept of all tokens so far, in at least fp32.

    Args:
        maximum: m, the largest score [B, H]; -inf before the first token.
        weight: u = sum_j exp(s_j - m) [B, H].
        value: w = sum_j exp(s_j - m) v_j [B, H, V].
    """

    maximum: Tensor
    weight: Tensor
    value: Tensor


def running_attention(
    scores: Tensor, values: Tensor, before: Statistics, backend: str = "auto"
) -> tuple[Tensor, Statistics]:
    """Return o_t = sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j) for all t, and the statistics after the last.

    With m_t the running maximum, (w_t, u_t) = exp(m_{t-1} - m_t) (w_{t-1}, u_{t-1}) + exp(s_t - m_t) (v_t, 1): linear
    attention with one key channel.

    Source: Aaren (arXiv:2405.13956), section 3; the statistics, arXiv:1805.02867.

    Args:
        scores: s [B, T, H].
        values: v [B, T, H, V].
        before: the statistics of the tokens before.

    Returns:
        o [B, T, H, V] in v's dtype.
    """
    dtype = state_dtype(values)
    scores, wide = scores.to(dtype), values.to(dtype)
    reached = torch.cat([before.maximum[:, None], scores], dim=1).cummax(1).values  # [B, T + 1, H]
    maximum, faded = reached[:, 1:], reached[:, :-1]
    # Before the first token there is nothing to fade: its -inf would be subtracted from others in the kernel.
    log_decay = torch.where(torch.isinf(faded), torch.zeros_like(faded), faded - maximum)
    key = (scores - maximum).exp().unsqueeze(-1)
    both = torch.cat([wide, torch.ones_like(wide[..., :1])], dim=-1)
    start = torch.cat([before.value, before.weight.unsqueeze(-1)], dim=-1).unsqueeze(2)  # [B, H, 1, V + 1]
    read, final = linear_attention(
        torch.ones_like(key), key, both, log_decay, 1.0, start, output_final_state=True, backend=backend
    )
    if final is None:
        raise AssertionError("a kernel that was asked for its final state returned none")
    after = Statistics(maximum[:, -1], final[:, :, 0, -1], final[:, :, 0, :-1])
    return (read[..., :-1] / read[..., -1:]).to(values.dtype), after
