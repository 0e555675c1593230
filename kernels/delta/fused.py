"""The (gated) delta rule as Triton kernels, forward and backward.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,        o_t = scale * S_t^T q_t

(Yang et al. 2024, arXiv:2406.06484; with decay, arXiv:2412.06464, equation 10). In a chunk with start state S_0, let
a_ts = k_t . (decay_ts k_s) for s < t. The errors that the steps see and what they write are

    e = (I + a Diag(beta))^{-1} r,      r = v - (k e^G) S_0,      u = beta e

and with core = (I + a Diag(beta))^{-1} a, e = r - core (beta r): only core [C, C] comes from the inverse, and the
identity's part stays exact. Given u, outputs and states are those of linear attention on (q, k, u).

Backward in time, with du = scores^T do + (k e^(G_C - G)) dS, y = du - core^T (beta du) is the gradient of beta r's
row, so that dv = beta y, dbeta = e . y, and dS collects q do^T - k (beta y)^T. The gradients of q, k and decays follow
chunk by chunk, in parallel, from the states at the chunks' starts and ends (`archspec.kernels.delta.gradients_fused`).
"""

# What autograd calls is untyped.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from archspec.kernels.delta.core_fused import chunk_cores, core_dtype
from archspec.kernels.delta.gradients_fused import _chunk_states, _delta_gradients
from archspec.kernels.delta.serial_fused import _delta_backward, _delta_forward
from archspec.kernels.direct import direct
from archspec.kernels.linear.call import Call, make_call, precision
from archspec.kernels.linear.channel_gradients_fused import channel_backward
from archspec.kernels.linear.channels_fused import Prepared, prepare_channels, takes_pairs
from archspec.kernels.linear.segments_fused import token_sums
from archspec.launches import (
    NO_GATE,
    ROW_GATE,
    TOKEN_GATE,
    WIDE_PRODUCTS_UP_TO,
    SweepConfig,
    delta_gradients_config,
    next_power_of_two,
    padded_rows,
    serial_config,
    states_config,
)


def _gate_kind(g: Tensor | None) -> int:
    return NO_GATE if g is None else TOKEN_GATE if g.ndim == 3 else ROW_GATE


def _serial_config(call: Call, v: Tensor, g: Tensor | None, *, reverse: bool) -> SweepConfig:
    return serial_config(
        call.K, call.V, v.element_size(), _gate_kind(g), call.N * call.HV, call.multiprocessors, reverse=reverse
    )


def _prepared(call: Call, q: Tensor, k: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Prepared | None:
    """Scale queries and keys to the chunks' ends under a decay per key channel."""
    return None if g is None or g.ndim == 3 else prepare_channels(call, q, k, g, cu_seqlens, read_keys=True)


def _forward_impl(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    sums = token_sums(call, g, cu_seqlens)
    made = _prepared(call, q, k, g, cu_seqlens)
    core, units = chunk_cores(call, k, beta, _gate_kind(g), sums, made, cu_seqlens)
    final = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    o, errors, writes = torch.empty_like(v), torch.empty_like(v), torch.empty_like(v)
    config = _serial_config(call, v, g, reverse=False)
    reads, k_read, k_write = (made.q, made.k_read, made.k) if made else (q, k, k)
    _delta_forward[(call.N * call.HV * -(-call.V // config.block),)](
        reads, k_read, k_write, v, beta, sums, made.decay if made else None, core, units,
        made.scores if made else None, initial_state, o, errors, writes, final, cu_seqlens, scale, call.T, call.rows,
        DY=call.K, DZ=call.V, BY=padded_rows(call.K), BZ=config.block, GATE=_gate_kind(g),
        HAS_START=initial_state is not None, PRECISION=precision(v),
        **call.sizes(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return o, final, errors, writes, core, units


def _backward_impl(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, errors: Tensor, writes: Tensor, core: Tensor,
    units: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    sums = token_sums(call, g, cu_seqlens)
    made = _prepared(call, q, k, g, cu_seqlens)
    config = _serial_config(call, v, g, reverse=True)
    blocks = -(-call.V // config.block)
    dv = torch.empty_like(v)
    d_initial = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    gradients = torch.empty(call.slots, call.HV, call.K, call.V, dtype=v.dtype, device=v.device)
    dbeta = torch.empty(blocks, *beta.shape, dtype=torch.float32, device=v.device)
    reads, k_read, k_write = (made.q, made.k_read, made.k) if made else (q, k, k)
    _delta_backward[(call.N * call.HV * blocks,)](
        reads, k_read, k_write, do, beta, sums, made.decay if made else None, core, units,
        made.scores if made else None, errors, dfinal, dv, dbeta, gradients, d_initial, cu_seqlens, scale, call.T,
        call.rows, DY=call.K, DZ=call.V, BY=padded_rows(call.K), BZ=config.block, GATE=_gate_kind(g),
        HAS_LAST=dfinal is not None, PRECISION=precision(v), **call.sizes(), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    states = _states(call, k_write, writes, g, sums, made, initial_state, cu_seqlens)
    dq, dk, dg = _key_gradients(call, q, k, do, writes, dv, g, sums, made, states, gradients, cu_seqlens, scale)
    return dq, dk, dv, dbeta.sum(0) if blocks > 1 else dbeta[0], dg, d_initial


def _states(
    call: Call, k_write: Tensor, writes: Tensor, g: Tensor | None, sums: Tensor | None, made: Prepared | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the state that every chunk starts from [slots, HV, K, V], in the inputs' dtype."""
    states = torch.empty(call.slots, call.HV, call.K, call.V, dtype=writes.dtype, device=writes.device)
    config = states_config(call.K, call.V, writes.element_size(), _gate_kind(g), call.N * call.HV, call.multiprocessors)
    blocks = -(-call.K // config.block) * -(-call.V // config.block)
    _chunk_states[(call.N * call.HV * blocks,)](
        k_write, writes, sums, made.decay if made else None, initial_state, states, cu_seqlens, call.T, call.rows,
        DY=call.K, DZ=call.V, BY=config.block, BZ=config.block, GATE=_gate_kind(g),
        HAS_START=initial_state is not None, PRECISION=precision(writes), **call.sizes(), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return states


def _key_gradients(
    call: Call, q: Tensor, k: Tensor, do: Tensor, writes: Tensor, dv: Tensor, g: Tensor | None, sums: Tensor | None,
    made: Prepared | None, states: Tensor, gradients: Tensor, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dg from the states and their gradients at the chunks' ends."""
    config = delta_gradients_config(call.K, q.element_size())
    blocks = -(-call.K // config.block)
    # Under a decay per channel the parts of k's gradient are scaled before they add up.
    pairs = made is None or takes_pairs(q)
    dq, dk = (torch.empty_like(q, dtype=torch.float32 if made else q.dtype) for _ in range(2))
    dk_write = torch.empty_like(dk) if made else None
    dg = torch.empty(call.slots, call.HV, call.K, dtype=torch.float32, device=q.device) if made else None
    if g is not None and made is None:
        dg = torch.empty(blocks, *g.shape, dtype=torch.float32, device=q.device)
    _delta_gradients[(call.slots * call.HV * blocks,)](
        made.q if made else q, made.k if made else k, made.k_read if made else None, do, writes, dv,
        None if made else g, sums, made.decay if made else None, states, gradients, dq, dk, dk_write, dg, cu_seqlens,
        scale, call.N, call.T, call.rows, K=call.K, V=call.V, BK=config.block, BV=config.block, GATE=_gate_kind(g),
        PAIRS=pairs, N_PADDED=next_power_of_two(call.N), PRECISION=precision(q), **call.sizes(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if dg is None or g is None:
        return dq, dk, torch.empty(0, dtype=torch.float32, device=q.device)
    if made is None or dk_write is None:
        return dq, dk, dg.sum(0) if blocks > 1 else dg[0]
    return channel_backward(
        call, q, k, writes, do, g, made.decay, dq, dk_write, dg, cu_seqlens, scale, erased=dv, read_cross=dk,
        has_pairs=pairs,
    )  # fmt: skip


@torch.library.custom_op("archspec::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state [N, HV, K, V], e and u [B, T, HV, V], cores [B, T, HV, C] and their units."""
    return _forward_impl(q, k, v, beta, g, initial_state, cu_seqlens, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    final = v.new_empty(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    core = k.new_empty(call.B, call.T, call.HV, call.chunk, dtype=core_dtype(k))
    units = final.new_empty(call.slots, call.HV)
    return torch.empty_like(v), final, torch.empty_like(v), torch.empty_like(v), core, units


@torch.library.custom_op("archspec::delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, errors: Tensor, writes: Tensor, core: Tensor,
    units: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dbeta, dg (empty without a gate) and the initial state's gradient."""
    return _backward_impl(do, dfinal, q, k, v, beta, g, initial_state, cu_seqlens, errors, writes, core, units, scale)


@_backward.register_fake
def _backward_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, errors: Tensor, writes: Tensor, core: Tensor,
    units: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    d_initial = v.new_empty(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    dg = d_initial.new_empty(0) if g is None else torch.empty_like(g, dtype=torch.float32)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return *gradients, torch.empty_like(beta, dtype=torch.float32), dg, d_initial


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, beta, g, initial_state, cu_seqlens, scale = inputs
    _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, *kept)
    ctx.scale, ctx.backward_form = scale, _backward


def _differentiate(ctx, do, dfinal, *_kept):  # type: ignore[no-untyped-def]
    v, g, initial_state = ctx.saved_tensors[2], ctx.saved_tensors[4], ctx.saved_tensors[5]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dbeta, dg, d_initial = ctx.backward_form(do, dfinal, *ctx.saved_tensors, ctx.scale)
    dg = None if g is None else dg
    return dq, dk, dv, dbeta, dg, None if initial_state is None else d_initial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


_direct = direct(_forward_impl, _backward_impl, _save, _differentiate)


def delta_rule_fused(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run the Triton form of `archspec.kernels.delta.delta_rule` for order "decay_first", one key and one strength.

    q and k are [B, T, HV, K]: one per value head. Matrix products take bf16 and fp16 inputs as they are and fp32
    inputs as tf32; the state is fp32. bf16 inputs with few key channels are served as fp32.
    """
    dtype = v.dtype
    if dtype == torch.bfloat16 and q.shape[-1] <= WIDE_PRODUCTS_UP_TO:
        q, k, v = q.float(), k.float(), v.float()
    gate = None if g is None else g.float().contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    run = _forward if torch.compiler.is_compiling() else _direct
    o, final, *_ = run(
        q.contiguous(), k.contiguous(), v.contiguous(), beta.float().contiguous(), gate, state, cu_seqlens, scale
    )
    return o.to(dtype), final if output_final_state else None
