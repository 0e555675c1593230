"""Online (test-time trained) memories with gradients anchored at chunk starts (rule family N): the public ops.

Covers TTT, Titans, Yaad, deep linear attention and every memory network whose weights take gradient steps with
decay and momentum; for a nonlinear network the chunk size is part of the function, since it says where gradients
are taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import resolve_backend, state_dtype
from archspec.kernels.online.checks import Gate, build
from archspec.kernels.online.chunked import gate_axis, online_memory_chunked
from archspec.kernels.online.problem import (
    Error,
    Linear,
    Network,
    OnlineState,
    Order,
    Read,
    Reduce,
)
from archspec.kernels.online.reference import online_memory_reference
from archspec.kernels.online.step import online_memory_step_form

__all__ = ["Error", "Linear", "Network", "OnlineState", "online_memory", "online_memory_step", "start_state"]

_OP = "online_memory"


def online_memory(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    weights: Mapping[str, Float[Tensor, "B H _ _"]],
    *,
    network: Network,
    error: Error,
    step_size: Gate,
    chunk_size: int,
    log_decay: Gate | None = None,
    momentum: Gate | None = None,
    read_key: Float[Tensor, "B T H K"] | None = None,
    error_inputs: Mapping[str, Float[Tensor, "B T H ..."]] | None = None,
    order: Order = "together",
    reduce: Reduce = "sum",
    read: Read = "after",
    shares: Float[Tensor, " chunk"] | None = None,
    state: OnlineState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], OnlineState | None]:
    """Train a memory network while reading it: one gradient step a token, taken at the chunk's first weights.

    With A the weights at the last multiple of ``chunk_size`` tokens (undecayed), for every weight W

        G_t = J(A, k_t)^T error(M(A, k_t), v_t)                 J the Jacobian of M(A, k_t) in W
        S_t = mu_t S_{t-1} - theta_t G_t
        W_t = alpha_t W_{t-1} + S_t                             or alpha_t (W_{t-1} + S_t) for order="step_first"
        o_t = M(W_t, q_t)                                       or M(W_{t-1}, q_t) for read="before"

    and for reduce="mean", with no decay and no momentum, W_i = A - (1/i) sum_{j<=i} theta_j G_j, i counted from A;
    ``shares`` take the place of the 1/i.

    Sources: TTT, arXiv:2407.04620, sections 2.4 and 2.5; Titans, arXiv:2501.00663, equations 11 to 14, where our
    mu is eta, our theta is theta and our alpha is 1 - alpha; Miras, arXiv:2504.13173. A loss of two strengths
    (theta M(k) - gamma v) folds both into ``error`` and takes step_size 1.

    Args:
        q, k, v: queries, keys and values.
        weights: start weights by name, [B, H, d_in, d_out]; used when ``state`` is None. Differentiable.
        network: ``network(linear, x)`` computes M(W, x) for x [B, H, C, K], calling ``linear(name, x)``, which stands
            for x @ W, once for every weight; everything else in it is ordinary torch, token by token. An additive
            offset is a weight of d_in = 1 applied to ones.
        error: ``error(prediction, value, inputs)``, dl/dprediction token by token.
        step_size: theta: [B, T, H] for all weights, or by name, broadcastable to [B, T, H, d_in, d_out].
        chunk_size: tokens between anchors.
        log_decay: natural log of alpha, at most zero, -inf to forget all; like step_size.
        momentum: mu; like step_size. None means no momentum, S_t = -theta_t G_t.
        read_key: where the prediction inside the error is made, when not at the key.
        error_inputs: what else the error needs, each [B, T, H, ...]; it gets them as [B, H, C, ...].
        shares: c_1 ... c_C of a mean [chunk_size]; None for 1/i. The state then holds the sums since the anchor as its
            momentum.
        order, reduce, read: see above; "decay_first" and "together" coincide, A being undecayed.
        state: where an earlier call ended, in mid-chunk or not.
        output_final_state: whether to return the state after the last token.
        backend: "auto", "chunked" or "reference". The chunked form serves gates that vary along one axis of a
            weight at most (a step size along any one, decay and momentum along a common one); "auto" takes the
            reference for others.

    Returns:
        o in v's dtype, and the state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an option that is unknown, or that the backend or the reduction cannot serve.
    """
    problem, start = build(
        _OP,
        q,
        k,
        v,
        weights,
        state,
        network=network,
        error=error,
        step_size=step_size,
        chunk_size=chunk_size,
        log_decay=log_decay,
        momentum=momentum,
        read_key=read_key,
        error_inputs=error_inputs,
        order=order,
        reduce=reduce,
        read=read,
        shares=shares,
    )
    form = resolve_backend(_OP, backend, v, has_triton=False)
    if backend == "auto" and any(gate_axis(problem, name) is None for name in start.weights):
        form = "reference"
    o, end = (online_memory_reference if form == "reference" else online_memory_chunked)(problem, start)
    return o.transpose(1, 2).to(v.dtype), end if output_final_state else None


def online_memory_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    state: OnlineState,
    *,
    network: Network,
    error: Error,
    step_size: Gate,
    chunk_size: int,
    log_decay: Gate | None = None,
    momentum: Gate | None = None,
    read_key: Float[Tensor, "B H K"] | None = None,
    error_inputs: Mapping[str, Float[Tensor, "B H ..."]] | None = None,
    order: Order = "together",
    reduce: Reduce = "sum",
    read: Read = "after",
    shares: Float[Tensor, " chunk"] | None = None,
) -> tuple[Float[Tensor, "B H V"], OnlineState]:
    """Advance an online memory by one token and read it: ``online_memory`` without its time axis.

    Args:
        state: where the sequence stands; ``start_state`` begins one.
        q, k, v and the rest: as in ``online_memory``, of one token; gates [B, H], or by name, broadcastable to
            [B, H, d_in, d_out].

    Returns:
        o in v's dtype, and the state after the token.

    Raises:
        ShapeError, UnsupportedError: as ``online_memory``.
    """

    def timed(x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def gate(x: Gate) -> Gate:
        return timed(x) if isinstance(x, Tensor) else {name: timed(y) for name, y in x.items()}

    problem, start = build(
        "online_memory_step",
        timed(q),
        timed(k),
        timed(v),
        state.weights,
        state,
        network=network,
        error=error,
        step_size=gate(step_size),
        chunk_size=chunk_size,
        log_decay=None if log_decay is None else gate(log_decay),
        momentum=None if momentum is None else gate(momentum),
        read_key=None if read_key is None else timed(read_key),
        error_inputs={name: timed(x) for name, x in (error_inputs or {}).items()},
        order=order,
        reduce=reduce,
        read=read,
        shares=shares,
    )
    o, end = online_memory_step_form(problem, start)
    return o.squeeze(2).to(v.dtype), end


def start_state(weights: Mapping[str, Float[Tensor, "B H _ _"]], *, momentum: bool) -> OnlineState:
    """Return the state before the first token: start weights, an anchor there and, with momentum or shares, zeros."""
    started = {name: x.to(state_dtype(x)) for name, x in weights.items()}
    buffers = {name: torch.zeros_like(x) for name, x in started.items()} if momentum else None
    return OnlineState(started, started, buffers, 0)
