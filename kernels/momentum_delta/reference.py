"""The momentum delta rule, token by token: the specification that the chunkwise form is tested against.

Titans, arXiv:2501.00663, equations 9 and 10, for a matrix and the squared error. Written independently of the
model's own recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.momentum_delta.inputs import MomentumDeltaInputs, MomentumDeltaState, Order


def momentum_delta_reference(
    inputs: MomentumDeltaInputs, scale: float, order: Order, start: MomentumDeltaState
) -> tuple[Tensor, MomentumDeltaState]:
    """Run the rule of ``momentum_delta_rule`` one token at a time.

    Returns:
        o [B, T, HV, V] in v's dtype, and the state after the last token.
    """
    dtype = state_dtype(inputs.v)
    weights, moving = (x.to(dtype) for x in start)
    outputs = []

    def per_key(x: Tensor) -> Tensor:
        return x if x.ndim == 3 else x[..., None]

    for t in range(inputs.q.shape[1]):
        q, k, v, mu = (x[:, t].to(dtype) for x in (inputs.q, inputs.k, inputs.v, inputs.momentum))
        g, write_step, p, e = (
            None if x is None else x[:, t].to(dtype)
            for x in (inputs.g, inputs.write_step, inputs.read_key, inputs.erase_key)
        )
        step = per_key(inputs.step[:, t].to(dtype))
        written = k * (step if write_step is None else per_key(write_step))
        erased = (k if e is None else e) * step
        alpha = 1.0 if g is None else g.exp()[..., None, None]
        point = alpha * weights if order == "decay_first" else weights
        predicted = torch.einsum("bhk,bhkv->bhv", k if p is None else p, point)
        moving = mu[..., None, None] * moving
        moving = moving + torch.einsum("bhk,bhv->bhkv", written, v) - torch.einsum("bhk,bhv->bhkv", erased, predicted)
        weights = alpha * (weights + moving) if order == "step_first" else alpha * weights + moving
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q, weights))
    return torch.stack(outputs, 1).to(inputs.v.dtype), MomentumDeltaState(weights, moving)
