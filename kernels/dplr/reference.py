"""The diagonal plus low-rank (DPLR) rule token by token, over plain tensors: the family's oracle.

S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T and o_t = scale * S_t^T q_t (Peng et al. 2025,
RWKV-7, arXiv:2503.14456, equation 17, transposed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.dplr.inputs import DplrInputs


def dplr_reference(inputs: DplrInputs, scale: float, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time.

    Args:
        inputs: checked tensors, every head expanded: q, k, a, b [B, T, HV, K], v [B, T, HV, V], g.
        scale: factor on the read-out.
        initial_state: [B, HV, K, V], or None for zeros.

    Returns:
        o [B, T, HV, V] in v's dtype, and the last state [B, HV, K, V] in fp64 for fp64 inputs, else fp32.
    """
    q, k, v, a, b, g = inputs
    dtype = state_dtype(v)
    B, T, HV, V = v.shape
    state = torch.zeros(B, HV, q.shape[-1], V, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(T):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t].to(dtype), state)
        if g is not None:
            state = g[:, t].to(dtype).exp().reshape(B, HV, -1, 1) * state
        state = state + torch.einsum("bhk,bhv->bhkv", b[:, t].to(dtype), read)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t].to(dtype), v[:, t].to(dtype))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(dtype), state))
    return torch.stack(outputs, 1).to(v.dtype), state
