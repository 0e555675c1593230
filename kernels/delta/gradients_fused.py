"""Gradients of the delta rule's queries, keys and decays, chunk by chunk in parallel.

With a chunk's start state S, the gradient dS at its end, what was written u and what its gradient erases, y' = beta y,

    P1 = do u^T for s <= t,     P2 = y' u^T for s < t       (times the decays between t and s)
    dq       = scale (e^G do S^T + P1 k)
    dk       = dk_read + dk_write,      dk_read = -(e^G y' S^T + P2 k)
    dk_write = e^(G_C - G) u dS^T + scale P1^T q - P2^T k

The gradient of token t's log decay is the share of the loss of all pairs (i, j) with j < t <= i,

    dg_t = <S_end, dS> + sum over s >= t of (q dq + k dk_read - k dk_write)_s,
    <S_end, dS> = e^(G_C) <S, dS> + sum over s of k_s e^(G_C - G_s) (u dS^T)_s,

summed over key channels or, with a decay per channel, for each. States are found again, by one pass over k and u.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from archspec.kernels.linear.channels_fused import END_ANCHOR
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    first_slot,
    load_rows,
    load_sums,
    pair_decay,
    seen_pairs,
    sequence_bounds,
    slot_chunk,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "total_rows"])
def _chunk_states(
    y, z, g, decay, first_state, states, cu_seqlens, T, total_rows,
    HV: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_START: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that every chunk starts from [slots, HV, DY, DZ], from keys y and writes z."""
    BLOCKS_Z: tl.constexpr = (DZ + BZ - 1) // BZ
    BLOCKS: tl.constexpr = BLOCKS_Z * ((DY + BY - 1) // BY)
    i_nh, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    i_n, i_h = i_nh // HV, i_nh % HV
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    cols_y, cols_z = i_block // BLOCKS_Z * BY + tl.arange(0, BY), i_block % BLOCKS_Z * BZ + tl.arange(0, BZ)
    EVEN_Y: tl.constexpr = DY % BY == 0
    EVEN_Z: tl.constexpr = DZ % BZ == 0
    slot = first_slot(start, i_n, T, C, PACKED)
    keep = (cols_y < DY)[:, None] & (cols_z < DZ)[None, :]
    tile_at = cols_y[:, None] * DZ + cols_z[None, :]
    state = tl.zeros([BY, BZ], tl.float32)
    if HAS_START:
        state = tl.load(first_state + tl.cast(i_nh, tl.int64) * (DY * DZ) + tile_at, mask=keep, other=0.0)
    for chunk in range(tl.cdiv(length, C)):
        row = chunk * C
        tile_y = load_rows(y + (start * HV + i_h) * DY, row, length, HV * DY, cols_y, C, DY, EVEN_Y)
        tile_z = load_rows(z + (start * HV + i_h) * DZ, row, length, HV * DZ, cols_z, C, DZ, EVEN_Z)
        kept = states + ((slot + chunk) * HV + i_h) * (DY * DZ) + tile_at
        tl.store(kept, state.to(states.dtype.element_ty), mask=keep)
        if GATE == 1:
            sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
            tile_z = (tile_z * tl.exp2(chunk_total - sums)[:, None]).to(tile_z.dtype)
            state *= tl.exp2(chunk_total)
        if GATE == 2:
            totals = tl.load(decay + ((slot + chunk) * HV + i_h) * DY + cols_y, mask=cols_y < DY, other=0.0)
            state *= tl.exp2(totals)[:, None]
        state = tl.dot(tl.trans(tile_y), tile_z, acc=state, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "N", "total_rows"])
def _delta_gradients(
    q, k, k_read, do, u, erased, gates, g, decay, states, gradients, dq_out, dk_out, dk_write_out, dg_out, cu_seqlens,
    scale, N, T, total_rows,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg [blocks, B, T, HV] of one chunk and block of key channels.

    With a decay per channel q, k_read and k are q e^G, k e^G and k e^(G_C - G), and gradients are of these: dq_out
    and dk_out as readers, dk_write_out as the writer, and <S_end, dS> per channel in dg_out [slots, HV, K]. If PAIRS
    they have the pairs inside the chunk, brought to the same scale by e^-G_C; a channel whose decay is too strong for
    that (``END_ANCHOR``) leaves its pairs out. Otherwise they have what crosses the chunk's ends.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    i_k, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN_K: tl.constexpr = K % BK == 0
        EVEN_V: tl.constexpr = V % BV == 0
        key_offset, value_offset = (start * HV + i_h) * K, (start * HV + i_h) * V
        cols_k = i_k * BK + tl.arange(0, BK)
        at_state = (tl.cast(slot, tl.int64) * HV + i_h) * (K * V)
        dtype = q.dtype.element_ty
        dq = tl.zeros([C, BK], tl.float32)
        dk = tl.zeros([C, BK], tl.float32)
        dk_write = tl.zeros([C, BK], tl.float32)
        shared = tl.zeros([BK], tl.float32)
        if PAIRS:
            pairs = tl.zeros([C, C], tl.float32)
            erased_pairs = tl.zeros([C, C], tl.float32)
        for i_v in range((V + BV - 1) // BV):
            cols_v = i_v * BV + tl.arange(0, BV)
            tile_u = load_rows(u + value_offset, row, length, HV * V, cols_v, C, V, EVEN_V)
            tile_do = load_rows(do + value_offset, row, length, HV * V, cols_v, C, V, EVEN_V)
            tile_erased = load_rows(erased + value_offset, row, length, HV * V, cols_v, C, V, EVEN_V)
            at = at_state + cols_k[:, None] * V + cols_v[None, :]
            keep = (cols_k < K)[:, None] & (cols_v < V)[None, :]
            state = tl.load(states + at, mask=keep, other=0.0)
            gradient = tl.load(gradients + at, mask=keep, other=0.0)
            dq = tl.dot(tile_do, tl.trans(state), acc=dq, input_precision=PRECISION)
            dk = tl.dot(tile_erased, tl.trans(state), acc=dk, input_precision=PRECISION)
            dk_write = tl.dot(tile_u, tl.trans(gradient), acc=dk_write, input_precision=PRECISION)
            if GATE != 0:
                shared += tl.sum(state.to(tl.float32) * gradient.to(tl.float32), 1)
            if PAIRS:
                pairs = tl.dot(tile_do, tl.trans(tile_u), acc=pairs, input_precision=PRECISION)
                erased_pairs = tl.dot(tile_erased, tl.trans(tile_u), acc=erased_pairs, input_precision=PRECISION)
        tile_k = load_rows(k + key_offset, row, length, HV * K, cols_k, C, K, EVEN_K)
        if PAIRS:
            tile_q = load_rows(q + key_offset, row, length, HV * K, cols_k, C, K, EVEN_K)
        if GATE == 2:
            totals = tl.load(decay + (tl.cast(slot, tl.int64) * HV + i_h) * K + cols_k, mask=cols_k < K, other=0.0)
            shared = shared * tl.exp2(totals) + tl.sum(tile_k * dk_write, 0)
            at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols_k
            tl.store(dg_out + at, shared, mask=cols_k < K)
            if PAIRS:
                tile_k_read = load_rows(k_read + key_offset, row, length, HV * K, cols_k, C, K, EVEN_K)
                pairs = tl.where(seen_pairs(False, False, C), pairs, 0.0).to(dtype)
                erased_pairs = tl.where(seen_pairs(False, True, C), erased_pairs, 0.0).to(dtype)
                unfold = tl.exp2(tl.where(totals > END_ANCHOR, -totals, float("-inf")))[None, :]
                dq += tl.dot(pairs, tile_k, input_precision=PRECISION) * unfold
                dk += tl.dot(erased_pairs, tile_k, input_precision=PRECISION) * unfold
                own = tl.dot(tl.trans(pairs), tile_q, input_precision=PRECISION) * scale
                own -= tl.dot(tl.trans(erased_pairs), tile_k_read, input_precision=PRECISION)
                dk_write += own * unfold
            store_rows(dq_out + key_offset, dq * scale, row, length, HV * K, cols_k, C, K, EVEN_K)
            store_rows(dk_out + key_offset, -dk, row, length, HV * K, cols_k, C, K, EVEN_K)
            store_rows(dk_write_out + key_offset, dk_write, row, length, HV * K, cols_k, C, K, EVEN_K)
        else:
            if GATE == 1:
                sums, chunk_total = load_sums(g + i_h * total_rows + start, row, length, C)
                fall = pair_decay(sums, False, C)
                pairs *= fall
                erased_pairs *= fall
                read = tl.exp2(sums)[:, None]
                dq *= read
                dk *= read
                dk_write *= tl.exp2(chunk_total - sums)[:, None]
                crossing = tl.sum(tl.sum(tile_k * dk_write, 1), 0) + tl.exp2(chunk_total) * tl.sum(shared, 0)
            pairs = tl.where(seen_pairs(False, False, C), pairs * scale, 0.0).to(dtype)
            erased_pairs = tl.where(seen_pairs(False, True, C), erased_pairs, 0.0).to(dtype)
            dq = tl.dot(pairs, tile_k, acc=dq * scale, input_precision=PRECISION)
            dk = tl.dot(erased_pairs, tile_k, acc=dk, input_precision=PRECISION)
            dk_write = tl.dot(tl.trans(pairs), tile_q, acc=dk_write, input_precision=PRECISION)
            dk_write -= tl.dot(tl.trans(erased_pairs), tile_k, input_precision=PRECISION)
            store_rows(dq_out + key_offset, dq, row, length, HV * K, cols_k, C, K, EVEN_K)
            store_rows(dk_out + key_offset, dk_write - dk, row, length, HV * K, cols_k, C, K, EVEN_K)
            if GATE == 1:
                share = tl.sum(tile_q * dq - tile_k * (dk + dk_write), 1)
                after = crossing + tl.sum(share, 0) - tl.cumsum(share, 0) + share
                rows = tl.arange(0, C)
                at = (start + row + rows) * HV + i_h
                own = rows < length - row
                gate = tl.load(gates + at, mask=own, other=0.0).to(tl.float32) * LOG2E
                at += tl.cast(i_k, tl.int64) * total_rows * HV
                tl.store(dg_out + at, tl.where(gate > LOWEST_LOG2, after, 0.0), mask=own)
