"""Linear attention with diagonal decay (rule family L): the public ops.

Covers linear attention, RetNet and Lightning attention (constant decay per head), Mamba-2 and mLSTM (a scalar decay
per token), GLA and HGRN2 (a decay per key channel).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from archspec.errors import ShapeError
from archspec.kernels.backend import (
    check_cu_seqlens,
    check_floating,
    check_groups,
    check_shape,
    default_scale,
    packed_bounds,
    resolve_backend,
    run_packed,
)
from archspec.kernels.linear.chunked import linear_attention_chunked
from archspec.kernels.linear.reference import linear_attention_reference
from archspec.kernels.linear.step import linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]

_OP = "linear_attention"


def linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"] | None]:
    """Attend linearly, with an optional diagonal decay of the state.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,        o_t = scale * S_t^T q_t

    Sources: arXiv:2006.16236, equations 18 to 20 (no normaliser here); with decay, arXiv:2312.06635, equation 3.
    The papers write the gate alpha = exp(g).

    Args:
        q, k: queries and keys; each of the H heads serves HV / H value heads.
        v: values; HV is a multiple of H.
        g: natural log of the decay, at most zero, -inf to forget all: [HV] constant per head, [B, T, HV] per token,
            [B, T, HV, K] per key channel, or None for no decay.
        scale: factor on the read-out; K**-0.5 when None.
        initial_state: S_0 for each sequence; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] offsets of N sequences packed along T, with B = 1.
        backend: "auto", "triton", "chunked" or "reference".

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: a backend that cannot serve these tensors.
    """
    sizes: dict[str, int] = {}
    check_shape(_OP, "q", q, "B T H K", sizes)
    check_shape(_OP, "k", k, "B T H K", sizes)
    check_shape(_OP, "v", v, "B T HV V", sizes)
    check_groups(_OP, sizes["H"], sizes["HV"])
    sizes["N"] = check_cu_seqlens(_OP, cu_seqlens, sizes["B"])
    if initial_state is not None:
        check_shape(_OP, "initial_state", initial_state, "N HV K V", sizes)
    check_floating(_OP, v.device, q=q, k=k, v=v, g=g, initial_state=initial_state)
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ShapeError(f"{_OP}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; one dtype is required.")
    if sizes["T"] < 1:
        raise ShapeError(f"{_OP}: T=0; at least one token is required.")
    g = _expand_gate(g, sizes)
    scale = default_scale(scale, sizes["K"])
    if scale == 0.0:
        raise ShapeError(f"{_OP}: scale=0.0 makes every output zero; leave it out for K**-0.5.")
    form = resolve_backend(_OP, backend, v, {"key_dim": sizes["K"], "value_dim": sizes["V"]})
    if form == "triton":
        from archspec.kernels.linear.fused import linear_attention_fused

        return linear_attention_fused(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    run = linear_attention_chunked if form == "chunked" else linear_attention_reference
    if cu_seqlens is None:
        o, state = run(q, k, v, g, scale, initial_state)
        return o, state if output_final_state else None

    def one(n: int, at: slice) -> tuple[Tensor, Tensor | None]:
        start = None if initial_state is None else initial_state[n : n + 1]
        o, state = run(q[:, at], k[:, at], v[:, at], None if g is None else g[:, at], scale, start)
        return o, state if output_final_state else None

    return run_packed(packed_bounds(_OP, cu_seqlens, sizes["T"]), one)


def _expand_gate(g: Tensor | None, sizes: dict[str, int]) -> Tensor | None:
    """Check g's shape and expand a constant decay per head to [B, T, HV] without copying."""
    if g is None:
        return None
    letters = {1: "HV", 3: "B T HV", 4: "B T HV K"}.get(g.ndim)
    if letters is None:
        raise ShapeError(
            f"{_OP}: g has shape {list(g.shape)}; required is [HV], [B, T, HV] or [B, T, HV, K] with "
            f"{', '.join(f'{a}={sizes[a]}' for a in ('B', 'T', 'HV', 'K'))}."
        )
    check_shape(_OP, "g", g, letters, sizes)
    if g.dtype not in (torch.float64, torch.float32):
        g = g.float()
    return g.expand(sizes["B"], sizes["T"], sizes["HV"]) if g.ndim == 1 else g
