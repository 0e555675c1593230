"""The delta rule on a loss over a window of tokens, where a window's rows are its tokens' keys under one strength.

    S_t = A_t S - eta_t sum_{i = t-R+1}^{t} w_i k_i (p_i^T S* - v_i)^T,        o_t = S_t^T q_t

with a scalar A_t = e^{g_t}, and S* = A_t S_{t-1} (``decay_first``) or S_{t-1}. A chunk of C tokens reads and writes
n = C + R - 1 keys only. With E [C R, n] that says which key a row (t, i) has, G_t the sum of log decays up to token t,
R_t that sum when errors are read and W_t when the step is added (G itself, or G before the token's own decay), the
steps u of all rows solve a system that is triangular in blocks of a token,

    (I + L) u = E' (v - e^{R_t} p^T S_0),        E' = eta_t w_i E,    L = eta_t w_i e^{R_t - W_s} p_i^T k_j  for s < t

so that what is read, and what every key is written with in all, are n numbers a row times v - and p^T S_0. These
matrices are made for all chunks side by side; then chunks follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from archspec.errors import ShapeError
from archspec.kernels.backend import default_scale, resolve_backend, state_dtype
from archspec.kernels.delta.checks import check_shapes, run_heads
from archspec.kernels.delta.inputs import DecaySums, Order, check_order, decays_between, later_tokens
from archspec.kernels.delta.joint import joint_delta_rule
from archspec.kernels.dplr.decay import clamp_log_decay

_OP = "windowed_delta_rule"
ROWS, LONGEST = 32, 16  # rows C R of a chunk's system, and C at most; measured on a CPU


def windowed_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N H K"],
    v: Float[Tensor, "B N H V"],
    weights: Float[Tensor, "B N H"],
    step: Float[Tensor, "B T H"],
    g: Float[Tensor, "B T H"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "B H K V"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    *,
    read_key: Float[Tensor, "B N H K"] | None = None,
    order: Order = "decay_first",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"] | None]:
    """Run a linear memory whose token corrects what it predicts at the last R keys, R = N - T + 1, at once.

    The orders are those of ``delta_rule``; each token's step is taken at one state for its whole window.

    Source: the Omega rule on a matrix, arXiv:2505.23735 (Atlas).

    Args:
        q: queries of T tokens.
        k, v: keys and values of the R - 1 tokens before them, then their own.
        weights: w, what an error weighs in every window; zero for tokens that are not there.
        step: eta.
        g: natural log of the decay, at most zero, -inf to forget all; None for none.
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
        "q": (q, "B T H K"), "k": (k, "B N H K"), "v": (v, "B N H V"), "read_key": (reader, "B N H K"),
        "weights": (weights, "B N H"), "step": (step, "B T H"), "g": (g, "B T H"),
        "initial_state": (initial_state, "B H K V"),
    }  # fmt: skip
    sizes = check_shapes(_OP, shapes)
    check_order(_OP, order)
    if sizes["N"] < sizes["T"]:
        raise ShapeError(f"{_OP}: found {sizes['N']} keys for {sizes['T']} queries; required is one a query at least.")
    form, scale = resolve_backend(_OP, backend, v, has_triton=False), default_scale(scale, sizes["K"])
    if form == "reference" or (backend == "auto" and sizes["T"] == 1):
        length = sizes["N"] - sizes["T"] + 1
        key, value, read = (_windows(x, length) for x in (k, v, reader))
        beta = step[..., None] * weights.unfold(1, length, 1)
        more = (g, scale, initial_state, output_final_state, "reference")
        return joint_delta_rule(q, key, value, beta, *more, read_key=read, order=order)
    dtype = state_dtype(v)
    weighed, decay = weights[..., None].to(dtype), torch.zeros_like(step) if g is None else g
    given = (q * scale, step[..., None], decay[..., None], k, reader * weighed, v * weighed)

    def run(tokens: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        return _chunked(_Tokens(*tokens), state, order)

    o, last = run_heads(run, given, v, initial_state, sizes["K"])
    return o, last if output_final_state else None


def _windows(x: Tensor, length: int) -> Tensor:
    """Return the windows that end with every token, [B, T, H, R, d], of [B, T + R - 1, H, d]."""
    return x.unfold(1, length, 1).transpose(-1, -2)


class _Tokens(NamedTuple):
    """Tensors of M heads: q [M, T, K], step and g [M, T, 1]; k [M, N, K]; p [M, N, K] and v [M, N, V] as weighed."""

    q: Tensor
    step: Tensor
    g: Tensor
    k: Tensor
    p: Tensor
    v: Tensor


class _Chunk(NamedTuple):
    """One chunk of C tokens and n keys.

    q [M, C, K], times e^G; p [M, n, K]; k transposed [M, K, n]; total e^{G_C} [M, 1, 1]. What is read of the chunk's
    own writes, and what the keys are written with, are fixed [M, C + n, V] minus moving [M, C + n, n] times p S_0.
    """

    q: Tensor
    p: Tensor
    k: Tensor
    fixed: Tensor
    moving: Tensor
    total: Tensor


def _chunked(tokens: _Tokens, state: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Run it in chunks, as the module's docstring says."""
    outputs = []
    for chunk in _chunks(tokens, order):
        found = torch.baddbmm(chunk.fixed, chunk.moving, torch.bmm(chunk.p, state), alpha=-1)
        count = chunk.q.shape[1]
        outputs.append(torch.baddbmm(found[:, :count], chunk.q, state))
        state = torch.baddbmm(chunk.total * state, chunk.k, found[:, count:])
    return torch.cat(outputs, 1)[:, : tokens.q.shape[1]], state


def _chunks(tokens: _Tokens, order: Order) -> list[_Chunk]:
    """Prepare all chunks side by side, and cut them apart."""
    T, R = tokens.q.shape[1], tokens.k.shape[1] - tokens.q.shape[1] + 1
    C = min(T, LONGEST, max(1, ROWS // R))
    more = -T % C
    q, step, g, k, p, v = (pad(x, (0, 0, 0, more)) if more else x for x in tokens)
    q, step, g = (x.view(x.shape[0], -1, C, x.shape[-1]) for x in (q, step, g))  # [M, N, C, d]
    k, p, v = (x.unfold(1, C + R - 1, C).transpose(-1, -2) for x in (k, p, v))  # [M, N, n, d]
    decay = _Decay(clamp_log_decay(g, g.dtype).squeeze(-1), order)
    of_token = torch.arange(C, device=q.device).repeat_interleave(R)  # t of a row (t, i)
    key = of_token + torch.arange(R, device=q.device).repeat(C)
    has = torch.nn.functional.one_hot(key, C + R - 1).to(q.dtype)  # E [C R, n]

    def of_rows(x: Tensor) -> Tensor:
        return x.index_select(-1, of_token)

    strength = of_rows(step.squeeze(-1))  # [M, N, C R]
    gram = (p @ k.mT).index_select(-2, key).index_select(-1, key)
    system = gram * of_rows(of_rows(decay.errors * step).mT).mT
    right = torch.stack([strength, strength * of_rows(decay.entering)], dim=-1)  # [M, N, C R, 2]
    right = (right[..., None] * has[:, None]).flatten(-2)  # [M, N, C R, 2 n]
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    reads = (q @ k.mT).index_select(-1, key) * of_rows(decay.reads)
    mixed = torch.cat([reads, has.mT * of_rows(decay.leaving)[..., None, :]], dim=-2) @ solved  # [M, N, C + n, 2 n]
    fixed, moving = mixed.chunk(2, dim=-1)
    parts = (q * decay.kept[..., None], p, k.mT, fixed @ v, moving, decay.total)
    return [_Chunk(*chunk) for chunk in zip(*(x.unbind(1) for x in parts), strict=True)]


class _Decay:
    """Decays of chunks with log decays g [M, N, C].

    Attributes:
        errors: e^{R_t - W_s} for s < t [M, N, C, C], from writes to later errors; zero elsewhere.
        reads: e^{G_t - W_s} for s <= t [M, N, C, C], from writes to reads.
        entering: e^{R_t} [M, N, C], from the chunk's start to errors.
        kept: e^{G_t} [M, N, C], from there to reads.
        leaving: e^{G_C - W_s} [M, N, C], from writes to the chunk's end.
        total: e^{G_C} [M, N, 1, 1].
    """

    def __init__(self, g: Tensor, order: Order) -> None:
        sums, read, write = DecaySums.of(g, order)
        later = later_tokens(g.shape[-1], g.device)

        self.errors = decays_between(read, write, later, g.dtype)
        self.reads = decays_between(sums, write, later.triu(1), g.dtype)
        self.entering, self.kept = read.to(g.dtype).exp(), sums.to(g.dtype).exp()
        self.leaving = (sums[..., -1:] - write).to(g.dtype).exp()
        self.total = self.kept[..., -1:, None]
