"""Gradients of log decays from what the sweeps for q and k left: one a token, or a chunk's ends of one a channel."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call
from archspec.kernels.linear.sweep_fused import Sums
from archspec.kernels.tiles import LOG2E, LOWEST_LOG2, first_slot, head_and_block, segment_chunks, sequence_bounds
from archspec.launches import padded_dim

_RUNTIME = ["T", "num_segments"]


@triton.jit(do_not_specialize=["num_segments"])
def _boundary_shares(
    states, final, gradients, first_gradient, out, num_segments, scale,
    DY: tl.constexpr, DZ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_STATES: tl.constexpr, HAS_GRADIENTS: tl.constexpr,
):  # fmt: skip
    """<S, dS> per row of the state at every boundary of segments [segments + 1, N*HV, K]."""
    i_nh, i_k, num_heads = head_and_block((DY + BK - 1) // BK)
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


@triton.jit
def _group_rows(chunk, end, GROUP: tl.constexpr, C: tl.constexpr):
    """Rows [GROUP, C] of the chunks from ``chunk`` on, and which of them are before ``end``."""
    rows = (chunk + tl.arange(0, GROUP)[:, None]) * C + tl.arange(0, C)[None, :]
    return rows, rows < end


@triton.jit
def _row_sums(
    q_sums, k_sums, i_h, rows, keep, part, HV: tl.constexpr, BLOCKS: tl.constexpr, total_rows
):  # fmt: skip
    """What the sweeps for dq and dk left of some rows, q's less k's: in all (part 0) or through the state (1)."""
    found = tl.zeros(rows.shape, tl.float32)
    for block in range(BLOCKS):
        at = ((tl.cast(part, tl.int64) * BLOCKS + block) * HV + i_h) * total_rows + rows
        found += tl.load(q_sums + at, mask=keep, other=0.0) - tl.load(k_sums + at, mask=keep, other=0.0)
    return found


@triton.jit(do_not_specialize=[*_RUNTIME, "total_rows"])
def _token_gate_gradient(
    g, dg, boundaries, q_sums, k_sums, cu_seqlens, T, num_segments, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, PACKED: tl.constexpr,
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
    end = tl.minimum(length, last * C)
    groups = tl.cdiv(last - first, GROUP)
    missed = 0.0
    for group in range(groups):
        rows, keep = _group_rows(first + group * GROUP, end, GROUP, C)
        missed += tl.sum(tl.sum(_row_sums(q_sums, k_sums, i_h, start + rows, keep, 1, HV, BLOCKS, total_rows), 1), 0)
    correction = (tl.sum(at_start, 0) - carried - missed) / tl.maximum(last - first, 1)
    for step in range(groups):
        chunk = first + (groups - 1 - step) * GROUP
        rows, keep = _group_rows(chunk, end, GROUP, C)
        share = _row_sums(q_sums, k_sums, i_h, start + rows, keep, 0, HV, BLOCKS, total_rows)
        crossing = tl.sum(_row_sums(q_sums, k_sums, i_h, start + rows, keep, 1, HV, BLOCKS, total_rows), 1)
        crossing += tl.where(chunk + tl.arange(0, GROUP) < last, correction, 0.0)
        later = carried + tl.sum(crossing, 0) - tl.cumsum(crossing, 0)
        at = (start + rows) * HV + i_h
        gate = tl.load(g + at, mask=keep, other=0.0).to(tl.float32) * LOG2E
        after = later[:, None] + tl.sum(share, 1)[:, None] - tl.cumsum(share, 1) + share
        tl.store(dg + at, tl.where(gate > LOWEST_LOG2, after, 0.0), mask=keep)
        carried += tl.sum(crossing, 0)


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
        DY=call.K, BK=padded_dim(call.K), BLOCKS=sums_q.out.shape[1], GROUP=16, **call.sizes(), num_warps=4,
    )  # fmt: skip
    return dg


def carried_shares(call: Call, boundaries: Tensor, sums_q: Sums, sums_k: Sums, cu_seqlens: Tensor | None) -> Tensor:
    carried = torch.empty_like(sums_q.out)
    _chunk_ends[(call.N * call.HV, call.plan.num_segments)](
        boundaries, sums_q.out, sums_k.out, carried, cu_seqlens, call.T, call.plan.num_segments,
        DY=call.K, BK=padded_dim(call.K), **call.sizes(), num_warps=4,
    )  # fmt: skip
    return carried
