"""Log decays summed inside chunks, and the states that segments of a sequence start from.

When there are too few heads to fill the device, sequences are cut into segments: `_segment_states` finds what each
segment adds to the state, and `_scan_segments` chains them.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, precision
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    first_slot,
    head_and_block,
    load_rows,
    load_sums,
    segment_chunks,
    sequence_bounds,
    slot_chunk,
)
from archspec.launches import NO_GATE, ROW_GATE, TOKEN_GATE, next_power_of_two, padded_dim

_RUNTIME = ["T", "num_segments"]


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
    i_nh, i_block, num_heads = head_and_block(BLOCKS)
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
    i_nh, i_block, num_heads = head_and_block((DY * DZ + BLOCK - 1) // BLOCK)
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
