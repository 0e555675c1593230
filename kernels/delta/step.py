"""Decoding one token with the delta rule."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import default_scale
from archspec.kernels.delta.inputs import Order


def delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B HV V"],
    beta: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"],
    state: Float[Tensor, "B HV K V"],
    g: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"] | None = None,
    scale: float | None = None,
    write_beta: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"] | None = None,
    read_key: Float[Tensor, "B _ K"] | None = None,
    erase_key: Float[Tensor, "B _ K"] | None = None,
    order: Order = "decay_first",
) -> tuple[Float[Tensor, "B HV V"], Float[Tensor, "B HV K V"]]:
    """Advance the state by one token and read it: the recurrence of ``delta_rule`` without its time axis.

    Args:
        q, k, v, beta, g, scale, write_beta, read_key, erase_key, order: as in ``delta_rule``, of one token.
        state: S_{t-1}; its dtype is kept.

    Returns:
        o_t in v's dtype, and S_t.
    """
    HV = v.shape[1]
    dtype = state.dtype

    def key(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(HV // x.shape[1], dim=1).unsqueeze(-1)  # [B, HV, K, 1]

    def per_key(x: Tensor) -> Tensor:
        return x.to(dtype).unsqueeze(-1) if x.ndim == 3 else x.to(dtype)[..., None, None]

    writer = key(k)
    reader = writer if read_key is None else key(read_key)
    eraser = writer if erase_key is None else key(erase_key)
    alpha = None if g is None else per_key(g).exp()
    if alpha is not None and order == "decay_first":
        state = alpha * state
    predicted = reader.transpose(-1, -2) @ state  # [B, HV, 1, V]
    value = v.to(dtype).unsqueeze(-2)
    if write_beta is None and erase_key is None:
        step = per_key(beta) * writer * (value - predicted)
    else:
        step = per_key(beta if write_beta is None else write_beta) * writer * value
        step = step - per_key(beta) * eraser * predicted
    if alpha is not None and order == "together":
        state = alpha * state
    state = state + step
    if alpha is not None and order == "step_first":
        state = alpha * state
    o = default_scale(scale, q.shape[-1]) * (key(q).transpose(-1, -2) @ state).squeeze(-2)
    return o.to(v.dtype), state
