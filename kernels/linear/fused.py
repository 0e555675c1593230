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
<S, dS> at a segment's ends, followed through the chunks between them. The share of pairs inside a chunk enters dq
and dk from equally rounded factors, so it cancels exactly.
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
    scores_config,
    sweep_config,
)
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    first_slot,
    load_rows,
    load_sums,
    pair_decay,
    seen_pairs,
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
    x, y, z, y2, z2, g, decay, scores, states, base, out, last_state, w, sums_out, cu_seqlens,
    scale, ratio, T, num_segments, total_rows,
    HV: tl.constexpr, GXY: tl.constexpr, GZ: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr,
    BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, PAIRS: tl.constexpr, SUMS: tl.constexpr,
    TRANSPOSED: tl.constexpr, STRICT: tl.constexpr, HAS_START: tl.constexpr, HAS_LAST: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = base + scale * (x S + pairs z) with the state S [DY, BZ] in registers; S is kept without the scale.

    STRICT leaves out each token's pair with itself. A second product (y2, z2), always strict, adds ratio times its
    own to S and to out: where two products nearly cancel, their sum may be rounded but not each of them.

    x, y: [rows, HV/GXY, DY]; z, w: [rows, HV/GZ, DZ]; out: [rows, HV, DZ]; states [segments, N*HV, DY, DZ] (or
    transposed). Sums for gate gradients: ROW_SUMS writes sum_d w out and its share through the state to
    [2, blocks, HV, rows]; CHUNK_SUMS writes sum_t w out per column to [slots, HV, DZ].
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
        if SUMS != 0:
            # Loaded long before its use: only operands of products are prefetched over iterations.
            tile_w = load_rows(w + z_offset, row, length, stride_z, cols_z, C, DZ, EVEN_Z)
        rounded = state.to(tile_x.dtype)
        cross = tl.dot(tile_x, rounded, input_precision=PRECISION)
        if SUMS != 0 and tile_x.dtype == tl.bfloat16:
            # Sums over chunks drift by the state's rounding; its other half leaves them fp32's.
            cross = tl.dot(tile_x, (state - rounded).to(tl.bfloat16), acc=cross, input_precision=PRECISION)
        update = tile_z
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            from_start, to_end = tl.exp2(sums), tl.exp2(chunk_total - sums)
            read, write = (to_end, from_start) if REVERSE else (from_start, to_end)
            if SUMS == 1:
                # From w rounded as the opposite sweep's update is, so that the two change D by the same numbers.
                crossing = tl.sum((tile_w * read[:, None]).to(tile_w.dtype) * (cross * scale), 1)
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
        if y2 is not None:
            tile_y2 = load_rows(y2 + xy_offset, row, length, stride_xy, cols_y, C, DY, EVEN_Y)
            tile_z2 = load_rows(z2 + z_offset, row, length, stride_z, cols_z, C, DZ, EVEN_Z)
            update = (tile_z2 * write[:, None]).to(tile_z2.dtype) if GATE == 1 else tile_z2
            state += tl.dot(tl.trans(tile_y2), update, input_precision=PRECISION) * ratio

        if PAIRS == 0:
            result = cross
        else:
            if PAIRS == 1:
                pairs = tl.dot(tile_x, tl.trans(tile_y), input_precision=PRECISION)
                if GATE == 1:
                    pairs *= pair_decay(sums, REVERSE, C)
                if STRICT or GATE != 1:
                    pairs = tl.where(seen_pairs(REVERSE, STRICT, C), pairs, 0.0)
                pairs = pairs.to(tile_z.dtype)
            else:
                pairs = load_rows(scores + (start * HV + i_h) * C, row, length, HV * C, tl.arange(0, C), C, C, True)
                if REVERSE:
                    pairs = tl.trans(pairs)
            if y2 is not None:
                second = tl.dot(tile_x, tl.trans(tile_y2), input_precision=PRECISION)
                if GATE == 1:
                    second *= pair_decay(sums, REVERSE, C)
                second = tl.where(seen_pairs(REVERSE, True, C), second, 0.0).to(tile_z.dtype)
                more = tl.dot(second, tile_z2, input_precision=PRECISION) * ratio
            if SUMS == 1:
                result = tl.dot(pairs, tile_z, input_precision=PRECISION)
                if y2 is not None:
                    result += more
                inside = tl.sum(tile_w * (result * scale), 1)
                result += cross
            else:
                result = tl.dot(pairs, tile_z, acc=cross, input_precision=PRECISION)
                if y2 is not None:
                    result += more
        stored = result * scale
        if base is not None:
            at_base = base + (start * HV + i_h) * DZ
            stored += load_rows(at_base, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        store_rows(out_base, stored, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        if SUMS == 1:
            rows = tl.arange(0, C)
            at = (tl.cast(i_z, tl.int64) * HV + i_h) * total_rows + start + row + rows
            keep = rows < length - row
            tl.store(sums_out + at, inside + crossing, mask=keep)
            at += tl.num_programs(0) // num_heads * tl.cast(HV, tl.int64) * total_rows
            tl.store(sums_out + at, crossing, mask=keep)
        if SUMS == 2:
            at = ((slot + chunk) * HV + i_h) * DZ + cols_z
            tl.store(sums_out + at, tl.sum(tile_w * (result * scale), 0), mask=cols_z < DZ)

    if HAS_LAST:
        end_segment = 0 if REVERSE else num_segments - 1
        if i_s == end_segment:
            at = last_state + tl.cast(i_nh, tl.int64) * (DY * DZ) + state_at
            tl.store(at, state * scale if REVERSE else state, mask=state_keep)


@triton.jit(do_not_specialize=["num_segments"])
def _boundary_shares(
    states, final, gradients, first_gradient, out, num_segments, scale,
    DY: tl.constexpr, DZ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_GRADIENTS: tl.constexpr,
):  # fmt: skip
    """<S, dS> per row of the state at every boundary of segments [segments + 1, N*HV, K]."""
    i_nh, i_k, num_heads = _head_and_block((DY + BK - 1) // BK)
    boundary = tl.program_id(1)
    rows_y, cols_z = i_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    at = tl.cast(i_nh, tl.int64) * (DY * DZ) + rows_y[:, None] * DZ + cols_z[None, :]
    keep = (rows_y < DY)[:, None] & (cols_z < DZ)[None, :]
    segment = tl.cast(num_heads, tl.int64) * (DY * DZ)
    share = tl.zeros([BK, BV], tl.float32)
    if boundary == num_segments:
        if HAS_GRADIENTS:
            gradient = tl.load(gradients + (boundary - 1) * segment + at, mask=keep, other=0.0)
            share = tl.load(final + at, mask=keep, other=0.0) * gradient * scale
    else:
        if HAS_STATES:
            state = tl.load(states + boundary * segment + at, mask=keep, other=0.0)
            if boundary == 0:
                share = state * tl.load(first_gradient + at, mask=keep, other=0.0)
            else:
                share = state * tl.load(gradients + (boundary - 1) * segment + at, mask=keep, other=0.0) * scale
    entry = (tl.cast(boundary, tl.int64) * num_heads + i_nh) * DY
    tl.store(out + entry + rows_y, tl.sum(share, 1), mask=rows_y < DY)


@triton.jit
def _read_boundaries(boundaries, i_s, i_nh, num_heads, rows_y, DY: tl.constexpr):
    """D at a segment's start and end, for some rows of the state."""
    at = (tl.cast(i_s, tl.int64) * num_heads + i_nh) * DY + rows_y
    keep = rows_y < DY
    start = tl.load(boundaries + at, mask=keep, other=0.0)
    return start, tl.load(boundaries + tl.cast(num_heads, tl.int64) * DY + at, mask=keep, other=0.0)


@triton.jit(do_not_specialize=[*_RUNTIME, "total_rows"])
def _token_gate_gradient(
    g, dg, boundaries, q_sums, k_sums, cu_seqlens, T, num_segments, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dg of a segment from the row sums that the sweeps for dq and dk left, and D at its two ends.

    The steps of D from chunk to chunk carry the products' rounding; what they miss of D at the segment's start is
    spread evenly over its chunks.
    """
    i_nh, num_heads = tl.program_id(0), tl.num_programs(0)
    i_s = tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    at_start, at_end = _read_boundaries(boundaries, i_s, i_nh, num_heads, tl.arange(0, BK), DY)
    carried = tl.sum(at_end, 0)
    rows = tl.arange(0, C)
    cross = tl.cast(BLOCKS * HV, tl.int64) * total_rows
    missed = tl.zeros([C], tl.float32)
    for chunk in range(first, last):
        keep = rows < length - chunk * C
        for block in range(BLOCKS):
            at = cross + (tl.cast(block, tl.int64) * HV + i_h) * total_rows + start + chunk * C + rows
            missed += tl.load(q_sums + at, mask=keep, other=0.0) - tl.load(k_sums + at, mask=keep, other=0.0)
    correction = (tl.sum(at_start, 0) - carried - tl.sum(missed, 0)) / tl.maximum(last - first, 1)
    for step in range(last - first):
        row = (last - 1 - step) * C
        keep = rows < length - row
        share = tl.zeros([C], tl.float32)
        crossing = tl.zeros([C], tl.float32)
        for block in range(BLOCKS):
            at = (tl.cast(block, tl.int64) * HV + i_h) * total_rows + start + row + rows
            share += tl.load(q_sums + at, mask=keep, other=0.0) - tl.load(k_sums + at, mask=keep, other=0.0)
            at += cross
            crossing += tl.load(q_sums + at, mask=keep, other=0.0) - tl.load(k_sums + at, mask=keep, other=0.0)
        at = (start + row + rows) * HV + i_h
        gate = tl.load(g + at, mask=keep, other=0.0).to(tl.float32) * LOG2E
        after = carried + tl.sum(share, 0) - tl.cumsum(share, 0) + share
        tl.store(dg + at, tl.where(gate > LOWEST_LOG2, after, 0.0), mask=keep)
        carried += tl.sum(crossing, 0) + correction


@triton.jit(do_not_specialize=_RUNTIME)
def _chunk_ends(
    boundaries, q_cross, k_cross, carried_out, cu_seqlens, T, num_segments,
    HV: tl.constexpr, DY: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """D [slots, HV, K] at every chunk's end, per key channel, between D at the segment's two ends."""
    i_nh, num_heads = tl.program_id(0), tl.num_programs(0)
    i_s = tl.program_id(1)
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    first, last = segment_chunks(length, i_s, num_segments, C)
    slot = first_slot(start, i_n, T, C, PACKED)
    rows_y = tl.arange(0, BK)
    keep = rows_y < DY
    at_start, carried = _read_boundaries(boundaries, i_s, i_nh, num_heads, rows_y, DY)
    missed = tl.zeros([BK], tl.float32)
    for chunk in range(first, last):
        at = ((slot + chunk) * HV + i_h) * DY + rows_y
        missed += tl.load(q_cross + at, mask=keep, other=0.0) - tl.load(k_cross + at, mask=keep, other=0.0)
    correction = (at_start - carried - missed) / tl.maximum(last - first, 1)
    for step in range(last - first):
        at = ((slot + last - 1 - step) * HV + i_h) * DY + rows_y
        tl.store(carried_out + at, carried, mask=keep)
        carried += tl.load(q_cross + at, mask=keep, other=0.0) - tl.load(k_cross + at, mask=keep, other=0.0)
        carried += correction


# Pairs (t, s) of a chunk are taken by blocks of 16 rows t: q is scaled from an anchor in the block, k to it. With the
# anchor in the block's middle, the block's own columns are scaled up as well as down; as long as no factor passes
# 2^40, products of two stay far inside fp32's (and bf16's) range. Stronger decays move the anchor to the row before
# the block, where no factor exceeds one, and take the block's own pairs one column at a time.
_SPREAD_LIMIT = tl.constexpr(40.0)
_R = tl.constexpr(16)


@triton.jit(do_not_specialize=["T", "N"])
def _prepare_channel(
    q, k, g, sums_out, decay, q_out, k_out, k_read_out, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr,
):  # fmt: skip
    """For one chunk and block of channels: G, the chunk's log2 decay, q e^G and k e^(G_C - G)."""
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    i_k, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        qk_offset = (start * H + i_h // G) * K
        hv_offset = (start * HV + i_h) * K
        cols = i_k * BK + tl.arange(0, BK)
        gates = load_rows(g + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
        tile_q = load_rows(q + qk_offset, row, length, H * K, cols, C, K, EVEN)
        tile_k = load_rows(k + qk_offset, row, length, H * K, cols, C, K, EVEN)
        gates = tl.maximum(gates * LOG2E, LOWEST_LOG2)
        sums = tl.cumsum(gates, 0)
        chunk_total = tl.sum(gates, 0)
        store_rows(sums_out + hv_offset, sums, row, length, HV * K, cols, C, K, EVEN)
        tl.store(decay + (tl.cast(slot, tl.int64) * HV + i_h) * K + cols, chunk_total, mask=cols < K)
        store_rows(q_out + hv_offset, tile_q * tl.exp2(sums), row, length, HV * K, cols, C, K, EVEN)
        if k_read_out is not None:
            store_rows(k_read_out + hv_offset, tile_k * tl.exp2(sums), row, length, HV * K, cols, C, K, EVEN)
        to_end = tl.exp2(tl.minimum(chunk_total[None, :] - sums, 0.0))
        store_rows(k_out + hv_offset, tile_k * to_end, row, length, HV * K, cols, C, K, EVEN)


@triton.jit
def _scale_block(
    sums_base, sums, block, row, length, stride, cols, K: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr
):
    """Factors of the 16 rows of a block [16, BK] and of the chunk's columns [C, BK], and G of the block's rows.

    Also returns whether the block's own columns are included, which they are while decays are mild.
    """
    first = row + block * _R
    own_sums = load_rows(sums_base, first, length, stride, cols, _R, K, EVEN)
    own_rows = (tl.arange(0, _R) < length - first)[:, None]
    keep = cols < K
    middle = tl.minimum(first + 7, length - 1)
    anchor = tl.load(sums_base + tl.cast(middle, tl.int64) * stride + cols, mask=keep, other=0.0)
    spread = tl.where(own_rows, tl.abs(own_sums - anchor[None, :]), 0.0)
    mild = tl.max(tl.max(spread, 1), 0) < _SPREAD_LIMIT
    before = tl.maximum(first - 1, row)
    before_sums = tl.load(sums_base + tl.cast(before, tl.int64) * stride + cols, mask=keep & (block > 0), other=0.0)
    anchor = tl.where(mild, anchor, before_sums)
    end = block * _R + tl.where(mild, _R, 0)
    grow = tl.exp2(tl.where(own_rows, own_sums - anchor[None, :], 0.0))
    seen = (tl.arange(0, C) < end)[:, None]
    shrink = tl.exp2(tl.where(seen, anchor[None, :] - sums, float("-inf")))
    return grow, shrink, own_sums, mild


@triton.jit(do_not_specialize=["T", "N"])
def _channel_scores(
    q, k, sums_in, scores, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sixteen rows of one chunk's scores, sum_k q_tk k_sk e^(G_tk - G_sk) for s <= t."""
    BLOCKS: tl.constexpr = C // _R
    block, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    first = row + block * _R
    if first < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        qk_offset = (start * H + i_h // G) * K
        sums_base = sums_in + (start * HV + i_h) * K
        wide = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
        own_rows, rows = tl.arange(0, _R), tl.arange(0, C)
        seen_end = tl.minimum(first + _R, length)  # later columns are not read
        total = tl.zeros([_R, C], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            cols = i_k * BK + tl.arange(0, BK)
            tile_q = load_rows(q + qk_offset, first, length, H * K, cols, _R, K, EVEN)
            tile_k = load_rows(k + qk_offset, row, seen_end, H * K, cols, C, K, EVEN)
            sums = load_rows(sums_base, row, seen_end, HV * K, cols, C, K, EVEN)
            grow, shrink, own_sums, mild = _scale_block(sums_base, sums, block, row, length, HV * K, cols, K, C, EVEN)
            scaled_q, scaled_k = (tile_q * grow).to(wide), (tile_k * shrink).to(wide)
            total += tl.dot(scaled_q, tl.trans(scaled_k), input_precision=PRECISION)
            if not mild:
                for s in range(_R):
                    other = tl.minimum(first + s, length - 1).to(tl.int64)
                    other_k = tl.load(k + qk_offset + other * (H * K) + cols, mask=cols < K, other=0.0)
                    other_sums = tl.load(sums_base + other * (HV * K) + cols, mask=cols < K, other=0.0)
                    fall = tl.where((own_rows >= s)[:, None], own_sums - other_sums[None, :], float("-inf"))
                    fall = tl.exp2(tl.minimum(fall, 0.0))
                    column = tl.sum(tile_q.to(tl.float32) * fall * other_k[None, :].to(tl.float32), 1)
                    total += tl.where((rows == block * _R + s)[None, :], column[:, None], 0.0)
        total = tl.where((own_rows + block * _R)[:, None] >= rows[None, :], total, 0.0)
        store_rows(scores + (start * HV + i_h) * C, total, first, length, HV * C, rows, C=_R, D=C, EVEN=True)


@triton.jit(do_not_specialize=["T", "N"])
def _score_gradients(
    v, do, out, cu_seqlens, scale, N, T,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STRICT: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's scores, scale * do_t . v_s for s <= t, or s < t if STRICT [B, T, HV, C]."""
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = V % BV == 0
        offset = (start * HV + i_h) * V
        rows = tl.arange(0, C)
        pairs = tl.zeros([C, C], tl.float32)
        for i_v in range((V + BV - 1) // BV):
            cols = i_v * BV + tl.arange(0, BV)
            tile_v = load_rows(v + offset, row, length, HV * V, cols, C, V, EVEN)
            tile_do = load_rows(do + offset, row, length, HV * V, cols, C, V, EVEN)
            pairs += tl.dot(tile_do, tl.trans(tile_v), input_precision=PRECISION)
        pairs = tl.where(seen_pairs(False, STRICT, C), pairs * scale, 0.0)
        store_rows(out + (start * HV + i_h) * C, pairs, row, length, HV * C, rows, C, C, True)


@triton.jit(do_not_specialize=["T", "N"])
def _channel_gradients(
    q, k, g, sums_in, pairs_in, q_cross, k_cross, carried, dq_out, dk_out, dg_out, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one chunk and block of key channels: dq, dk and dg, from the sweeps' share and the pairs inside.

    The share of q dq - k dk that comes from pairs is formed from the rounded factors of the products, so that the
    pairs inside the chunk cancel exactly.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    i_k, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        qk_offset = (start * H + i_h // G) * K
        hv_offset = (start * HV + i_h) * K
        pairs_base = pairs_in + (start * HV + i_h) * C
        sums_base = sums_in + hv_offset
        wide = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
        own_rows, rows = tl.arange(0, _R), tl.arange(0, C)
        cols = i_k * BK + tl.arange(0, BK)
        sums = load_rows(sums_base, row, length, HV * K, cols, C, K, EVEN)
        tile_k = load_rows(k + qk_offset, row, length, H * K, cols, C, K, EVEN)
        dk = tl.zeros([C, BK], tl.float32)
        share = tl.zeros([C, BK], tl.float32)
        for block in range(tl.minimum(tl.cdiv(length - row, _R), C // _R)):
            first = row + block * _R
            tile_q = load_rows(q + qk_offset, first, length, H * K, cols, _R, K, EVEN)
            cross = load_rows(q_cross + hv_offset, first, length, HV * K, cols, _R, K, EVEN).to(tl.float32)
            pairs = load_rows(pairs_base, first, length, HV * C, rows, _R, C, True)
            transposed = pairs_base + tl.cast(first, tl.int64) * (HV * C) + own_rows[None, :] * (HV * C) + rows[:, None]
            pairs_t = tl.load(transposed, mask=(own_rows < length - first)[None, :], other=0.0)
            grow, shrink, own_sums, mild = _scale_block(sums_base, sums, block, row, length, HV * K, cols, K, C, EVEN)
            scaled_q, scaled_k = (tile_q * grow).to(wide), (tile_k * shrink).to(wide)
            dq = tl.dot(pairs.to(wide), scaled_k, input_precision=PRECISION)
            add_dk = tl.dot(pairs_t.to(wide), scaled_q, input_precision=PRECISION)
            dk += add_dk * shrink
            share -= scaled_k * add_dk
            own_share = scaled_q * dq
            dq *= grow
            if not mild:
                own_dk = tl.zeros([_R, BK], tl.float32)
                for s in range(_R):
                    other = tl.minimum(first + s, length - 1).to(tl.int64)
                    other_k = tl.load(k + qk_offset + other * (H * K) + cols, mask=cols < K, other=0.0).to(tl.float32)
                    other_sums = tl.load(sums_base + other * (HV * K) + cols, mask=cols < K, other=0.0)
                    seen = (own_rows >= s) & (own_rows < length - first)
                    fall = tl.exp2(
                        tl.where(seen[:, None], tl.minimum(own_sums - other_sums[None, :], 0.0), float("-inf"))
                    )
                    column_at = pairs_base + (first + own_rows).to(tl.int64) * (HV * C) + block * _R + s
                    column = tl.load(column_at, mask=seen, other=0.0).to(tl.float32)
                    fall *= column[:, None]
                    dq += fall * other_k[None, :]
                    own_share += fall * other_k[None, :] * tile_q
                    to_k = tl.sum(fall * tile_q, 0)
                    own_dk += tl.where((own_rows == s)[:, None], to_k[None, :], 0.0)
                    own_share -= tl.where((own_rows == s)[:, None], (to_k * other_k)[None, :], 0.0)
                place = (rows[:, None] == own_rows[None, :] + block * _R).to(tl.float32)
                dk += tl.dot(place, own_dk, input_precision="ieee")
            cross *= tl.exp2(own_sums)
            dq += cross
            own_share += cross * tile_q
            store_rows(dq_out + hv_offset, dq, first, length, HV * K, cols, _R, K, EVEN)
            # These rows' share goes through memory: it is summed over the chunk's rows below.
            store_rows(dg_out + hv_offset, own_share, first, length, HV * K, cols, _R, K, EVEN)
        last = tl.minimum(row + C, length) - 1
        chunk_total = tl.load(sums_base + last.to(tl.int64) * (HV * K) + cols, mask=cols < K, other=0.0)
        if k_cross is not None:
            cross = load_rows(k_cross + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
            cross *= tl.exp2(tl.minimum(chunk_total[None, :] - sums, 0.0))
            dk += cross
            share -= cross * tile_k
        store_rows(dk_out + hv_offset, dk, row, length, HV * K, cols, C, K, EVEN)
        tl.debug_barrier()  # other threads wrote the rows' share
        share += load_rows(dg_out + hv_offset, row, length, HV * K, cols, C, K, EVEN)
        at_slot = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
        after = tl.sum(share, 0)[None, :] - tl.cumsum(share, 0) + share
        if carried is not None:
            after += tl.load(carried + at_slot, mask=cols < K, other=0.0)[None, :]
        gates = load_rows(g + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32) * LOG2E
        dg = tl.where(gates > LOWEST_LOG2, after, 0.0)
        tl.debug_barrier()
        store_rows(dg_out + hv_offset, dg, row, length, HV * K, cols, C, K, EVEN)


@dataclass(frozen=True)
class Call:
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


def make_call(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Call:
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    length = T if cu_seqlens is None else T // N
    cut = plan(N, length, HV, K, V, q.element_size(), g is not None, _num_multiprocessors(q.device))
    return Call(B, T, H, HV, K, V, N, cu_seqlens is not None, cut)


def precision(x: Tensor) -> str:
    # tf32 keeps 10 bits of each factor: as many as fp16 inputs have. It is what fp32 users of the hardware get.
    return "tf32" if x.dtype == torch.float32 else "ieee"


def segment_sums(
    call: Call, y: Tensor, z: Tensor, g: Tensor | None, decay: Tensor | None, cu_seqlens: Tensor | None,
    *, reverse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return what each segment adds to the state [segments, N*HV, K, V] and its log2 decay, if any.

    The entry of the segment that none follows (the last, or the first when ``reverse``) is left unwritten.
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
            REVERSE=reverse, GATE=gate, PRECISION=precision(z), **call.sizes(), num_warps=4, num_stages=3,
        )  # fmt: skip
    return states, totals


def segment_starts(
    call: Call, y: Tensor, z: Tensor, g: Tensor | None, decay: Tensor | None, end_state: Tensor | None,
    cu_seqlens: Tensor | None, *, reverse: bool, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return the state [segments, N*HV, K, V] that every segment starts from; from its end when ``reverse``.

    Args:
        y, z: what is written along the state's rows (K) and columns (V).
        end_state: the first segment's start [N, HV, K, V], times ``scale``.
    """
    K, V, S, heads = call.K, call.V, call.plan.num_segments, call.N * call.HV
    states, totals = segment_sums(call, y, z, g, decay, cu_seqlens, reverse=reverse)
    gate = NO_GATE if totals is None else TOKEN_GATE if decay is None else ROW_GATE
    BLOCK = min(1024, next_power_of_two(K * V))
    _scan_segments[(heads * -(-K * V // BLOCK),)](
        states, totals, end_state, S, scale, DY=K, DZ=V, BLOCK=BLOCK, REVERSE=reverse, GATE=gate,
        HAS_START=end_state is not None, num_warps=4,
    )  # fmt: skip
    return states


@dataclass(frozen=True)
class Sums:
    """What a sweep multiplies its output by to sum gate gradients, and where the sums go."""

    w: Tensor
    kind: int
    out: Tensor


def row_sums(call: Call, w: Tensor, blocks: int) -> Sums:
    return Sums(w, ROW_SUMS, torch.empty(2, blocks, call.HV, call.rows, dtype=torch.float32, device=w.device))


def chunk_sums(call: Call, w: Tensor) -> Sums:
    shape = (call.slots, call.HV, w.shape[-1])
    return Sums(w, CHUNK_SUMS, torch.empty(shape, dtype=torch.float32, device=w.device))


def launch_sweep(
    call: Call, x: Tensor, y: Tensor, z: Tensor, states: Tensor | None,
    *, cu_seqlens: Tensor | None, scale: float, g: Tensor | None = None, decay: Tensor | None = None,
    decay_columns: bool = False, scores: Tensor | None = None, pairs: bool = True,
    reverse: bool = False, transposed: bool = False, last_state: Tensor | None = None, sums: Sums | None = None,
    strict: bool = False, base: Tensor | None = None, wide: bool = False,
    second: tuple[Tensor, Tensor] | None = None, ratio: float = 1.0,
) -> Tensor:  # fmt: skip
    """Run one sweep.

    Args:
        states: where each segment starts [segments, N*HV, ...], or None for zeros.
        decay_columns: whether ``decay`` falls on the state's columns.
        strict: leave out each token's pair with itself.
        base: what out is added to, fp32 [B, T, HV, DZ].
        second, ratio: another (y, z), strict, whose product counts ``ratio`` times as much.

    Returns:
        out [B, T, HV, DZ], in fp32 when ``wide`` or when it is to be summed over a group of heads.
    """
    DY, DZ = y.shape[-1], z.shape[-1]
    config = sweep_config(DY, DZ, z.element_size(), call.plan.load)
    grouped = transposed and call.HV != call.H
    dtype = torch.float32 if grouped or wide else z.dtype
    out = torch.empty(call.B, call.T, call.HV, DZ, dtype=dtype, device=z.device)
    gate = NO_GATE if g is None and decay is None else TOKEN_GATE if decay is None else ROW_GATE
    grid = (call.N * call.HV * -(-DZ // config.block), call.plan.num_segments)
    _sweep[grid](
        x, y, z, *(second or (None, None)), g, decay, scores, states, base, out, last_state,
        None if sums is None else sums.w, None if sums is None else sums.out,
        cu_seqlens, scale, ratio, call.T, call.plan.num_segments, call.rows,
        GXY=call.HV // x.shape[2], GZ=call.HV // z.shape[2], DY=DY, DZ=DZ, BY=padded_dim(DY), BZ=config.block,
        REVERSE=reverse, GATE=COLUMN_GATE if decay_columns else gate,
        PAIRS=GIVEN_PAIRS if scores is not None else OWN_PAIRS if pairs else NO_PAIRS,
        SUMS=NO_SUMS if sums is None else sums.kind, TRANSPOSED=transposed, STRICT=strict, HAS_START=states is not None,
        HAS_LAST=last_state is not None, PRECISION=precision(z), **call.sizes(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Prepared:
    """What `_prepare_channel` makes of q, k and a decay per key channel."""

    sums: Tensor  # G in log2 [B, T, HV, K]
    decay: Tensor  # log2 decay of a chunk [slots, HV, K]
    q: Tensor  # q e^G [B, T, HV, K]
    k: Tensor  # k e^(G_C - G) [B, T, HV, K]
    scores: Tensor  # of q with k [B, T, HV, C]
    k_read: Tensor | None  # k e^G [B, T, HV, K]


def prepare_channels(
    call: Call, q: Tensor, k: Tensor, g: Tensor, cu_seqlens: Tensor | None, *, read_keys: bool = False
) -> Prepared:
    """Scale q and k of every chunk to its ends; also k to its start when ``read_keys``."""
    shape = (call.B, call.T, call.HV, call.K)
    scaled = [torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(3 if read_keys else 2)]
    sums = torch.empty(shape, dtype=torch.float32, device=q.device)
    decay = torch.empty(call.slots, call.HV, call.K, dtype=torch.float32, device=q.device)
    k_read = scaled[2] if read_keys else None
    config = prepare_config(call.K)
    _prepare_channel[(call.slots * call.HV * -(-call.K // config.block),)](
        q, k, g, sums, decay, scaled[0], scaled[1], k_read, cu_seqlens, call.N, call.T, G=call.HV // call.H, K=call.K,
        BK=config.block, N_PADDED=next_power_of_two(call.N), **call.sizes(), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    scores = channel_scores(call, q, k, sums, cu_seqlens)
    return Prepared(sums=sums, decay=decay, q=scaled[0], k=scaled[1], scores=scores, k_read=k_read)


def channel_scores(call: Call, q: Tensor, k: Tensor, sums: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the decayed scores of q with k inside every chunk [B, T, HV, C]."""
    scores = torch.empty(call.B, call.T, call.HV, call.chunk, dtype=q.dtype, device=q.device)
    config = scores_config(call.K)
    _channel_scores[(call.slots * call.HV * (call.chunk // 16),)](
        q, k, sums, scores, cu_seqlens, call.N, call.T, BK=config.block, PRECISION=wide_precision(q),
        G=call.HV // call.H, K=call.K, N_PADDED=next_power_of_two(call.N), **call.sizes(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return scores


def wide_precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.bfloat16 else "tf32"


def token_sums(call: Call, g: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
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
    call = make_call(q, v, g, cu_seqlens)
    final = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    token_gate = token_sums(call, g, cu_seqlens)
    decay, scores, reads, writes = None, None, q, k
    if g is not None and g.ndim == 4:
        made = prepare_channels(call, q, k, g, cu_seqlens)
        decay, scores, reads, writes = made.decay, made.scores, made.q, made.k
    starts: Tensor | None = initial_state
    if call.plan.num_segments > 1:
        starts = segment_starts(call, writes, v, token_gate, decay, initial_state, cu_seqlens, reverse=False)
    o = launch_sweep(
        call, reads, writes, v, starts, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay, scores=scores,
        last_state=final,
    )  # fmt: skip
    kept = starts if starts is not None and starts is not initial_state else final.new_empty(0)
    return o, final, kept


def _backward_impl(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    token_gate = token_sums(call, g, cu_seqlens)
    states = starts if starts.numel() else initial_state
    made = prepare_channels(call, q, k, g, cu_seqlens) if g is not None and g.ndim == 4 else None
    decay = made.decay if made else None
    reads, writes = (made.q, made.k) if made else (q, k)
    d_initial = torch.empty_like(final)
    gradients = dfinal  # the state's gradient from each segment's end on, without the scale
    if call.plan.num_segments > 1 or (dfinal is not None and scale != 1.0):
        gradients = segment_starts(
            call, reads, do, token_gate, decay, dfinal, cu_seqlens, reverse=True, scale=1.0 / scale
        )
    sweep = partial(launch_sweep, call, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay)
    scores = made.scores if made else None
    dv = sweep(writes, reads, do, gradients, scores=scores, reverse=True, last_state=d_initial)
    blocks = -(-call.K // sweep_config(call.V, call.K, q.element_size()).block)
    sums_q, sums_k = None, None
    if token_gate is not None:
        sums_q, sums_k = row_sums(call, q, blocks), row_sums(call, k, blocks)
    elif made:
        sums_q, sums_k = chunk_sums(call, made.q), chunk_sums(call, made.k)
    sweep = partial(sweep, decay_columns=made is not None, pairs=made is None, transposed=True)
    dq = sweep(do, v, writes, states, sums=sums_q)
    dk = sweep(v, do, reads, gradients, sums=sums_k, reverse=True)
    dg = final.new_empty(0)
    if g is not None and sums_q is not None and sums_k is not None:
        boundaries = boundary_shares(call, states, final, gradients, d_initial, scale)
        if made:
            carried = carried_shares(call, boundaries, sums_q, sums_k, cu_seqlens)
            dq, dk, dg = channel_backward(call, q, k, v, do, g, made.sums, dq, dk, carried, cu_seqlens, scale)
        else:
            dg = token_backward(call, g, boundaries, sums_q, sums_k, cu_seqlens)
    return _sum_groups(call, dq, q), _sum_groups(call, dk, k), dv, dg, d_initial


def boundary_shares(
    call: Call, states: Tensor | None, final: Tensor, gradients: Tensor | None, d_initial: Tensor, scale: float
) -> Tensor:
    """Return <S, dS> per key channel at every boundary of segments [segments + 1, N*HV, K]."""
    heads, S = call.N * call.HV, call.plan.num_segments
    out = torch.empty(S + 1, heads, call.K, dtype=torch.float32, device=final.device)
    BK = min(32, padded_dim(call.K))
    _boundary_shares[(heads * -(-call.K // BK), S + 1)](
        states, final, gradients, d_initial, out, S, scale, DY=call.K, DZ=call.V, BK=BK, BV=padded_dim(call.V),
        HAS_STATES=states is not None, HAS_GRADIENTS=gradients is not None, num_warps=4,
    )  # fmt: skip
    return out


def token_backward(
    call: Call, g: Tensor, boundaries: Tensor, sums_q: Sums, sums_k: Sums, cu_seqlens: Tensor | None
) -> Tensor:
    dg = torch.empty_like(g, dtype=torch.float32)
    _token_gate_gradient[(call.N * call.HV, call.plan.num_segments)](
        g, dg, boundaries, sums_q.out, sums_k.out, cu_seqlens, call.T, call.plan.num_segments, call.rows,
        DY=call.K, BK=padded_dim(call.K), BLOCKS=sums_q.out.shape[1], **call.sizes(), num_warps=2,
    )  # fmt: skip
    return dg


def carried_shares(call: Call, boundaries: Tensor, sums_q: Sums, sums_k: Sums, cu_seqlens: Tensor | None) -> Tensor:
    carried = torch.empty_like(sums_q.out)
    _chunk_ends[(call.N * call.HV, call.plan.num_segments)](
        boundaries, sums_q.out, sums_k.out, carried, cu_seqlens, call.T, call.plan.num_segments,
        DY=call.K, BK=padded_dim(call.K), **call.sizes(), num_warps=4,
    )  # fmt: skip
    return carried


def channel_backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor, sums: Tensor, dq: Tensor, dk: Tensor | None,
    carried: Tensor | None, cu_seqlens: Tensor | None, scale: float, *, strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk [B, T, HV, K] and dg, given what the sweeps found of the first two."""
    config = gradients_config(call.K)
    shared = {**call.sizes(), "N_PADDED": next_power_of_two(call.N), "PRECISION": wide_precision(q)}
    pairs = torch.empty(call.B, call.T, call.HV, call.chunk, dtype=v.dtype, device=v.device)
    _score_gradients[(call.slots * call.HV,)](
        v, do, pairs, cu_seqlens, scale, call.N, call.T, V=call.V, BV=min(64, padded_dim(call.V)), STRICT=strict,
        **shared, num_warps=4, num_stages=2,
    )  # fmt: skip
    dg = torch.empty_like(g, dtype=torch.float32)
    dq_out, dk_out = torch.empty_like(dq), torch.empty_like(dq)
    _channel_gradients[(call.slots * call.HV * -(-call.K // config.block),)](
        q, k, g, sums, pairs, dq, dk, carried, dq_out, dk_out, dg, cu_seqlens, call.N, call.T,
        G=call.HV // call.H, K=call.K, BK=config.block, **shared, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return dq_out, dk_out, dg


def _sum_groups(call: Call, gradient: Tensor, like: Tensor) -> Tensor:
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
    call = make_call(q, v, g, cu_seqlens)
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
    ctx.scale, ctx.backward_form = scale, _backward


def _differentiate(ctx, do, dfinal, _dstarts):  # type: ignore[no-untyped-def]
    _, _, v, g, initial_state, *_ = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dg, d_initial = ctx.backward_form(do, dfinal, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None if g is None else dg, None if initial_state is None else d_initial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The same without custom ops, whose bookkeeping takes longer on the host than small shapes on the device."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward_impl(*inputs)
        ctx.mark_non_differentiable(output[2])
        _save(ctx, inputs, output)
        ctx.backward_form = _backward_impl
        return output

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        return _differentiate(ctx, *gradients)


def linear_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run the Triton form; arguments as in `archspec.kernels.linear.linear_attention`, checked there.

    Matrix products take bf16 and fp16 inputs as they are and fp32 inputs as tf32; the state is fp32.
    """
    g = None if g is None else g.float().contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    run = _forward if torch.compiler.is_compiling() else _Direct.apply
    o, final, _ = run(q.contiguous(), k.contiguous(), v.contiguous(), g, state, cu_seqlens, scale)
    return o, final if output_final_state else None
