"""The delta rule token by token, over plain tensors: the family's oracle.

Schlag et al. 2021 (arXiv:2102.11174, equation 24) and, with decay, Yang et al. 2024 (arXiv:2412.06464, equation 10),
transposed. Written independently of the chunkwise form and of the model's own recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.delta.inputs import DeltaInputs, Order


def delta_rule_reference(
    inputs: DeltaInputs, scale: float, initial_state: Tensor | None, order: Order
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time.

    Args:
        inputs: checked tensors, every head expanded.
        scale: factor on the read-out.
        initial_state: [B, HV, K, V], or None for zeros.
        order: when the decay happens.

    Returns:
        o [B, T, HV, V] in v's dtype, and the last state [B, HV, K, V] in fp64 for fp64 inputs, else fp32.
    """
    dtype = state_dtype(inputs.v)
    q, k, v, beta = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
    B, T, HV, K = q.shape
    write_beta = beta if inputs.write_beta is None else inputs.write_beta.to(dtype)
    read_key = k if inputs.read_key is None else inputs.read_key.to(dtype)
    erase_key = k if inputs.erase_key is None else inputs.erase_key.to(dtype)
    state = torch.zeros(B, HV, K, v.shape[-1], dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(T):
        alpha = torch.ones_like(state[..., :1])
        if inputs.g is not None:
            alpha = inputs.g[:, t].to(dtype).exp().reshape(B, HV, -1, 1)
        seen = alpha * state if order == "decay_first" else state
        predicted = torch.einsum("bhk,bhkv->bhv", read_key[:, t], seen)
        erased = torch.einsum("bhk,bhv->bhkv", beta[:, t].reshape(B, HV, -1) * erase_key[:, t], predicted)
        written = torch.einsum("bhk,bhv->bhkv", write_beta[:, t].reshape(B, HV, -1) * k[:, t], v[:, t])
        step = written - erased
        state = alpha * (state + step) if order == "step_first" else alpha * state + step
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1).to(inputs.v.dtype), state
