"""Decoding one token with the DPLR rule."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import default_scale


def dplr_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B HV V"],
    a: Float[Tensor, "B _ K"],
    b: Float[Tensor, "B _ K"],
    state: Float[Tensor, "B HV K V"],
    g: Float[Tensor, "B HV"] | Float[Tensor, "B HV K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B HV V"], Float[Tensor, "B HV K V"]]:
    """Advance the state by one token and read it: the recurrence of ``dplr_rule`` without its time axis.

    Args:
        q, k, v, a, b: one token's tensors; those with H heads serve HV / H value heads each.
        state: S_{t-1}; its dtype is kept.
        g: natural log of the decay, per head or per key channel.
        scale: factor on the read-out; K**-0.5 when None.

    Returns:
        o_t in v's dtype, and S_t.
    """
    HV = v.shape[1]
    query, key, reader, writer = (
        x.to(state.dtype).repeat_interleave(HV // x.shape[1], dim=1) for x in (q, k, a, b)
    )  # [B, HV, K]
    read = (reader.unsqueeze(-2) @ state).squeeze(-2)  # [B, HV, V]
    if g is not None:
        alpha = g.to(state.dtype).exp()
        state = state * (alpha.unsqueeze(-1) if alpha.ndim == 3 else alpha[..., None, None])
    state = state + writer.unsqueeze(-1) * read.unsqueeze(-2)
    state = state + key.unsqueeze(-1) * v.to(state.dtype).unsqueeze(-2)
    o = default_scale(scale, q.shape[-1]) * (query.unsqueeze(-2) @ state).squeeze(-2)
    return o.to(v.dtype), state
