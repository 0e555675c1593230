"""Linear attention with diagonal decay, token by token over plain tensors: the family's oracle.

S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t (Katharopoulos et al. 2020, arXiv:2006.16236,
equations 18 to 20, without its normaliser; with a decay per key channel, Yang et al. 2023, arXiv:2312.06635,
equation 3). Written independently of the model's own recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        g: log decay [B, T, HV] or [B, T, HV, K], or None.
        scale: factor on the read-out.
        initial_state: [B, HV, K, V], or None for zeros.

    Returns:
        o [B, T, HV, V] in v's dtype, and the last state [B, HV, K, V] in fp64 for fp64 inputs, else fp32.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    dtype = state_dtype(v)
    groups = HV // H
    query = q.to(dtype).repeat_interleave(groups, dim=2)  # [B, T, HV, K]
    key = k.to(dtype).repeat_interleave(groups, dim=2)
    value = v.to(dtype)
    state = torch.zeros(B, HV, K, V, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if g is not None:
            alpha = g[:, t].to(dtype).exp()  # [B, HV] or [B, HV, K]
            state = state * alpha.reshape(B, HV, -1, 1)
        state = state + key[:, t, :, :, None] * value[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outputs, 1).to(v.dtype), state
