"""Decoding one token with the momentum delta rule."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import default_scale
from archspec.kernels.momentum_delta.inputs import MomentumDeltaState, Order


def momentum_delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B HV V"],
    step: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"],
    momentum: Float[Tensor, "B HV"],
    state: MomentumDeltaState,
    g: Float[Tensor, "B HV"] | None = None,
    scale: float | None = None,
    write_step: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"] | None = None,
    read_key: Float[Tensor, "B _ K"] | None = None,
    erase_key: Float[Tensor, "B _ K"] | None = None,
    order: Order = "together",
) -> tuple[Float[Tensor, "B HV V"], MomentumDeltaState]:
    """Advance the state by one token and read it: ``momentum_delta_rule`` without its time axis.

    Args:
        q, k, v and the rest: as in ``momentum_delta_rule``, of one token.
        state: S_{t-1} and P_{t-1}; their dtype is kept.

    Returns:
        o_t in v's dtype, and S_t and P_t.
    """
    HV = v.shape[1]
    dtype = state.weights.dtype

    def column(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(HV // x.shape[1], dim=1).unsqueeze(-1)  # [B, HV, K, 1]

    def gate(x: Tensor) -> Tensor:
        return x.to(dtype).unsqueeze(-1) if x.ndim == 3 else x.to(dtype)[..., None, None]

    writer = column(k)
    reader = writer if read_key is None else column(read_key)
    eraser = writer if erase_key is None else column(erase_key)
    weights, moving = state
    alpha = None if g is None else gate(g).exp()
    if alpha is not None and order == "decay_first":
        weights = alpha * weights
    predicted = reader.mT @ weights  # [B, HV, 1, V]
    value = v.to(dtype).unsqueeze(-2)
    if write_step is None and erase_key is None:
        increment = gate(step) * writer * (value - predicted)
    else:
        increment = gate(step if write_step is None else write_step) * writer * value
        increment = increment - gate(step) * eraser * predicted
    moving = gate(momentum) * moving + increment
    if alpha is not None and order == "together":
        weights = alpha * weights
    weights = weights + moving
    if alpha is not None and order == "step_first":
        weights = alpha * weights
    o = default_scale(scale, q.shape[-1]) * (column(q).mT @ weights).squeeze(-2)
    return o.to(v.dtype), MomentumDeltaState(weights, moving)
