"""The sweep over a sequence's chunks with the state in registers, ``out_i = sum_j decay_ij (x_i . y_j) z_j``."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, precision
from archspec.kernels.linear.channels_fused import END_ANCHOR
from archspec.kernels.tiles import (
    first_slot,
    head_and_block,
    load_rows,
    load_sums,
    pair_decay,
    seen_pairs,
    segment_chunks,
    sequence_bounds,
    store_rows,
)
from archspec.launches import COLUMN_GATE, NO_GATE, ROW_GATE, TOKEN_GATE, padded_dim, sweep_config

# What adds the pairs inside a chunk: nothing, the product x y^T, or scores computed before.
NO_PAIRS, OWN_PAIRS, GIVEN_PAIRS = 0, 1, 2
# What sums of w * out the sweep leaves for gate gradients: none, over columns, or over the chunk.
NO_SUMS, ROW_SUMS, CHUNK_SUMS = 0, 1, 2


@triton.jit(do_not_specialize=["T", "num_segments", "total_rows"])
def _sweep(
    x, y, z, g, decay, scores, states, out, last_state, w, sums_out, cu_seqlens,
    scale, T, num_segments, total_rows,
    HV: tl.constexpr, GXY: tl.constexpr, GZ: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr,
    BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, GATE: tl.constexpr, PAIRS: tl.constexpr, SUMS: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_START: tl.constexpr, HAS_LAST: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale * (x S + pairs z) with the state S [DY, BZ] in registers; S is kept without the scale.

    Where the decay falls on the columns, z is already scaled to the chunk's end (or start, in reverse), and out still
    wants the decay from there: pairs z is brought to the state's scale by e^-G_C. A column whose decay is too strong
    for that (``END_ANCHOR``) leaves its pairs out.

    x, y: [rows, HV/GXY, DY]; z, w: [rows, HV/GZ, DZ]; out: [rows, HV, DZ]; states [segments, N*HV, DY, DZ] (or
    transposed). Sums for gate gradients: ROW_SUMS writes sum_d w out and its share through the state to
    [2, blocks, HV, rows]; CHUNK_SUMS writes sum_t w out per column to [slots, HV, DZ].
    """
    i_nh, i_z, num_heads = head_and_block((DZ + BZ - 1) // BZ)
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

        if PAIRS == 0:
            result = cross
        else:
            if PAIRS == 1:
                pairs = tl.dot(tile_x, tl.trans(tile_y), input_precision=PRECISION)
                if GATE == 1:
                    pairs *= pair_decay(sums, REVERSE, C)
                else:
                    pairs = tl.where(seen_pairs(REVERSE, False, C), pairs, 0.0)
                pairs = pairs.to(tile_z.dtype)
            else:
                pairs = load_rows(scores + (start * HV + i_h) * C, row, length, HV * C, tl.arange(0, C), C, C, True)
                if REVERSE:
                    pairs = tl.trans(pairs)
            if SUMS == 1:
                result = tl.dot(pairs, tile_z, input_precision=PRECISION)
                inside = tl.sum(tile_w * (result * scale), 1)
                result += cross
            elif GATE == 3:
                unfold = tl.exp2(tl.where(chunk_total > END_ANCHOR, -chunk_total, float("-inf")))
                result = cross + tl.dot(pairs, tile_z, input_precision=PRECISION) * unfold[None, :]
            else:
                result = tl.dot(pairs, tile_z, acc=cross, input_precision=PRECISION)
        store_rows(out_base, result * scale, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
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
    wide: bool = False,
) -> Tensor:  # fmt: skip
    """Run one sweep.

    Args:
        states: where each segment starts [segments, N*HV, ...], or None for zeros.
        decay_columns: whether ``decay`` falls on the state's columns.

    Returns:
        out [B, T, HV, DZ], in fp32 when ``wide`` or when it is to be summed over a group of heads.
    """
    DY, DZ = y.shape[-1], z.shape[-1]
    config = sweep_config(DY, DZ, z.element_size(), call.plan.load, gated=g is not None or decay is not None)
    grouped = transposed and call.HV != call.H
    dtype = torch.float32 if grouped or wide else z.dtype
    out = torch.empty(call.B, call.T, call.HV, DZ, dtype=dtype, device=z.device)
    gate = NO_GATE if g is None and decay is None else TOKEN_GATE if decay is None else ROW_GATE
    grid = (call.N * call.HV * -(-DZ // config.block), call.plan.num_segments)
    _sweep[grid](
        x, y, z, g, decay, scores, states, out, last_state,
        None if sums is None else sums.w, None if sums is None else sums.out,
        cu_seqlens, scale, call.T, call.plan.num_segments, call.rows,
        GXY=call.HV // x.shape[2], GZ=call.HV // z.shape[2], DY=DY, DZ=DZ, BY=padded_dim(DY), BZ=config.block,
        REVERSE=reverse, GATE=COLUMN_GATE if decay_columns else gate,
        PAIRS=GIVEN_PAIRS if scores is not None else OWN_PAIRS if pairs else NO_PAIRS,
        SUMS=NO_SUMS if sums is None else sums.kind, TRANSPOSED=transposed, HAS_START=states is not None,
        HAS_LAST=last_state is not None, PRECISION=precision(z), **call.sizes(),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
