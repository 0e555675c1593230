"""The DPLR rule in chunkwise form, in torch on any device: engine.py's recurrence with a's sign turned."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.dplr.engine import chunk_recurrence
from archspec.kernels.dplr.inputs import DplrInputs


def heads_first(x: Tensor) -> Tensor:
    """Return [B, T, H, ...] as [B * H, T, ...]; a tensor without further axes gains one of size 1."""
    x = x.unsqueeze(-1) if x.ndim == 3 else x
    return x.transpose(1, 2).flatten(0, 1)


def run_engine(
    q: Tensor,
    a: Tensor,
    b: Tensor,
    k: Tensor | None,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call ``chunk_recurrence`` for tensors in the boundary's layout [B, T, HV, ...], R rows a token after HV.

    Returns:
        o [B, T, HV, V] in v's dtype and the last state [B, HV, K, V].
    """
    (B, _, HV), V, K = v.shape[:3], v.shape[-1], q.shape[-1]
    dtype = state_dtype(v)
    if initial_state is None:
        state = torch.zeros(B * HV, K, V, dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype).reshape(B * HV, K, V)
    o, state = chunk_recurrence(
        heads_first(q),
        heads_first(a),
        heads_first(b),
        None if k is None else heads_first(k),
        heads_first(v),
        None if g is None else heads_first(g),
        state,
    )
    return o.view(B, HV, *o.shape[1:]).transpose(1, 2).to(v.dtype), state.view(B, HV, K, V)


def dplr_chunked(inputs: DplrInputs, scale: float, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the recurrence of ``dplr_rule`` in chunks; arguments and results as ``dplr_reference``."""
    q, k, v, a, b, g = inputs
    dtype = state_dtype(v)
    return run_engine(q.to(dtype) * scale, -a.to(dtype), b, k, v, g, initial_state)
