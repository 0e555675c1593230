"""The delta rule with several errors a token, taken at the same weights and stepped along together.

A loss that sums over a window of tokens (the Omega rule) is the case: each token brings the keys of its whole window.
Where windows share products of their keys, windowed.py makes less of them; this form has any strengths and decays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import default_scale, resolve_backend, state_dtype
from archspec.kernels.delta.checks import check_shapes
from archspec.kernels.delta.inputs import Order, check_order
from archspec.kernels.dplr.chunked import run_engine
from archspec.kernels.dplr.decay import clamp_log_decay
from archspec.kernels.dplr.inputs import expand_gate, expand_heads

_OP = "joint_delta_rule"


def joint_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H R K"],
    v: Float[Tensor, "B T HV R V"],
    beta: Float[Tensor, "B T HV R"] | Float[Tensor, "B T HV R K"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "B HV K V"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    *,
    read_key: Float[Tensor, "B T H R K"] | None = None,
    order: Order = "decay_first",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "B HV K V"] | None]:
    """Run a linear memory whose token corrects what it predicts at R keys at once.

    With A_t = Diag(exp g_t) and read keys p (k unless given), the step is taken at one state for all R rows,

        D_t(S) = -sum_r beta_tr k_tr (p_tr^T S - v_tr^T)

    and the orders are those of ``delta_rule``: A S + D(A S), A S + D(S) or A (S + D(S)). A row of strength zero does
    nothing. In chunks of C tokens the errors of all C R rows solve one system, triangular in blocks of R.

    Source: the Omega rule on a matrix, arXiv:2505.23735 (Atlas).

    Args:
        q: queries; each of the H heads serves HV / H value heads.
        k: the keys of every token's rows.
        v: their values; HV is a multiple of H.
        beta: strength of every row, or of every key channel of it.
        g: natural log of the decay, at most zero: [HV], [B, T, HV], [B, T, HV, K], or None for no decay.
        scale: factor on the read-out; K**-0.5 when None.
        initial_state: S_0; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        backend: "auto", "chunked" or "reference"; there is no Triton kernel. "auto" takes single tokens by the loop.
        read_key: the keys that the predictions are read at.
        order: when the decay happens.

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an unknown order, or a backend that cannot serve these tensors.
    """
    reader = k if read_key is None else read_key
    shapes: dict[str, tuple[Tensor | None, str]] = {
        "q": (q, "B T H K"), "k": (k, "B T H R K"), "v": (v, "B T HV R V"),
        "beta": (beta, "B T HV R K" if beta.ndim == 5 else "B T HV R"), "read_key": (reader, "B T H R K"),
        "initial_state": (initial_state, "B HV K V"),
    }  # fmt: skip
    sizes = check_shapes(_OP, shapes, {"g": g})
    check_order(_OP, order)
    form = resolve_backend(_OP, backend, v, has_triton=False)
    compute = _reference if form == "reference" or (backend == "auto" and sizes["T"] == 1) else _chunked
    query, key, read = (expand_heads(x, sizes["HV"]) for x in (q, k, reader))
    rows = _Rows(query, key, v, beta, expand_gate(_OP, g, sizes), read)
    o, state = compute(rows, default_scale(scale, sizes["K"]), initial_state, order)
    return o, state if output_final_state else None


class _Rows(NamedTuple):
    """Checked tensors with every head expanded: q [B, T, HV, K]; k, p [B, T, HV, R, K]; v [B, T, HV, R, V]; gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    p: Tensor


def _reference(rows: _Rows, scale: float, initial_state: Tensor | None, order: Order) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time: the oracle."""
    dtype = state_dtype(rows.v)
    q, k, v, beta, p = (x.to(dtype) for x in (rows.q, rows.k, rows.v, rows.beta, rows.p))
    B, T, HV, K = q.shape
    beta = beta.unsqueeze(-1) if beta.ndim == 4 else beta
    state = torch.zeros(B, HV, K, v.shape[-1], dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(T):
        alpha = torch.ones_like(state[..., :1])
        if rows.g is not None:
            alpha = rows.g[:, t].to(dtype).exp().reshape(B, HV, -1, 1)
        error = p[:, t] @ (alpha * state if order == "decay_first" else state) - v[:, t]  # [B, HV, R, V]
        step = -(beta[:, t] * k[:, t]).transpose(-1, -2) @ error
        state = alpha * (state + step) if order == "step_first" else alpha * state + step
        outputs.append(scale * (q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(rows.v.dtype), state


def _chunked(rows: _Rows, scale: float, initial_state: Tensor | None, order: Order) -> tuple[Tensor, Tensor]:
    """Run it in chunks: R terms a token of dplr's engine, decay on the reads or on the writes as delta/chunked says."""
    dtype = state_dtype(rows.v)
    q, b, v, beta, a = (x.to(dtype) for x in (rows.q, rows.k, rows.v, rows.beta, rows.p))
    if beta.ndim == 4:
        a, v = beta.unsqueeze(-1) * a, beta.unsqueeze(-1) * v
    else:
        b = beta * b
    if rows.g is not None and order != "together":
        alpha = clamp_log_decay(rows.g, dtype).to(dtype).exp()
        alpha = alpha[..., None, None] if alpha.ndim == 3 else alpha.unsqueeze(-2)
        a, b = (alpha * a, b) if order == "decay_first" else (a, alpha * b)
    o, state = run_engine(q * scale, a, b, None, v, rows.g, initial_state)
    return o.to(rows.v.dtype), state
