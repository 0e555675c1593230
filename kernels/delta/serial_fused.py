"""The two kernels of the delta rule that walk a sequence chunk by chunk, forward and backward in time.

Both keep the state of a block of value channels in registers. What one chunk's state waits for are three products, one
after the other; all that does not depend on the state was found before, in parallel. A multiprocessor runs two such
programs, so that one works while the other waits.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from archspec.kernels.delta.core_fused import core_product
from archspec.kernels.tiles import (
    first_slot,
    load_rows,
    load_sums,
    pair_decay,
    seen_pairs,
    sequence_bounds,
    store_rows,
)


@triton.jit
def _query_pairs(
    tile_q, tile_k, sums, scores, offset, row, length, stride,
    GATE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Decayed products of a chunk's queries (rows) with its keys up to their own [C, C], in the inputs' dtype."""
    if GATE == 2:
        pairs = load_rows(scores + offset, row, length, stride, tl.arange(0, C), C, C, True)
    else:
        pairs = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION)
        if GATE == 1:
            pairs *= pair_decay(sums, False, C)
        else:
            pairs = tl.where(seen_pairs(False, False, C), pairs, 0.0)
        pairs = pairs.to(tile_q.dtype)
    return pairs


@triton.jit
def _load_chunk(
    q, k, x, core, key_offset, value_offset, pair_offset, row, length, cols_y, cols_z,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A chunk's keys and queries [C, BY], a block of value channels of x [C, BZ], and core [C, C]."""
    tile_k = load_rows(k + key_offset, row, length, HV * DY, cols_y, C, DY, DY == BY)
    tile_q = load_rows(q + key_offset, row, length, HV * DY, cols_y, C, DY, DY == BY)
    tile_x = load_rows(x + value_offset, row, length, HV * DZ, cols_z, C, DZ, DZ % BZ == 0)
    tile_core = load_rows(core + pair_offset, row, length, HV * C, tl.arange(0, C), C, C, True)
    return tile_k, tile_q, tile_x, tile_core


@triton.jit(do_not_specialize=["T", "total_rows"])
def _delta_forward(
    q, k_read, k_write, v, beta, g, decay, core, units, scores, first_state, out, errors, writes, last_state,
    cu_seqlens, scale, T, total_rows,
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
        tile_k, tile_q, tile_v, tile_core = _load_chunk(
            q,
            k_read,
            v,
            core,
            key_offset,
            value_offset,
            pair_offset,
            row,
            length,
            cols_y,
            cols_z,
            HV,
            DY,
            DZ,
            BY,
            BZ,
            C,
        )
        strength = tl.load(beta + (start + row + rows) * HV + i_h, mask=rows < length - row, other=0.0).to(tl.float32)
        unit = tl.load(units + (slot + chunk) * HV + i_h)
        sums = 0.0
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
        dtype = tile_v.dtype
        rounded = state.to(dtype)
        predicted = tl.dot(tile_k, rounded, input_precision=PRECISION)
        if dtype != tl.float32:
            # The other half of the state too: what rounding left of it would go through every later write.
            rest = (state - rounded.to(tl.float32)).to(dtype)
            predicted = tl.dot(tile_k, rest, acc=predicted, input_precision=PRECISION)
        result = tl.dot(tile_q, rounded, input_precision=PRECISION)
        if GATE == 1:
            read = tl.exp2(sums)[:, None]
            predicted *= read
            result *= read
        found = tile_v - predicted
        found -= core_product(tile_core, unit, found * strength[:, None])
        written = (found * strength[:, None]).to(dtype)
        update = written
        if GATE == 1:
            update = (written * tl.exp2(chunk_total - sums)[:, None]).to(dtype)
            state *= tl.exp2(chunk_total)
        pairs = _query_pairs(tile_q, tile_k, sums, scores, pair_offset, row, length, HV * C, GATE, C, PRECISION)
        if GATE == 2:
            tile_k = load_rows(k_write + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
            totals = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(totals)[:, None]
        state = tl.dot(tl.trans(tile_k), update, acc=state, input_precision=PRECISION)
        result = tl.dot(pairs, written, acc=result, input_precision=PRECISION)
        store_rows(errors + value_offset, found, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        store_rows(writes + value_offset, written, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        store_rows(out + value_offset, result * scale, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
    tl.store(last_state + state_at, state, mask=state_keep)


@triton.jit(do_not_specialize=["T", "total_rows"])
def _delta_backward(
    q, k_read, k_write, do, beta, g, decay, core, units, scores, errors, last_gradient, dv, dbeta, gradients,
    first_gradient, cu_seqlens, scale, T, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_LAST: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back: writes dv = beta y [B, T, HV, V], dbeta [blocks, B, T, HV] and dS at the start.

    Every chunk's dS, at its end, is left in ``gradients`` [slots, HV, K, V].
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
    tile_at = cols_y[:, None] * DZ + cols_z[None, :]
    state_at = tl.cast(i_nh, tl.int64) * (DY * DZ) + tile_at
    state_keep = (cols_y < DY)[:, None] & (cols_z < DZ)[None, :]
    if HAS_LAST:
        state = tl.load(last_gradient + state_at, mask=state_keep, other=0.0)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        chunk = chunks - 1 - step
        row = chunk * C
        tile_k, tile_q, tile_do, tile_core = _load_chunk(
            q,
            k_write,
            do,
            core,
            key_offset,
            value_offset,
            pair_offset,
            row,
            length,
            cols_y,
            cols_z,
            HV,
            DY,
            DZ,
            BY,
            BZ,
            C,
        )
        found = load_rows(errors + value_offset, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        own = rows < length - row
        at_token = (start + row + rows) * HV + i_h
        strength = tl.load(beta + at_token, mask=own, other=0.0).to(tl.float32)
        unit = tl.load(units + (slot + chunk) * HV + i_h)
        sums = 0.0
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
        dtype = tile_do.dtype
        pairs = _query_pairs(tile_q, tile_k, sums, scores, pair_offset, row, length, HV * C, GATE, C, PRECISION)
        rounded = state.to(dtype)
        reached = tl.dot(tile_k, rounded, input_precision=PRECISION)
        gradient = tl.dot(tl.trans(pairs), tile_do, input_precision=PRECISION) * scale
        if GATE == 1:
            reached *= tl.exp2(chunk_total - sums)[:, None]
        gradient += reached
        gradient -= core_product(tl.trans(tile_core), unit, gradient * strength[:, None])
        # Like u, rounded once: the keys' gradients are found from the same numbers.
        erased = (gradient * strength[:, None]).to(dtype)
        update, removed = tile_do, -erased
        if GATE == 1:
            read = tl.exp2(sums)[:, None]
            update = (tile_do * read).to(dtype)
            removed = (removed * read).to(dtype)
            state *= tl.exp2(chunk_total)
        if GATE == 2:
            tile_k = load_rows(k_read + key_offset, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
            totals = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(totals)[:, None]
        state = tl.dot(tl.trans(tile_k), removed, acc=state, input_precision=PRECISION)
        state += tl.dot(tl.trans(tile_q), update, input_precision=PRECISION) * scale
        kept = gradients + ((slot + chunk) * HV + i_h) * (DY * DZ) + tile_at
        tl.store(kept, rounded, mask=state_keep)
        at_beta = tl.cast(i_z, tl.int64) * total_rows * HV + at_token
        tl.store(dbeta + at_beta, tl.sum(found.to(tl.float32) * gradient, 1), mask=own)
        store_rows(dv + value_offset, erased, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
    tl.store(first_gradient + state_at, state, mask=state_keep)
