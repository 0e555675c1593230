"""The (gated) delta rule as Triton kernels, forward and backward.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,        o_t = scale * S_t^T q_t

(Yang et al. 2024, arXiv:2406.06484; with decay, arXiv:2412.06464, equation 10). In a chunk with start state S_0, let
a_ts = k_t . (decay_ts k_s) for s < t. The errors that the steps see and what they write are

    e = (I + a Diag(beta))^{-1} r,      r = v - (k e^G) S_0,      u = beta e

and with core = (I + a Diag(beta))^{-1} a, e = r - core (beta r): only core [C, C] comes from the inverse, and the
identity's part stays exact. Given u, outputs and states are those of linear attention on (q, k, u).

Backward in time, with du = scores^T do + (k e^(G_C - G)) dS, y = du - core^T (beta du) is the gradient of beta r's
row, so that dv = beta y, dbeta = e . y, and dS collects q do^T - k (beta y)^T. Given u and beta y, the gradients of q
and k are sweeps of linear attention: as readers

    dq = sweep(do, u, k),      dk = -sweep(beta y, u, k) without own pairs,           forward in time

and as the writer, in one sweep, dk = sweep(u, do, q) - sweep(u, beta y, k) without own pairs, backward in time.
The gate's gradient follows from them as in `archspec.kernels.linear.fused`.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.delta.cost import padded_rows, serial_config
from archspec.kernels.linear.cost import next_power_of_two, padded_dim, sweep_config
from archspec.kernels.linear.fused import (
    NO_GATE,
    ROW_GATE,
    TOKEN_GATE,
    Call,
    Prepared,
    Sums,
    boundary_shares,
    carried_shares,
    channel_backward,
    channel_scores,
    chunk_sums,
    launch_sweep,
    make_call,
    precision,
    prepare_channels,
    row_sums,
    segment_starts,
    token_backward,
    token_sums,
)
from archspec.kernels.tiles import (
    first_slot,
    level_pairs,
    load_rows,
    load_sums,
    pair_decay,
    seen_pairs,
    sequence_bounds,
    slot_chunk,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "N", "total_rows"])
def _delta_core(
    k, beta, g, scores, core, cu_seqlens, N, T, total_rows,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    """core = (I + a Diag(beta))^{-1} a of one chunk [B, T, HV, C], a strictly lower triangular.

    The inverse is built by joining blocks: with X the inverse of the diagonal blocks of width w, that of the blocks
    of width 2w is X - X N X, where N is what joins them. Unlike a power series this does not cancel for like keys.
    """
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        rows = tl.arange(0, C)
        own = rows < length - row
        pairs = tl.zeros([C, C], tl.float32)
        if GATE == 2:
            at = scores + (start * HV + i_h) * C
            pairs += load_rows(at, row, length, HV * C, rows, C, C, True).to(tl.float32)
        else:
            EVEN: tl.constexpr = K % BK == 0
            for i_k in range((K + BK - 1) // BK):
                cols = i_k * BK + tl.arange(0, BK)
                tile_k = load_rows(k + (start * HV + i_h) * K, row, length, HV * K, cols, C, K, EVEN)
                pairs += tl.dot(tile_k, tl.trans(tile_k), input_precision=PRECISION)
            if GATE == 1:
                sums, _ = load_sums(g + i_h * total_rows + start, row, length, C)
                pairs *= pair_decay(sums, False, C)
        pairs = tl.where(seen_pairs(False, True, C), pairs, 0.0)
        strength = tl.load(beta + (start + row + rows) * HV + i_h, mask=own, other=0.0).to(tl.float32)
        join = pairs * strength[None, :]
        inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0) - tl.where(level_pairs(1, C), join, 0.0)
        for level in tl.static_range(1, 8):
            if 2**level < C:
                between = tl.where(level_pairs(2**level, C), join, 0.0)
                right = tl.dot(between, inverse, input_precision=INVERSE_PRECISION)
                inverse -= tl.dot(inverse, right, input_precision=INVERSE_PRECISION)
        result = tl.dot(inverse, pairs, input_precision=INVERSE_PRECISION)
        store_rows(core + (start * HV + i_h) * C, result, row, length, HV * C, rows, C, C, True)


@triton.jit(do_not_specialize=["T", "total_rows"])
def _delta_forward(
    q, k_read, k_write, v, beta, g, decay, core, scores, first_state, out, errors, writes, last_state, cu_seqlens,
    scale, T, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_START: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one sequence and block of value channels: outputs, errors e and writes u [B, T, HV, V], last state.

    u is rounded once, here: sums of it cancel, so whatever finds states again must add the very same numbers.
    """
    BLOCKS: tl.constexpr = (DZ + BZ - 1) // BZ
    i_nh, i_z = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    rows, cols_y, cols_z = tl.arange(0, C), tl.arange(0, BY), i_z * BZ + tl.arange(0, BZ)
    EVEN_Y: tl.constexpr = DY == BY
    EVEN_Z: tl.constexpr = DZ % BZ == 0
    key_offset, value_offset = (start * HV + i_h) * DY, (start * HV + i_h) * DZ
    pair_offset = (start * HV + i_h) * C
    slot = first_slot(start, i_n, T, C, PACKED)
    state = tl.zeros([BY, BZ], tl.float32)
    state_at = tl.cast(i_nh, tl.int64) * (DY * DZ) + cols_y[:, None] * DZ + cols_z[None, :]
    state_keep = (cols_y < DY)[:, None] & (cols_z < DZ)[None, :]
    if HAS_START:
        state = tl.load(first_state + state_at, mask=state_keep, other=0.0)
    for chunk in range(tl.cdiv(length, C)):
        row = chunk * C
        tile_q = load_rows(q + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
        tile_k = load_rows(k_read + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
        tile_core = load_rows(core + pair_offset, row, length, HV * C, rows, C, C, True)
        tile_v = load_rows(v + value_offset, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        strength = tl.load(beta + (start + row + rows) * HV + i_h, mask=rows < length - row, other=0.0).to(tl.float32)
        dtype = tile_v.dtype
        rounded = state.to(dtype)
        predicted = tl.dot(tile_k, rounded, input_precision=PRECISION)
        cross = tl.dot(tile_q, rounded, input_precision=PRECISION)
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            read = tl.exp2(sums)[:, None]
            predicted *= read
            cross *= read
        rest = tile_v - predicted
        scaled = rest * strength[:, None]
        if dtype == tl.bfloat16:
            # With bf16's 8 bits here, strengths up to 2 bring errors of outputs to 0.0056; without, to 0.0046.
            found = rest - tl.dot(tile_core.to(tl.float32), scaled, input_precision="tf32")
        else:
            found = rest - tl.dot(tile_core, scaled.to(dtype), input_precision=PRECISION)
        store_rows(errors + value_offset, found, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        written = (found * strength[:, None]).to(dtype)
        store_rows(writes + value_offset, written, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        if GATE == 2:
            pairs = load_rows(scores + pair_offset, row, length, HV * C, rows, C, C, True)
        else:
            pairs = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION)
            if GATE == 1:
                pairs *= pair_decay(sums, False, C)
            else:
                pairs = tl.where(seen_pairs(False, False, C), pairs, 0.0)
            pairs = pairs.to(dtype)
        result = tl.dot(pairs, written, acc=cross, input_precision=PRECISION)
        store_rows(out + value_offset, result * scale, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        if GATE == 1:
            written = (written * tl.exp2(chunk_total - sums)[:, None]).to(dtype)
            state *= tl.exp2(chunk_total)
        if GATE == 2:
            tile_k = load_rows(k_write + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
            chunk_total = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(chunk_total)[:, None]
        state += tl.dot(tl.trans(tile_k), written, input_precision=PRECISION)
    tl.store(last_state + state_at, state, mask=state_keep)


@triton.jit(do_not_specialize=["T", "total_rows"])
def _delta_backward(
    q, k_read, k_write, do, beta, g, decay, core, scores, errors, last_gradient, dv, dbeta, first_gradient,
    cu_seqlens, scale, T, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_LAST: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back: writes u and dv = scale * beta y [B, T, HV, V], dbeta [blocks, B, T, HV] and dS at the start.

    The state's gradient is kept without the scale.
    """
    BLOCKS: tl.constexpr = (DZ + BZ - 1) // BZ
    i_nh, i_z = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    rows, cols_y, cols_z = tl.arange(0, C), tl.arange(0, BY), i_z * BZ + tl.arange(0, BZ)
    EVEN_Y: tl.constexpr = DY == BY
    EVEN_Z: tl.constexpr = DZ % BZ == 0
    key_offset, value_offset = (start * HV + i_h) * DY, (start * HV + i_h) * DZ
    pair_offset = (start * HV + i_h) * C
    slot = first_slot(start, i_n, T, C, PACKED)
    state = tl.zeros([BY, BZ], tl.float32)
    state_at = tl.cast(i_nh, tl.int64) * (DY * DZ) + cols_y[:, None] * DZ + cols_z[None, :]
    state_keep = (cols_y < DY)[:, None] & (cols_z < DZ)[None, :]
    if HAS_LAST:
        state = tl.load(last_gradient + state_at, mask=state_keep, other=0.0)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        chunk = chunks - 1 - step
        row = chunk * C
        tile_q = load_rows(q + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
        tile_k = load_rows(k_write + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
        tile_core = load_rows(core + pair_offset, row, length, HV * C, rows, C, C, True)
        tile_do = load_rows(do + value_offset, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        found = load_rows(errors + value_offset, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        own = rows < length - row
        at_token = (start + row + rows) * HV + i_h
        strength = tl.load(beta + at_token, mask=own, other=0.0).to(tl.float32)
        dtype = tile_do.dtype
        gradient = tl.dot(tile_k, state.to(dtype), input_precision=PRECISION)
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            gradient *= tl.exp2(chunk_total - sums)[:, None]
        if GATE == 2:
            pairs = tl.trans(load_rows(scores + pair_offset, row, length, HV * C, rows, C, C, True))
        else:
            pairs = tl.dot(tile_k, tl.trans(tile_q), input_precision=PRECISION)
            if GATE == 1:
                pairs *= pair_decay(sums, True, C)
            else:
                pairs = tl.where(seen_pairs(True, False, C), pairs, 0.0)
            pairs = pairs.to(dtype)
        gradient += tl.dot(pairs, tile_do, input_precision=PRECISION) * scale
        scaled = (gradient * strength[:, None]).to(dtype)
        gradient -= tl.dot(tl.trans(tile_core.to(dtype)), scaled, input_precision=PRECISION)
        at_beta = tl.cast(i_z, tl.int64) * total_rows * HV + at_token
        tl.store(dbeta + at_beta, tl.sum(found.to(tl.float32) * gradient, 1), mask=own)
        # Like u, rounded once: the sweeps for the keys' gradients find the same dS from it again.
        erased = (gradient * strength[:, None]).to(dtype)
        store_rows(dv + value_offset, erased, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        update = tile_do
        if GATE == 1:
            read = tl.exp2(sums)[:, None]
            update = (tile_do * read).to(dtype)
            erased = (erased * read).to(dtype)
            state *= tl.exp2(chunk_total)
        if GATE == 2:
            tile_k = load_rows(k_read + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
            chunk_total = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(chunk_total)[:, None]
        state += tl.dot(tl.trans(tile_q), update, input_precision=PRECISION) * scale
        state -= tl.dot(tl.trans(tile_k), erased, input_precision=PRECISION)
    tl.store(first_gradient + state_at, state, mask=state_keep)


def _gate_kind(g: Tensor | None) -> int:
    return NO_GATE if g is None else TOKEN_GATE if g.ndim == 3 else ROW_GATE


def _core_dtype(k: Tensor) -> torch.dtype:
    """Entries of core are of the size of k . k: fp16 holds them with three bits more than bf16."""
    return torch.float16 if k.dtype == torch.bfloat16 else k.dtype


def _core(
    call: Call, k: Tensor, beta: Tensor, g: Tensor | None, sums: Tensor | None, made: Prepared | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return core [B, T, HV, C] of every chunk."""
    scores = channel_scores(call, k, k, made.sums, cu_seqlens) if made else None
    core = torch.empty(call.B, call.T, call.HV, call.chunk, dtype=_core_dtype(k), device=k.device)
    _delta_core[(call.slots * call.HV,)](
        k, beta, sums, scores, core, cu_seqlens, call.N, call.T, call.rows, K=call.K, BK=min(64, padded_dim(call.K)),
        GATE=_gate_kind(g), N_PADDED=next_power_of_two(call.N), PRECISION=precision(k),
        INVERSE_PRECISION="tf32x3" if k.dtype == torch.float32 else "tf32", **call.sizes(), num_warps=4, num_stages=1,
    )  # fmt: skip
    return core


def _forward_impl(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    sums = token_sums(call, g, cu_seqlens)
    made = prepare_channels(call, q, k, g, cu_seqlens, read_keys=True) if g is not None and g.ndim == 4 else None
    core = _core(call, k, beta, g, sums, made, cu_seqlens)
    final = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    o, errors, writes = torch.empty_like(v), torch.empty_like(v), torch.empty_like(v)
    config = serial_config(call.K, call.V, v.element_size())
    reads, k_read, k_write = (made.q, made.k_read, made.k) if made else (q, k, k)
    _delta_forward[(call.N * call.HV * -(-call.V // config.block),)](
        reads, k_read, k_write, v, beta, sums, made.decay if made else None, core, made.scores if made else None,
        initial_state, o, errors, writes, final, cu_seqlens, scale, call.T, call.rows,
        DY=call.K, DZ=call.V, BY=padded_rows(call.K), BZ=config.block, GATE=_gate_kind(g),
        HAS_START=initial_state is not None, PRECISION=precision(v), **call.sizes(), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return o, final, errors, writes, core


def _backward_impl(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, errors: Tensor, writes: Tensor,
    core: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    sums = token_sums(call, g, cu_seqlens)
    made = prepare_channels(call, q, k, g, cu_seqlens, read_keys=True) if g is not None and g.ndim == 4 else None
    config = serial_config(call.K, call.V, v.element_size())
    blocks = -(-call.V // config.block)
    dv, d_initial = torch.empty_like(v), torch.empty_like(final)
    dbeta = torch.empty(blocks, *beta.shape, dtype=torch.float32, device=v.device)
    reads, k_read, k_write = (made.q, made.k_read, made.k) if made else (q, k, k)
    _delta_backward[(call.N * call.HV * blocks,)](
        reads, k_read, k_write, do, beta, sums, made.decay if made else None, core, made.scores if made else None,
        errors, dfinal, dv, dbeta, d_initial, cu_seqlens, scale, call.T, call.rows,
        DY=call.K, DZ=call.V, BY=padded_rows(call.K), BZ=config.block, GATE=_gate_kind(g),
        HAS_LAST=dfinal is not None, PRECISION=precision(v), **call.sizes(), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    dq, dk, dg = _key_gradients(
        call, q, k, do, g, sums, made, initial_state, final, dfinal, d_initial, writes, dv, cu_seqlens, scale
    )
    return dq, dk, dv, dbeta.sum(0) if blocks > 1 else dbeta[0], dg, d_initial


def _key_gradients(
    call: Call, q: Tensor, k: Tensor, do: Tensor, g: Tensor | None, sums: Tensor | None, made: Prepared | None,
    initial_state: Tensor | None, final: Tensor, dfinal: Tensor | None, d_initial: Tensor, writes: Tensor, dv: Tensor,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dg from three sweeps over what was written and its gradient."""
    decay = made.decay if made else None
    reads, k_read, k_write = (made.q, _read_keys(made), made.k) if made else (q, k, k)
    states, gradients, ratio = initial_state, None, -1.0 / scale
    starts = partial(segment_starts, call, g=sums, decay=decay, cu_seqlens=cu_seqlens)
    if call.plan.num_segments > 1 or dfinal is not None:
        gradients = starts(reads, do, end_state=dfinal, reverse=True, scale=1.0 / scale)
    if call.plan.num_segments > 1 and gradients is not None:
        states = starts(k_write, writes, end_state=initial_state, reverse=False)
        gradients.add_(starts(k_read, dv, end_state=None, reverse=True), alpha=ratio)

    def summed(w: Tensor) -> Sums | None:
        if g is None:
            return None
        return chunk_sums(call, w) if made else row_sums(call, w, blocks)

    blocks = -(-call.K // sweep_config(call.V, call.K, q.element_size(), call.plan.load).block)
    # k's two parts add up in fp32; under a decay per channel they are scaled before.
    sweep = partial(
        launch_sweep, call, cu_seqlens=cu_seqlens, g=sums, decay=decay, decay_columns=made is not None,
        pairs=made is None, transposed=True,
    )  # fmt: skip
    sums_q, sums_write, sums_read = summed(reads), summed(k_write), summed(k_read)
    dq = sweep(do, writes, k_write, states, scale=scale, sums=sums_q)
    # Without decay q do^T and k dv^T each grow along the sequence while their difference does not: one state.
    dk_write = sweep(
        writes, do, reads, gradients, scale=scale, sums=sums_write, reverse=True, wide=True,
        second=(dv, k_read), ratio=ratio,
    )  # fmt: skip
    base = None if made else dk_write
    dk = sweep(dv, writes, k_write, states, scale=-1.0, sums=sums_read, strict=True, base=base, wide=made is not None)
    if g is None or sums_write is None:
        return dq, dk, final.new_empty(0)
    boundaries = boundary_shares(call, states, final, gradients, d_initial, scale)
    sums_q = _joined(sums_q, sums_read)
    if made is None:
        return dq, dk, token_backward(call, g, boundaries, sums_q, sums_write, cu_seqlens)
    carried = carried_shares(call, boundaries, sums_q, sums_write, cu_seqlens)
    dq, dk_pairs, dg = channel_backward(call, q, k, writes, do, g, made.sums, dq, dk_write, carried, cu_seqlens, scale)
    dk, more, dg_more = channel_backward(
        call, k, k, writes, dv, g, made.sums, dk, None, None, cu_seqlens, -1.0, strict=True
    )
    return dq, (dk_pairs + dk + more).to(k.dtype), dg + dg_more


def _read_keys(made: Prepared) -> Tensor:
    """The keys scaled for reading, which `prepare_channels` made on request."""
    if made.k_read is None:
        raise ValueError("prepare_channels was called without read_keys")
    return made.k_read


def _joined(first: Sums | None, second: Sums | None) -> Sums:
    """Add what two sweeps left for the gate's gradient."""
    if first is None or second is None:
        raise ValueError("gate gradients need the sums of both sweeps")
    return Sums(first.w, first.kind, first.out + second.out)


@torch.library.custom_op("archspec::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state [N, HV, K, V], the errors e and writes u [B, T, HV, V], and core [B, T, HV, C]."""
    return _forward_impl(q, k, v, beta, g, initial_state, cu_seqlens, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    final = v.new_empty(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    core = k.new_empty(call.B, call.T, call.HV, call.chunk, dtype=_core_dtype(k))
    return torch.empty_like(v), final, torch.empty_like(v), torch.empty_like(v), core


@torch.library.custom_op("archspec::delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, errors: Tensor, writes: Tensor,
    core: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dbeta, dg (empty without a gate) and the initial state's gradient."""
    return _backward_impl(do, dfinal, q, k, v, beta, g, initial_state, cu_seqlens, final, errors, writes, core, scale)


@_backward.register_fake
def _backward_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, errors: Tensor, writes: Tensor,
    core: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = final.new_empty(0) if g is None else torch.empty_like(g, dtype=torch.float32)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return *gradients, torch.empty_like(beta, dtype=torch.float32), dg, torch.empty_like(final)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, beta, g, initial_state, cu_seqlens, scale = inputs
    _, final, errors, writes, core = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, final, errors, writes, core)
    ctx.scale, ctx.backward_form = scale, _backward


def _differentiate(ctx, do, dfinal, _derrors, _dwrites, _dcore):  # type: ignore[no-untyped-def]
    v, g, initial_state = ctx.saved_tensors[2], ctx.saved_tensors[4], ctx.saved_tensors[5]
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dbeta, dg, d_initial = ctx.backward_form(do, dfinal, *ctx.saved_tensors, ctx.scale)
    dg = None if g is None else dg
    return dq, dk, dv, dbeta, dg, None if initial_state is None else d_initial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The same without custom ops, whose bookkeeping takes longer on the host than small shapes on the device."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward_impl(*inputs)
        ctx.mark_non_differentiable(*output[2:])
        _save(ctx, inputs, output)
        ctx.backward_form = _backward_impl
        return output

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        return _differentiate(ctx, *gradients)


def delta_rule_fused(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run the Triton form of `archspec.kernels.delta.delta_rule` for order "decay_first", one key and one strength.

    q and k are [B, T, HV, K]: one per value head. Matrix products take bf16 and fp16 inputs as they are and fp32
    inputs as tf32; the state and the inverse are fp32.
    """
    gate = None if g is None else g.float().contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    run = _forward if torch.compiler.is_compiling() else _Direct.apply
    o, final, *_ = run(
        q.contiguous(), k.contiguous(), v.contiguous(), beta.float().contiguous(), gate, state, cu_seqlens, scale
    )
    return o, final if output_final_state else None
