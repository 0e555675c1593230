"""Linear attention with diagonal decay as Triton kernels, forward and backward.

The state stays in registers while a program walks its segment of a sequence chunk by chunk: no per-chunk state is
written. When there are too few heads to fill the device, sequences are cut into segments: `_segment_states` finds
what each segment adds to the state, `_scan_segments` chains them, and all segments then run side by side.

All four products of the family are one sweep over (x, y, z), ``out_i = sum_j decay_ij (x_i . y_j) z_j``:

    o  = sweep(q, k, v)     forward in time       dq = sweep(do, v, k)    forward in time
    dv = sweep(k, q, do)    backward in time      dk = sweep(v, do, q)    backward in time

A decay per key channel is prepared chunk by chunk in parallel (`_prepare_channel`): the pairs inside a chunk become
a C x C matrix of scores, and q, k are scaled to the chunk's ends, so that the sweep knows only a decay per chunk.

The gradient of the log decay at token t is the sum over all pairs (i, j) with j < t <= i of their share of the loss.
With D the same sum at a chunk's end, dg_t = D + sum over s >= t in the chunk of (q_s dq_s - k_s dk_s); D itself is
<S, dS> at a segment's end, followed through the chunks. The share of pairs inside a chunk enters dq and dk from
equally rounded factors, so it cancels exactly.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.cost import (
    Plan,
    gradients_config,
    next_power_of_two,
    padded_dim,
    plan,
    prepare_config,
    sweep_config,
)
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    first_slot,
    level_anchor,
    level_decay,
    level_pairs,
    level_pairs_transposed,
    load_rows,
    load_sums,
    pair_decay,
    segment_chunks,
    sequence_bounds,
    slot_chunk,
    store_rows,
)

# How the state decays: not, by a factor a token, or by a factor a chunk along its rows or columns.
NO_GATE, TOKEN_GATE, ROW_GATE, COLUMN_GATE = 0, 1, 2, 3
# What adds the pairs inside a chunk: nothing, the product x y^T, or scores computed before.
NO_PAIRS, OWN_PAIRS, GIVEN_PAIRS = 0, 1, 2
# What sums of w * out the sweep leaves for gate gradients: none, over columns, or over the chunk.
NO_SUMS, ROW_SUMS, CHUNK_SUMS = 0, 1, 2

_RUNTIME = ["T", "num_segments"]


@triton.jit
def _head_and_block(BLOCKS: tl.constexpr):
    """Split the first grid axis, the only one that may be long: sequence and head, then block; and all heads."""
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.num_programs(0) // BLOCKS


@triton.jit(do_not_specialize=["T", "N", "total_rows"])
def _sum_gates(
    g, sums_out, cu_seqlens, N, T, total_rows,
    HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr,
):  # fmt: skip
    """Inclusive sums inside a chunk of one log decay a token, in log2: [B, T, HV] -> [HV, rows]."""
    BLOCKS: tl.constexpr = (HV + BH - 1) // BH
    slot, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        heads = i_block * BH + tl.arange(0, BH)
        gates = load_rows(g + start * HV, row, length, HV, heads, C, HV, HV % BH == 0).to(tl.float32)
        sums = tl.cumsum(tl.maximum(gates * LOG2E, LOWEST_LOG2), 0)
        rows = tl.arange(0, C)
        at = sums_out + heads[None, :].to(tl.int64) * total_rows + start + row + rows[:, None]
        tl.store(at, sums, mask=(rows < length - row)[:, None] & (heads < HV)[None, :])


@triton.jit(do_not_specialize=[*_RUNTIME, "total_rows"])
def _segment_states(
    y, z, g, decay, states, totals, cu_seqlens, T, num_segments, total_rows,
    HV: tl.constexpr, GY: tl.constexpr, GZ: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr,
    BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what each segment adds to the state [segments, N*HV, DY, DZ] and its log2 decay, [.., DY] or [..]."""
    BLOCKS: tl.constexpr = ((DY + BY - 1) // BY) * ((DZ + BZ - 1) // BZ)
    i_nh, i_block, num_heads = _head_and_block(BLOCKS)
    i_s = tl.program_id(1) + 1 if REVERSE else tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    BLOCKS_Z: tl.constexpr = (DZ + BZ - 1) // BZ
    i_y, i_z = i_block // BLOCKS_Z, i_block % BLOCKS_Z
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    cols_y, cols_z = i_y * BY + tl.arange(0, BY), i_z * BZ + tl.arange(0, BZ)
    EVEN_Y: tl.constexpr = DY % BY == 0
    EVEN_Z: tl.constexpr = DZ % BZ == 0
    stride_y, stride_z = HV // GY * DY, HV // GZ * DZ
    y_base = y + (start * (HV // GY) + i_h // GY) * DY
    z_base = z + (start * (HV // GZ) + i_h // GZ) * DZ
    state = tl.zeros([BY, BZ], tl.float32)
    total = tl.zeros([BY], tl.float32) if GATE == 2 else tl.full((), 0.0, tl.float32)
    slot = first_slot(start, i_n, T, C, PACKED)
    for step in range(last - first):
        chunk = last - 1 - step if REVERSE else first + step
        row = chunk * C
        tile_y = load_rows(y_base, row, length, stride_y, cols_y, C, DY, EVEN_Y)
        tile_z = load_rows(z_base, row, length, stride_z, cols_z, C, DZ, EVEN_Z)
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            weight = tl.exp2(sums) if REVERSE else tl.exp2(chunk_total - sums)
            tile_z = (tile_z * weight[:, None]).to(tile_z.dtype)
            state *= tl.exp2(chunk_total)
            total += chunk_total
        if GATE == 2:
            chunk_total = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(chunk_total)[:, None]
            total += chunk_total
        state += tl.dot(tl.trans(tile_y), tile_z, input_precision=PRECISION)
    entry = tl.cast(i_s, tl.int64) * num_heads + i_nh
    at = states + entry * (DY * DZ) + cols_y[:, None] * DZ + cols_z[None, :]
    tl.store(at, state, mask=(cols_y < DY)[:, None] & (cols_z < DZ)[None, :])
    if GATE == 1 and i_block == 0:
        tl.store(totals + entry, total)
    if GATE == 2 and i_z == 0:
        tl.store(totals + entry * DY + cols_y, total, mask=cols_y < DY)


@triton.jit(do_not_specialize=["num_segments"])
def _scan_segments(
    states, totals, first_state, num_segments, scale,
    DY: tl.constexpr, DZ: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds into the state it starts from, in place; backward in time from its other end."""
    i_nh, i_block, num_heads = _head_and_block((DY * DZ + BLOCK - 1) // BLOCK)
    at = i_block * BLOCK + tl.arange(0, BLOCK)
    keep = at < DY * DZ
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        state = tl.load(first_state + tl.cast(i_nh, tl.int64) * (DY * DZ) + at, mask=keep, other=0.0) * scale
    for step in range(num_segments):
        i_s = num_segments - 1 - step if REVERSE else step
        entry = tl.cast(i_s, tl.int64) * num_heads + i_nh
        slot = states + entry * (DY * DZ) + at
        more = keep & (step < num_segments - 1)
        added = tl.load(slot, mask=more, other=0.0)
        tl.store(slot, state, mask=keep)
        if GATE == 1:
            state *= tl.exp2(tl.load(totals + entry, mask=step < num_segments - 1, other=0.0))
        if GATE == 2:
            state *= tl.exp2(tl.load(totals + entry * DY + at // DZ, mask=more, other=0.0))
        state += added


@triton.jit(do_not_specialize=[*_RUNTIME, "total_rows"])
def _sweep(
    x, y, z, g, decay, scores, states, out, last_state, w, sums_all, sums_cross, cu_seqlens,
    scale, T, num_segments, total_rows,
    HV: tl.constexpr, GXY: tl.constexpr, GZ: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr,
    BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, PAIRS: tl.constexpr, SUMS: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_START: tl.constexpr, HAS_LAST: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale * (x S + pairs z) with the state S [DY, BZ] in registers; S is kept without the scale.

    x, y: [rows, HV/GXY, DY]; z, w: [rows, HV/GZ, DZ]; out: [rows, HV, DZ]; states [segments, N*HV, DY, DZ] (or
    transposed). Sums for gate gradients: ROW_SUMS writes sum_d w out and its share through the state to
    [blocks, HV, rows]; CHUNK_SUMS writes sum_t w out per column to [slots, HV, DZ].
    """
    i_nh, i_z, num_heads = _head_and_block((DZ + BZ - 1) // BZ)
    i_s = tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    cols_y, cols_z = tl.arange(0, BY), i_z * BZ + tl.arange(0, BZ)
    EVEN_Y: tl.constexpr = DY == BY
    EVEN_Z: tl.constexpr = DZ % BZ == 0
    stride_xy, stride_z = HV // GXY * DY, HV // GZ * DZ
    xy_offset = (start * (HV // GXY) + i_h // GXY) * DY
    z_offset = (start * (HV // GZ) + i_h // GZ) * DZ
    out_base = out + (start * HV + i_h) * DZ
    slot = first_slot(start, i_n, T, C, PACKED)

    state = tl.zeros([BY, BZ], tl.float32)
    state_at = cols_z[None, :] * DY + cols_y[:, None] if TRANSPOSED else cols_y[:, None] * DZ + cols_z[None, :]
    state_keep = (cols_y < DY)[:, None] & (cols_z < DZ)[None, :]
    if HAS_START:
        entry = tl.cast(i_s, tl.int64) * num_heads + i_nh
        state = tl.load(states + entry * (DY * DZ) + state_at, mask=state_keep, other=0.0)

    for step in range(last - first):
        chunk = last - 1 - step if REVERSE else first + step
        row = chunk * C
        tile_x = load_rows(x + xy_offset, row, length, stride_xy, cols_y, C, DY, EVEN_Y)
        tile_y = load_rows(y + xy_offset, row, length, stride_xy, cols_y, C, DY, EVEN_Y)
        tile_z = load_rows(z + z_offset, row, length, stride_z, cols_z, C, DZ, EVEN_Z)
        cross = tl.dot(tile_x, state.to(tile_x.dtype), input_precision=PRECISION)
        update = tile_z
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            from_start, to_end = tl.exp2(sums), tl.exp2(chunk_total - sums)
            read, write = (to_end, from_start) if REVERSE else (from_start, to_end)
            cross *= read[:, None]
            update = (tile_z * write[:, None]).to(tile_z.dtype)
            state *= tl.exp2(chunk_total)
        if GATE == 2:
            chunk_total = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(chunk_total)[:, None]
        if GATE == 3:
            chunk_total = tl.load(decay + ((slot + chunk) * HV + i_h) * DZ + cols_z, mask=cols_z < DZ, other=0.0)
            state *= tl.exp2(chunk_total)[None, :]
        state += tl.dot(tl.trans(tile_y), update, input_precision=PRECISION)

        if PAIRS == 0:
            result = cross
        else:
            if PAIRS == 1:
                pairs = tl.dot(tile_x, tl.trans(tile_y), input_precision=PRECISION)
                if GATE == 1:
                    pairs *= pair_decay(sums, REVERSE, C)
                elif REVERSE:
                    pairs = tl.where(tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :], pairs, 0.0)
                else:
                    pairs = tl.where(tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :], pairs, 0.0)
                pairs = pairs.to(tile_z.dtype)
            else:
                base = scores + (start * HV + i_h) * C
                pairs = load_rows(base, row, length, HV * C, tl.arange(0, C), C, C, True)
                if REVERSE:
                    pairs = tl.trans(pairs)
            if SUMS == 1:
                inside = tl.dot(pairs, tile_z, input_precision=PRECISION)
                result = cross + inside
            else:
                result = tl.dot(pairs, tile_z, acc=cross, input_precision=PRECISION)
        store_rows(out_base, result * scale, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        if SUMS == 1:
            tile_w = load_rows(w + z_offset, row, length, stride_z, cols_z, C, DZ, EVEN_Z).to(tl.float32)
            rows = tl.arange(0, C)
            at = (tl.cast(i_z, tl.int64) * HV + i_h) * total_rows + start + row + rows
            keep = rows < length - row
            tl.store(sums_all + at, tl.sum(tile_w * (result * scale), 1), mask=keep)
            tl.store(sums_cross + at, tl.sum(tile_w * (cross * scale), 1), mask=keep)
        if SUMS == 2:
            tile_w = load_rows(w + z_offset, row, length, stride_z, cols_z, C, DZ, EVEN_Z).to(tl.float32)
            at = ((slot + chunk) * HV + i_h) * DZ + cols_z
            tl.store(sums_cross + at, tl.sum(tile_w * (result * scale), 0), mask=cols_z < DZ)

    if HAS_LAST:
        end_segment = 0 if REVERSE else num_segments - 1
        if i_s == end_segment:
            at = last_state + tl.cast(i_nh, tl.int64) * (DY * DZ) + state_at
            tl.store(at, state * scale if REVERSE else state, mask=state_keep)


@triton.jit(do_not_specialize=[*_RUNTIME, "total_rows"])
def _token_gate_gradient(
    g, dg, ends, end_gradients, q_all, q_cross, k_all, k_cross, cu_seqlens, scale, T, num_segments, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BLOCKS: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dg of a segment from the row sums that the sweeps for dq and dk left; D starts from <S, dS> at its end."""
    i_nh, num_heads = tl.program_id(0), tl.num_programs(0)
    i_s = tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    carried = tl.full((), 0.0, tl.float32)
    cols_y, cols_z = tl.arange(0, BK), tl.arange(0, BV)
    for block in range((DY + BK - 1) // BK):
        rows_y = block * BK + cols_y
        at = rows_y[:, None] * DZ + cols_z[None, :]
        keep = (rows_y < DY)[:, None] & (cols_z < DZ)[None, :]
        entry = tl.cast(i_s, tl.int64) * num_heads + i_nh
        state = tl.load(ends + (entry + num_heads) * (DY * DZ) + at, mask=keep, other=0.0)
        gradient = tl.load(end_gradients + entry * (DY * DZ) + at, mask=keep, other=0.0)
        carried += tl.sum(tl.sum(state * gradient, 1), 0) * scale
    rows = tl.arange(0, C)
    for step in range(last - first):
        row = (last - 1 - step) * C
        keep = rows < length - row
        share = tl.zeros([C], tl.float32)
        crossing = tl.zeros([C], tl.float32)
        for block in range(BLOCKS):
            at = (tl.cast(block, tl.int64) * HV + i_h) * total_rows + start + row + rows
            share += tl.load(q_all + at, mask=keep, other=0.0) - tl.load(k_all + at, mask=keep, other=0.0)
            crossing += tl.load(q_cross + at, mask=keep, other=0.0) - tl.load(k_cross + at, mask=keep, other=0.0)
        at = (start + row + rows) * HV + i_h
        gate = tl.load(g + at, mask=keep, other=0.0).to(tl.float32) * LOG2E
        after = carried + tl.sum(share, 0) - tl.cumsum(share, 0) + share
        tl.store(dg + at, tl.where(gate > LOWEST_LOG2, after, 0.0), mask=keep)
        carried += tl.sum(crossing, 0)


@triton.jit(do_not_specialize=_RUNTIME)
def _chunk_ends(
    ends, end_gradients, q_cross, k_cross, carried_out, cu_seqlens, scale, T, num_segments,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """D [slots, HV, K] at every chunk's end, per key channel, from <S, dS> at the segment's end."""
    i_nh, i_k, num_heads = _head_and_block((DY + BK - 1) // BK)
    i_s = tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    slot = first_slot(start, i_n, T, C, PACKED)
    rows_y, cols_z = i_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    keep_y = rows_y < DY
    at = rows_y[:, None] * DZ + cols_z[None, :]
    keep = keep_y[:, None] & (cols_z < DZ)[None, :]
    entry = tl.cast(i_s, tl.int64) * num_heads + i_nh
    state = tl.load(ends + (entry + num_heads) * (DY * DZ) + at, mask=keep, other=0.0)
    gradient = tl.load(end_gradients + entry * (DY * DZ) + at, mask=keep, other=0.0)
    carried = tl.sum(state * gradient, 1) * scale
    for step in range(last - first):
        at_slot = ((slot + last - 1 - step) * HV + i_h) * DY + rows_y
        tl.store(carried_out + at_slot, carried, mask=keep_y)
        carried += tl.load(q_cross + at_slot, mask=keep_y, other=0.0)
        carried -= tl.load(k_cross + at_slot, mask=keep_y, other=0.0)


# In a diagonal block of 16 tokens both sides may be scaled to its middle as long as no factor passes 2^40: products
# of two then stay far inside fp32's (and bf16's) range. Stronger decays take the four exact levels below 16.
_SPREAD_LIMIT = tl.constexpr(40.0)


@triton.jit
def _diagonal_spread(sums, sums_base, first, length, stride, cols, keep_cols, C: tl.constexpr):
    """G minus G in the middle of each block of 16 [C, K], zero past the sequence's end; and its largest size."""
    spread = sums - level_anchor(sums_base, first, length, stride, cols, keep_cols, 8, C)
    spread = tl.where((tl.arange(0, C) < length - first)[:, None], spread, 0.0)
    return spread, tl.max(tl.max(tl.abs(spread), 1), 0)


@triton.jit(do_not_specialize=["T", "N"])
def _prepare_channel(
    q, k, g, sums_out, decay, q_out, k_out, scores, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one chunk: G, the chunk's log2 decay, q e^G, k e^(G_C - G) and the scores of pairs inside it."""
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        qk_offset = (start * H + i_h // G) * K
        hv_offset = (start * HV + i_h) * K
        rows = tl.arange(0, C)
        total_scores = tl.zeros([C, C], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            cols = i_k * BK + tl.arange(0, BK)
            keep_cols = cols < K
            gates = load_rows(g + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
            gates = tl.maximum(gates * LOG2E, LOWEST_LOG2)
            sums = tl.cumsum(gates, 0)
            chunk_total = tl.sum(gates, 0)
            store_rows(sums_out + hv_offset, sums, row, length, HV * K, cols, C, K, EVEN)
            tl.store(decay + (tl.cast(slot, tl.int64) * HV + i_h) * K + cols, chunk_total, mask=keep_cols)
            tile_q = load_rows(q + qk_offset, row, length, H * K, cols, C, K, EVEN)
            tile_k = load_rows(k + qk_offset, row, length, H * K, cols, C, K, EVEN)
            dtype = tile_q.dtype
            store_rows(q_out + hv_offset, tile_q * tl.exp2(sums), row, length, HV * K, cols, C, K, EVEN)
            to_end = tl.exp2(chunk_total[None, :] - sums)
            store_rows(k_out + hv_offset, tile_k * to_end, row, length, HV * K, cols, C, K, EVEN)
            tl.debug_barrier()  # the anchors below are rows of G that other threads wrote
            for level in tl.static_range(4, 9):
                if 2**level < C:
                    e = level_decay(sums, sums_out + hv_offset, row, length, HV * K, cols, keep_cols, 2**level, C)
                    product = tl.dot(
                        (tile_q * e).to(dtype), tl.trans((tile_k * e).to(dtype)), input_precision=PRECISION
                    )
                    total_scores += tl.where(level_pairs(2**level, C), product, 0.0)
            spread, widest = _diagonal_spread(sums, sums_out + hv_offset, row, length, HV * K, cols, keep_cols, C)
            if widest < _SPREAD_LIMIT:
                product = _wide_dot(tile_q * tl.exp2(spread), tl.trans(tile_k * tl.exp2(-spread)), dtype, PRECISION)
                near = (rows[:, None] // 16 == rows[None, :] // 16) & (rows[:, None] >= rows[None, :])
                total_scores += tl.where(near, product, 0.0)
            else:
                for level in tl.static_range(0, 4):
                    e = level_decay(sums, sums_out + hv_offset, row, length, HV * K, cols, keep_cols, 2**level, C)
                    product = tl.dot(
                        (tile_q * e).to(dtype), tl.trans((tile_k * e).to(dtype)), input_precision=PRECISION
                    )
                    total_scores += tl.where(level_pairs(2**level, C), product, 0.0)
                own = tl.sum(tile_q.to(tl.float32) * tile_k.to(tl.float32), 1)
                total_scores += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
        store_rows(scores + (start * HV + i_h) * C, total_scores, row, length, HV * C, tl.arange(0, C), C, C, True)


@triton.jit
def _wide_dot(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Product of fp32 factors up to 2^40 in size, which fp16 cannot hold: in bf16 if that is the inputs' type."""
    if dtype == tl.bfloat16:
        return tl.dot(a.to(dtype), b.to(dtype))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _channel_level(tile_q, tile_k, grow, shrink, pairs, pairs_t, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Add of one level to dq, dk and q dq - k dk, from masked score gradients and their transpose.

    The last is formed from the rounded factors, so that the pairs inside the chunk cancel exactly.
    """
    if dtype == tl.bfloat16:
        scaled_q, scaled_k = (tile_q * grow).to(dtype), (tile_k * shrink).to(dtype)
        pairs, pairs_t = pairs.to(dtype), pairs_t.to(dtype)
    else:
        scaled_q, scaled_k = tile_q.to(tl.float32) * grow, tile_k.to(tl.float32) * shrink
    dq = tl.dot(pairs, scaled_k, input_precision=PRECISION)
    dk = tl.dot(pairs_t, scaled_q, input_precision=PRECISION)
    return dq * grow, dk * shrink, scaled_q * dq - scaled_k * dk


@triton.jit(do_not_specialize=["T", "N"])
def _channel_gradients(
    q, k, v, do, g, sums_in, q_cross, k_cross, carried, dq_out, dk_out, dg_out, cu_seqlens, scale, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one chunk and block of key channels: dq, dk and dg, from the sweeps' share and the pairs inside."""
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    i_k, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        EVEN_V: tl.constexpr = V % BV == 0
        H: tl.constexpr = HV // G
        qk_offset = (start * H + i_h // G) * K
        hv_offset = (start * HV + i_h) * K
        v_offset = (start * HV + i_h) * V
        rows = tl.arange(0, C)
        pairs = tl.zeros([C, C], tl.float32)
        pairs_t = tl.zeros([C, C], tl.float32)
        for i_v in range((V + BV - 1) // BV):
            cols_v = i_v * BV + tl.arange(0, BV)
            tile_v = load_rows(v + v_offset, row, length, HV * V, cols_v, C, V, EVEN_V)
            tile_do = load_rows(do + v_offset, row, length, HV * V, cols_v, C, V, EVEN_V)
            # The transpose is a product of its own: Triton 3.4 to 3.7.0 miscompiles some transposed accumulators
            # on Hopper.
            pairs += tl.dot(tile_do, tl.trans(tile_v), input_precision=PRECISION)
            pairs_t += tl.dot(tile_v, tl.trans(tile_do), input_precision=PRECISION)
        pairs *= scale
        pairs_t *= scale
        dtype = v.dtype.element_ty
        cols = i_k * BK + tl.arange(0, BK)
        keep_cols = cols < K
        sums_base = sums_in + hv_offset
        sums = load_rows(sums_base, row, length, HV * K, cols, C, K, EVEN)
        tile_q = load_rows(q + qk_offset, row, length, H * K, cols, C, K, EVEN)
        tile_k = load_rows(k + qk_offset, row, length, H * K, cols, C, K, EVEN)
        end = tl.minimum(length - row, C) - 1
        chunk_total = tl.load(sums_base + (row + end).to(tl.int64) * (HV * K) + cols, mask=keep_cols, other=0.0)
        from_start, to_end = tl.exp2(sums), tl.exp2(tl.minimum(chunk_total[None, :] - sums, 0.0))
        cross = load_rows(q_cross + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
        dq = cross * from_start
        share = dq * tile_q
        cross = load_rows(k_cross + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
        dk = cross * to_end
        share -= dk * tile_k
        for level in tl.static_range(4, 9):
            if 2**level < C:
                e = level_decay(sums, sums_base, row, length, HV * K, cols, keep_cols, 2**level, C)
                here = level_pairs(2**level, C)
                there = level_pairs_transposed(2**level, C)
                add_q, add_k, add = _channel_level(
                    tile_q, tile_k, e, e, tl.where(here, pairs, 0.0), tl.where(there, pairs_t, 0.0), dtype, PRECISION
                )
                dq, dk, share = dq + add_q, dk + add_k, share + add
        spread, widest = _diagonal_spread(sums, sums_base, row, length, HV * K, cols, keep_cols, C)
        if widest < _SPREAD_LIMIT:
            near = rows[:, None] // 16 == rows[None, :] // 16
            here = near & (rows[:, None] >= rows[None, :])
            there = near & (rows[:, None] <= rows[None, :])
            add_q, add_k, add = _channel_level(
                tile_q, tile_k, tl.exp2(spread), tl.exp2(-spread),
                tl.where(here, pairs, 0.0), tl.where(there, pairs_t, 0.0), dtype, PRECISION,
            )  # fmt: skip
            dq, dk, share = dq + add_q, dk + add_k, share + add
        else:
            for level in tl.static_range(0, 4):
                e = level_decay(sums, sums_base, row, length, HV * K, cols, keep_cols, 2**level, C)
                here = level_pairs(2**level, C)
                there = level_pairs_transposed(2**level, C)
                add_q, add_k, add = _channel_level(
                    tile_q, tile_k, e, e, tl.where(here, pairs, 0.0), tl.where(there, pairs_t, 0.0), dtype, PRECISION
                )
                dq, dk, share = dq + add_q, dk + add_k, share + add
            own = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
            dq += own[:, None] * tile_k
            dk += own[:, None] * tile_q
        store_rows(dq_out + hv_offset, dq, row, length, HV * K, cols, C, K, EVEN)
        store_rows(dk_out + hv_offset, dk, row, length, HV * K, cols, C, K, EVEN)
        at_slot = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
        after = tl.load(carried + at_slot, mask=keep_cols, other=0.0)[None, :]
        after += tl.sum(share, 0)[None, :] - tl.cumsum(share, 0) + share
        gates = load_rows(g + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32) * LOG2E
        dg = tl.where(gates > LOWEST_LOG2, after, 0.0)
        store_rows(dg_out + hv_offset, dg, row, length, HV * K, cols, C, K, EVEN)


@dataclass(frozen=True)
class _Call:
    """Sizes of one call and how it is cut up."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    packed: bool
    plan: Plan

    @property
    def chunk(self) -> int:
        return self.plan.chunk

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.B * self.T

    @property
    def slots(self) -> int:
        """Entries in arrays with one a chunk; packed sequences may leave one each unused."""
        return self.T // self.chunk + self.N if self.packed else self.B * -(-self.T // self.chunk)

    def sizes(self) -> dict[str, object]:
        return {"HV": self.HV, "C": self.chunk, "PACKED": self.packed}


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere, where only the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _call(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> _Call:
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    cut = plan(N, T, HV, K, V, q.element_size(), g is not None, _num_multiprocessors(q.device))
    return _Call(B, T, H, HV, K, V, N, cu_seqlens is not None, cut)


def _precision(x: Tensor) -> str:
    # tf32 keeps 10 bits of each factor: as many as fp16 inputs have. It is what fp32 users of the hardware get.
    return "tf32" if x.dtype == torch.float32 else "ieee"


def _segment_starts(
    call: _Call, y: Tensor, z: Tensor, g: Tensor | None, decay: Tensor | None, end_state: Tensor | None,
    cu_seqlens: Tensor | None, *, reverse: bool, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return the state [segments, N*HV, K, V] that every segment starts from; from its end when ``reverse``.

    Args:
        y, z: what is written along the state's rows (K) and columns (V).
        end_state: the first segment's start [N, HV, K, V], times ``scale``.
    """
    K, V, S, heads = call.K, call.V, call.plan.num_segments, call.N * call.HV
    states = torch.empty(S, heads, K, V, dtype=torch.float32, device=z.device)
    gate = NO_GATE if g is None and decay is None else TOKEN_GATE if decay is None else ROW_GATE
    totals = None
    if gate != NO_GATE:
        totals = torch.empty(S, heads, K if gate == ROW_GATE else 1, dtype=torch.float32, device=z.device)
    if S > 1:
        BY, BZ = min(64, padded_dim(K)), min(128 if z.element_size() == 2 else 64, padded_dim(V))
        blocks = -(-K // BY) * -(-V // BZ)
        _segment_states[(heads * blocks, S - 1)](
            y, z, g, decay, states, totals, cu_seqlens, call.T, S, call.rows,
            GY=call.HV // y.shape[2], GZ=call.HV // z.shape[2], DY=K, DZ=V, BY=BY, BZ=BZ,
            REVERSE=reverse, GATE=gate, PRECISION=_precision(z), **call.sizes(), num_warps=4, num_stages=3,
        )  # fmt: skip
    BLOCK = min(1024, next_power_of_two(K * V))
    _scan_segments[(heads * -(-K * V // BLOCK),)](
        states, totals, end_state, S, scale, DY=K, DZ=V, BLOCK=BLOCK, REVERSE=reverse, GATE=gate,
        HAS_START=end_state is not None, num_warps=4,
    )  # fmt: skip
    return states


@dataclass(frozen=True)
class _Sums:
    """What a sweep multiplies its output by to sum gate gradients, and where the sums go."""

    w: Tensor
    kind: int
    all: Tensor | None
    cross: Tensor


def _row_sums(call: _Call, w: Tensor, blocks: int) -> _Sums:
    shape = (blocks, call.HV, call.rows)
    return _Sums(
        w,
        ROW_SUMS,
        torch.empty(shape, dtype=torch.float32, device=w.device),
        torch.empty(shape, dtype=torch.float32, device=w.device),
    )


def _chunk_sums(call: _Call, w: Tensor) -> _Sums:
    return _Sums(
        w, CHUNK_SUMS, None, torch.empty(call.slots, call.HV, w.shape[-1], dtype=torch.float32, device=w.device)
    )


def _launch_sweep(
    call: _Call, x: Tensor, y: Tensor, z: Tensor, states: Tensor | None,
    *, cu_seqlens: Tensor | None, scale: float, g: Tensor | None = None, decay: Tensor | None = None,
    decay_columns: bool = False, scores: Tensor | None = None, pairs: bool = True,
    reverse: bool = False, transposed: bool = False, last_state: Tensor | None = None, sums: _Sums | None = None,
) -> Tensor:  # fmt: skip
    """Run one sweep; returns out [B, T, HV, DZ], in fp32 when it is to be summed over a group of heads."""
    DY, DZ = y.shape[-1], z.shape[-1]
    config = sweep_config(DY, DZ, z.element_size())
    grouped = transposed and call.HV != call.H
    dtype = torch.float32 if grouped else z.dtype
    out = torch.empty(call.B, call.T, call.HV, DZ, dtype=dtype, device=z.device)
    gate = NO_GATE if g is None and decay is None else TOKEN_GATE if decay is None else ROW_GATE
    grid = (call.N * call.HV * -(-DZ // config.block), call.plan.num_segments)
    _sweep[grid](
        x, y, z, g, decay, scores, states, out, last_state,
        None if sums is None else sums.w, None if sums is None else sums.all, None if sums is None else sums.cross,
        cu_seqlens, scale, call.T, call.plan.num_segments, call.rows,
        GXY=call.HV // x.shape[2], GZ=call.HV // z.shape[2], DY=DY, DZ=DZ, BY=padded_dim(DY), BZ=config.block,
        REVERSE=reverse, GATE=COLUMN_GATE if decay_columns else gate,
        PAIRS=GIVEN_PAIRS if scores is not None else OWN_PAIRS if pairs else NO_PAIRS,
        SUMS=NO_SUMS if sums is None else sums.kind, TRANSPOSED=transposed, HAS_START=states is not None,
        HAS_LAST=last_state is not None, PRECISION=_precision(z), **call.sizes(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Prepared:
    """What `_prepare_channel` makes of q, k and a decay per key channel."""

    sums: Tensor  # G in log2 [B, T, HV, K]
    decay: Tensor  # log2 decay of a chunk [slots, HV, K]
    q: Tensor  # q e^G [B, T, HV, K]
    k: Tensor  # k e^(G_C - G) [B, T, HV, K]
    scores: Tensor  # [B, T, HV, C]


def _prepare(call: _Call, q: Tensor, k: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> _Prepared:
    shape = (call.B, call.T, call.HV)
    made = _Prepared(
        sums=torch.empty(*shape, call.K, dtype=torch.float32, device=q.device),
        decay=torch.empty(call.slots, call.HV, call.K, dtype=torch.float32, device=q.device),
        q=torch.empty(*shape, call.K, dtype=q.dtype, device=q.device),
        k=torch.empty(*shape, call.K, dtype=q.dtype, device=q.device),
        scores=torch.empty(*shape, call.chunk, dtype=q.dtype, device=q.device),
    )
    config = prepare_config(call.K)
    _prepare_channel[(call.slots * call.HV,)](
        q, k, g, made.sums, made.decay, made.q, made.k, made.scores, cu_seqlens, call.N, call.T,
        G=call.HV // call.H, K=call.K, BK=config.block, N_PADDED=next_power_of_two(call.N),
        PRECISION=_precision_wide(q), **call.sizes(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return made


def _precision_wide(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.bfloat16 else "tf32"


def _token_sums(call: _Call, g: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return the sums of one log decay a token inside chunks [HV, rows], or None for other gates."""
    if g is None or g.ndim != 3:
        return None
    sums = torch.empty(call.HV, call.rows, dtype=torch.float32, device=g.device)
    BH = min(32, next_power_of_two(call.HV))
    _sum_gates[(call.slots * -(-call.HV // BH),)](
        g, sums, cu_seqlens, call.N, call.T, call.rows, BH=BH, N_PADDED=next_power_of_two(call.N), **call.sizes(),
        num_warps=4,
    )  # fmt: skip
    return sums


def _forward_impl(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, v, g, cu_seqlens)
    final = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    token_gate = _token_sums(call, g, cu_seqlens)
    decay, scores, reads, writes = None, None, q, k
    if g is not None and g.ndim == 4:
        made = _prepare(call, q, k, g, cu_seqlens)
        decay, scores, reads, writes = made.decay, made.scores, made.q, made.k
    starts: Tensor | None = initial_state
    if call.plan.num_segments > 1:
        starts = _segment_starts(call, writes, v, token_gate, decay, initial_state, cu_seqlens, reverse=False)
    o = _launch_sweep(
        call, reads, writes, v, starts, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay, scores=scores,
        last_state=final,
    )  # fmt: skip
    kept = starts if starts is not None and starts is not initial_state else final.new_empty(0)
    return o, final, kept


def _backward_impl(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, v, g, cu_seqlens)
    token_gate = _token_sums(call, g, cu_seqlens)
    states = starts if starts.numel() else initial_state
    made = _prepare(call, q, k, g, cu_seqlens) if g is not None and g.ndim == 4 else None
    decay = made.decay if made else None
    reads, writes = (made.q, made.k) if made else (q, k)
    d_initial = torch.empty_like(final)
    gradients = dfinal  # the state's gradient from each segment's end on, without the scale
    if call.plan.num_segments > 1 or (dfinal is not None and scale != 1.0):
        gradients = _segment_starts(
            call, reads, do, token_gate, decay, dfinal, cu_seqlens, reverse=True, scale=1.0 / scale
        )
    sweep = partial(_launch_sweep, call, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay)
    scores = made.scores if made else None
    dv = sweep(writes, reads, do, gradients, scores=scores, reverse=True, last_state=d_initial)
    blocks = -(-call.K // sweep_config(call.V, call.K, q.element_size()).block)
    sums_q, sums_k = None, None
    if token_gate is not None:
        sums_q, sums_k = _row_sums(call, q, blocks), _row_sums(call, k, blocks)
    elif made:
        sums_q, sums_k = _chunk_sums(call, made.q), _chunk_sums(call, made.k)
    sweep = partial(sweep, decay_columns=made is not None, pairs=made is None, transposed=True)
    dq = sweep(do, v, writes, states, sums=sums_q)
    dk = sweep(v, do, reads, gradients, sums=sums_k, reverse=True)
    dg = final.new_empty(0)
    if g is not None and sums_q is not None and sums_k is not None:
        ends = _segment_ends(call, states, final)
        end_gradients = torch.zeros_like(ends[:-1]) if gradients is None else gradients
        if made:
            carried = _carried(call, ends, end_gradients, sums_q, sums_k, cu_seqlens, scale)
            dq, dk, dg = _channel_backward(call, q, k, v, do, g, made, dq, dk, carried, cu_seqlens, scale)
        else:
            dg = _token_backward(call, g, ends, end_gradients, sums_q, sums_k, cu_seqlens, scale)
    return _sum_groups(call, dq, q), _sum_groups(call, dk, k), dv, dg, d_initial


def _segment_ends(call: _Call, states: Tensor | None, final: Tensor) -> Tensor:
    """Return states [segments + 1, N*HV, K, V] of which entry s + 1 is segment s's last."""
    final = final.view(1, call.N * call.HV, call.K, call.V)
    if states is None or call.plan.num_segments == 1:
        return torch.cat([final, final])  # entry 0 is never read
    return torch.cat([states, final])


def _token_backward(
    call: _Call, g: Tensor, ends: Tensor, end_gradients: Tensor, sums_q: _Sums, sums_k: _Sums,
    cu_seqlens: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    dg = torch.empty_like(g, dtype=torch.float32)
    BV = padded_dim(call.V)
    _token_gate_gradient[(call.N * call.HV, call.plan.num_segments)](
        g, dg, ends, end_gradients, sums_q.all, sums_q.cross, sums_k.all, sums_k.cross, cu_seqlens, scale,
        call.T, call.plan.num_segments, call.rows, DY=call.K, DZ=call.V, BK=min(32, padded_dim(call.K)), BV=BV,
        BLOCKS=sums_q.cross.shape[0], **call.sizes(), num_warps=4,
    )  # fmt: skip
    return dg


def _carried(
    call: _Call, ends: Tensor, end_gradients: Tensor, sums_q: _Sums, sums_k: _Sums, cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    carried = torch.empty_like(sums_q.cross)
    BK = min(32, padded_dim(call.K))
    _chunk_ends[(call.N * call.HV * -(-call.K // BK), call.plan.num_segments)](
        ends, end_gradients, sums_q.cross, sums_k.cross, carried, cu_seqlens, scale, call.T, call.plan.num_segments,
        DY=call.K, DZ=call.V, BK=BK, BV=padded_dim(call.V), **call.sizes(), num_warps=4,
    )  # fmt: skip
    return carried


def _channel_backward(
    call: _Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor, made: _Prepared, dq: Tensor, dk: Tensor,
    carried: Tensor, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dg = torch.empty_like(g, dtype=torch.float32)
    dq_out, dk_out = torch.empty_like(dq), torch.empty_like(dk)
    config, BV = gradients_config(call.K), min(64, padded_dim(call.V))
    _channel_gradients[(call.slots * call.HV * -(-call.K // config.block),)](
        q, k, v, do, g, made.sums, dq, dk, carried, dq_out, dk_out, dg, cu_seqlens, scale, call.N, call.T,
        G=call.HV // call.H, K=call.K, V=call.V, BK=config.block, BV=BV, N_PADDED=next_power_of_two(call.N),
        PRECISION=_precision_wide(q), **call.sizes(), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dq_out, dk_out, dg


def _sum_groups(call: _Call, gradient: Tensor, like: Tensor) -> Tensor:
    """Sum [B, T, HV, K] over the value heads that share a key head."""
    if call.HV == call.H:
        return gradient
    return gradient.view(call.B, call.T, call.H, call.HV // call.H, call.K).sum(3).to(like.dtype)


@torch.library.custom_op("archspec::linear_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state [N, HV, K, V] and the segments' start states (empty when there is one segment)."""
    return _forward_impl(q, k, v, g, initial_state, cu_seqlens, scale)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(q, v, g, cu_seqlens)
    final = v.new_empty(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    starts = final.new_empty(0)
    if call.plan.num_segments > 1:
        starts = final.new_empty(call.plan.num_segments, call.N * call.HV, call.K, call.V)
    return torch.empty_like(v), final, starts


@torch.library.custom_op("archspec::linear_attention_backward", mutates_args=())
def _backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dg (empty without a gate) and the initial state's gradient."""
    return _backward_impl(do, dfinal, q, k, v, g, initial_state, cu_seqlens, final, starts, scale)


@_backward.register_fake
def _backward_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = final.new_empty(0) if g is None else torch.empty_like(g, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(final)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, scale = inputs
    _, final, starts = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, final, starts)
    ctx.scale = scale


def _differentiate(ctx, do, dfinal, _dstarts):  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, final, starts = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dg, d_initial = _backward(do, dfinal, q, k, v, g, initial_state, cu_seqlens, final, starts, ctx.scale)
    return dq, dk, dv, None if g is None else dg, None if initial_state is None else d_initial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run the Triton form; arguments as in `archspec.kernels.linear.linear_attention`, checked there.

    Matrix products take bf16 and fp16 inputs as they are and fp32 inputs as tf32; the state is fp32.
    """
    g = None if g is None else g.float().contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    o, final, _ = _forward(q.contiguous(), k.contiguous(), v.contiguous(), g, state, cu_seqlens, scale)
    return o, final if output_final_state else None
