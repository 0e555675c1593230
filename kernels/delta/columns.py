"""The delta rule with gates of value channels: columns of the state that decay and step each at its own rate.

    S_t = S_{t-1} A_t - k_t ((p_t^T S*) B_t - v_t^T C_t),        A, B, C diagonal over value channels, o_t = S_t^T q_t

with S* = S_{t-1} A_t (``decay_first``) or S_{t-1}. Columns share keys and queries and do not see each other. With G_t
the sum of log decays of a chunk up to token t, R_t that sum when the prediction is read and W_s when the step is added
(G itself, or G before the token's own decay, by the order), a chunk of start state S_0 has for every column

    u_t = c_t v_t - b_t e^{R_t} p_t^T S_0 - sum_{s<t} b_t e^{R_t - W_s} (p_t^T k_s) u_s
    o_t = e^{G_t} q_t^T S_0 + sum_{s<=t} e^{G_t - W_s} (q_t^T k_s) u_s
    S_C = e^{G_C} S_0 + sum_s e^{G_C - W_s} k_s u_s

Products of keys are of a head, factors and the triangular system of a column. As an affine map of S_0 a chunk would
have K numbers for every token and column, so chunks follow one another; their systems are inverted together. Every
exponent is of a decay between two tokens, at most zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from archspec.kernels.backend import default_scale, resolve_backend, state_dtype
from archspec.kernels.delta.checks import check_shapes, run_heads
from archspec.kernels.delta.inputs import DecaySums, Order, check_order, decays_between, later_tokens
from archspec.kernels.dplr.decay import clamp_log_decay

_OP = "column_delta_rule"
CHUNK = 8  # tokens; measured on a CPU, where every column has matrices of this size


def column_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H _"],
    g: Float[Tensor, "B T H _"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    *,
    write_beta: Float[Tensor, "B T H _"] | None = None,
    read_key: Float[Tensor, "B T H K"] | None = None,
    order: Order = "decay_first",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"] | None]:
    """Run ``delta_rule`` with strengths and decays that vary over value channels.

    Args:
        q, k, v: queries, keys and values.
        beta: strength of the step, per token [B, T, H, 1] or per value channel [B, T, H, V].
        g: natural log of the decay, at most zero, -inf to forget all; like beta. None for no decay.
        scale: factor on the read-out; K**-0.5 when None.
        initial_state: S_0; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        backend: "auto", "chunked" or "reference"; there is no Triton kernel. "auto" takes single tokens by the loop.
        write_beta: strength of the write where it differs from the erasure's; like beta.
        read_key: the key the prediction is read at.
        order: when the decay happens.

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an unknown order, or a backend that cannot serve these tensors.
    """
    reader = k if read_key is None else read_key
    shapes: dict[str, tuple[Tensor | None, str]] = {
        "q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T H V"), "read_key": (reader, "B T H K"),
        **{name: (x, _letters(x)) for name, x in (("beta", beta), ("g", g), ("write_beta", write_beta))},
        "initial_state": (initial_state, "B H K V"),
    }  # fmt: skip
    sizes = check_shapes(_OP, shapes)
    check_order(_OP, order)
    form = resolve_backend(_OP, backend, v, has_triton=False)
    dtype = state_dtype(v)
    written = v.to(dtype) * (beta if write_beta is None else write_beta).to(dtype)
    query = q.to(dtype) * default_scale(scale, sizes["K"])
    decay = torch.zeros_like(beta[..., :1], dtype=dtype) if g is None else clamp_log_decay(g.to(dtype), dtype)
    compute = _reference if form == "reference" or (backend == "auto" and sizes["T"] == 1) else _chunked

    def run(tokens: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return compute(_Columns(*tokens), state, order)

    o, state = run_heads(run, (query, k, reader, written, beta, decay), v, initial_state, sizes["K"])
    return o, state if output_final_state else None


def _letters(gate: Tensor | None) -> str:
    """Return the axes of a gate, of a head or of its value channels."""
    return "B T H 1" if gate is not None and gate.shape[-1:] == (1,) else "B T H V"


class _Columns(NamedTuple):
    """Tensors of M heads: q, k, p [M, T, K]; v [M, T, V], times its strength; beta, g [M, T, 1 or V]."""

    q: Tensor
    k: Tensor
    p: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor


def _reference(tokens: _Columns, state: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token at a time: the oracle."""
    outputs = []
    for query, key, reader, value, beta, g in zip(*(x[..., None, :].unbind(1) for x in tokens), strict=True):
        alpha = g.exp()  # [M, 1, 1 or V]
        seen = alpha * state if order == "decay_first" else state
        step = key.mT @ (value - beta * (reader @ seen))
        state = alpha * (state + step) if order == "step_first" else alpha * state + step
        outputs.append(query @ state)
    return torch.cat(outputs, 1), state


class _Chunk(NamedTuple):
    """One chunk of C tokens.

    q, p [M, C, K]; k transposed [M, K, C]; v [M, C, V]; decayed strengths b e^R, e^G and e^{G_C - W} [M, C, 1 or V] and
    e^{G_C} [M, 1, 1 or V]; the inverted system and the reads of writes [M, 1 or V, C, C].
    """

    q: Tensor
    p: Tensor
    k: Tensor
    v: Tensor
    predicted: Tensor
    entered: Tensor
    leaving: Tensor
    total: Tensor
    inverse: Tensor
    reads: Tensor


def _chunked(tokens: _Columns, state: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Run it in chunks, as the module's docstring says."""
    length = tokens.q.shape[1]
    outputs = []
    for chunk in _chunks(tokens, order):
        error = chunk.v - chunk.predicted * torch.bmm(chunk.p, state)
        error = _mixed(chunk.inverse, error)
        outputs.append(chunk.entered * torch.bmm(chunk.q, state) + _mixed(chunk.reads, error))
        state = torch.baddbmm(chunk.total * state, chunk.k, chunk.leaving * error)
    return torch.cat(outputs, 1)[:, :length], state


def _mixed(matrices: Tensor, x: Tensor) -> Tensor:
    """Return the products of every column's matrix [M, 1 or V, C, C] with the column of x [M, C, V]."""
    if matrices.shape[1] == 1:
        return torch.bmm(matrices[:, 0], x)
    return (matrices @ x.mT.unsqueeze(-1)).squeeze(-1).mT


def _chunks(tokens: _Columns, order: Order) -> list[_Chunk]:
    """Prepare all chunks side by side, and cut them apart."""
    length = tokens.q.shape[1]
    C = min(CHUNK, length)
    padded = (pad(x, (0, 0, 0, -length % C)) if length % C else x for x in tokens)
    q, k, p, v, beta, g = (x.view(x.shape[0], -1, C, x.shape[-1]) for x in padded)  # [M, N, C, d]
    sums, read, write = DecaySums.of(g, order)
    later = later_tokens(C, q.device)

    def between(ends: Tensor, hidden: Tensor) -> Tensor:
        """Return the decay from writes to reads of the same chunk [M, N, 1 or V, C, C]."""
        return decays_between(ends.mT, write.mT, hidden, g.dtype)

    system = between(read, later) * (p @ k.mT)[:, :, None] * beta.mT[..., None]
    eye = torch.eye(C, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    last = sums[:, :, -1:]
    parts = (
        q,
        p,
        k.mT,
        v,
        beta * read.to(g.dtype).exp(),
        sums.to(g.dtype).exp(),
        (last - write).to(g.dtype).exp(),
        last.to(g.dtype).exp(),
        inverse,
        between(sums, later.triu(1)) * (q @ k.mT)[:, :, None],
    )
    return [_Chunk(*chunk) for chunk in zip(*(x.unbind(1) for x in parts), strict=True)]
