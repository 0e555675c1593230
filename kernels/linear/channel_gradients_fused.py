"""Gradients of q, k and a decay per key channel from the pairs inside chunks, in the parts of `channels_fused`."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, wide_precision
from archspec.kernels.linear.channels_fused import END_ANCHOR, all_above, halved_factors, split_sums
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    load_rows,
    seen_pairs,
    sequence_bounds,
    slot_chunk,
    store_rows,
)
from archspec.launches import channels_config, next_power_of_two, padded_dim


@triton.jit
def _score_gradients(
    v_base, do_base, out_base, scale, row, length, stride, out_stride,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STRICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write scale * do_t . v_s for s <= t, or s < t if STRICT, [C, C].

    It goes through memory, mostly the first cache: kept, it would take the registers of the tiles.
    """
    EVEN: tl.constexpr = V % BV == 0
    pairs = tl.zeros([C, C], tl.float32)
    for i_v in range((V + BV - 1) // BV):
        cols = i_v * BV + tl.arange(0, BV)
        tile_v = load_rows(v_base, row, length, stride, cols, C, V, EVEN)
        tile_do = load_rows(do_base, row, length, stride, cols, C, V, EVEN)
        pairs = tl.dot(tile_do, tl.trans(tile_v), acc=pairs, input_precision=PRECISION)
    pairs = tl.where(seen_pairs(False, STRICT, C), pairs * scale, 0.0)
    store_rows(out_base, pairs, row, length, out_stride, tl.arange(0, C), C, C, True)


@triton.jit
def _all_score_gradients(
    v, do, erased, pairs_out, own_out, scale, row, length, offset, c_offset,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write those of q's pairs and, given ``erased``, of k's own, for this program to read."""
    _score_gradients(
        v + offset, do + offset, pairs_out + c_offset, scale, row, length, HV * V, HV * C, V, BV, C, False, PRECISION
    )
    if erased is not None:
        _score_gradients(
            v + offset, erased + offset, own_out + c_offset, -1.0, row, length, HV * V, HV * C, V, BV, C, True,
            PRECISION,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _pair_gradients(
    tile_q, tile_k, grow, shrink, seen, pairs_in, own_in, c_offset, row, length, stride, wide: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the share of q dq - k dk that come of pairs, given the factors of readers and of writers.

    Of all pairs that have score gradients, or those ``seen``; of k's own too where there are any. The share is formed
    from the rounded factors of the products, so that the pairs inside the chunk cancel.
    """
    rows = tl.arange(0, C)
    reads, writes = (tile_q * grow).to(wide), (tile_k * shrink).to(wide)
    pairs = load_rows(pairs_in + c_offset, row, length, stride, rows, C, C, True).to(wide)
    if seen is not None:
        pairs = tl.where(seen, pairs, 0.0)
    to_reads = tl.dot(pairs, writes, input_precision=PRECISION)
    to_writes = tl.dot(tl.trans(pairs), reads, input_precision=PRECISION)
    share = reads * to_reads
    dq = to_reads * grow
    dk = 0.0
    if own_in is not None:
        reads = (tile_k * grow).to(wide)
        pairs = load_rows(own_in + c_offset, row, length, stride, rows, C, C, True).to(wide)
        if seen is not None:
            pairs = tl.where(seen, pairs, 0.0)
        to_reads = tl.dot(pairs, writes, input_precision=PRECISION)
        to_writes = tl.dot(tl.trans(pairs), reads, acc=to_writes, input_precision=PRECISION)
        share += reads * to_reads
        dk = to_reads * grow
    return dq, dk + to_writes * shrink, share - writes * to_writes


@triton.jit
def _finish(
    dq, dk, share, from_start, to_end, q_base, k_base, g, offset, q_cross, read_cross, k_cross, carried,
    dq_out, dk_out, dg_out, row, length, slot, i_h, stride, cols,
    HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add what crosses the chunk's ends to what its own pairs gave, and write dq, dk and dg.

    Its share is taken with q and k as the sweeps have them, rounded after they were scaled.
    """
    cross = load_rows(q_cross + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
    tile_q = load_rows(q_base, row, length, stride, cols, C, K, EVEN)
    share += cross * (tile_q * from_start).to(tile_q.dtype)
    store_rows(dq_out + offset, dq + cross * from_start, row, length, HV * K, cols, C, K, EVEN)
    tile_k = load_rows(k_base, row, length, stride, cols, C, K, EVEN)
    cross = load_rows(k_cross + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
    share -= cross * (tile_k * to_end).to(tile_k.dtype)
    dk += cross * to_end
    if read_cross is not None:
        cross = load_rows(read_cross + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
        share += cross * (tile_k * from_start).to(tile_k.dtype)
        dk += cross * from_start
    store_rows(dk_out + offset, dk, row, length, HV * K, cols, C, K, EVEN)
    after = tl.sum(share, 0)[None, :] - tl.cumsum(share, 0) + share
    at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
    after += tl.load(carried + at, mask=cols < K, other=0.0)[None, :]
    gates = load_rows(g + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32) * LOG2E
    dg = tl.where(gates > LOWEST_LOG2, after, 0.0)
    store_rows(dg_out + offset, dg, row, length, HV * K, cols, C, K, EVEN)


@triton.jit(do_not_specialize=["T", "N"])
def _scaled_gradients(
    q, k, g, decay, q_cross, read_cross, k_cross, carried, dq_out, dk_out, dg_out, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr,
):  # fmt: skip
    """For one chunk and block of channels: dq, dk and dg, where the cross shares have the pairs inside already.

    Blocks with a channel that decays too much for that are written again by `_strong_gradients`.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    i_k, slot, i_h = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS // HV, tl.program_id(0) // BLOCKS % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        q_base, k_base = q + (start * H + i_h // G) * K, k + (start * H + i_h // G) * K
        offset = (start * HV + i_h) * K
        cols = i_k * BK + tl.arange(0, BK)
        gates = load_rows(g + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
        at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
        chunk_total = tl.load(decay + at, mask=cols < K, other=0.0)[None, :]
        sums = tl.cumsum(tl.maximum(gates * LOG2E, LOWEST_LOG2), 0)
        _finish(
            0.0, 0.0, 0.0, tl.exp2(sums), tl.exp2(tl.minimum(chunk_total - sums, 0.0)), q_base, k_base, g, offset,
            q_cross, read_cross, k_cross, carried, dq_out, dk_out, dg_out, row, length, slot, i_h, H * K, cols,
            HV, K, C, EVEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def _channel_gradients(
    q, k, g, v, do, erased, decay, pairs_out, own_out, q_cross, read_cross, k_cross, carried, dq_out, dk_out, dg_out,
    cu_seqlens, scale, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one chunk: dq, dk and dg, from the sweeps' share (cross) and the pairs inside, from one anchor.

    Given ``erased``, k reads too: its own pairs s < t have the gradient -erased_t . v_s.
    """
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        q_base, k_base = q + (start * H + i_h // G) * K, k + (start * H + i_h // G) * K
        offset = (start * HV + i_h) * K
        c_offset = (start * HV + i_h) * C
        wide: tl.constexpr = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
        _all_score_gradients(
            v, do, erased, pairs_out, own_out, scale, row, length, (start * HV + i_h) * V, c_offset, HV, V, BV, C,
            PRECISION,
        )  # fmt: skip
        for i_k in range((K + BK - 1) // BK):
            if all_above(decay, END_ANCHOR, slot, i_h, i_k * BK, HV, K, BK) != 0:
                cols = i_k * BK + tl.arange(0, BK)
                gates = load_rows(g + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
                at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
                chunk_total = tl.load(decay + at, mask=cols < K, other=0.0)[None, :]
                tile_q = load_rows(q_base, row, length, H * K, cols, C, K, EVEN)
                tile_k = load_rows(k_base, row, length, H * K, cols, C, K, EVEN)
                sums = tl.cumsum(tl.maximum(gates * LOG2E, LOWEST_LOG2), 0)
                from_start = tl.exp2(sums)
                to_end = tl.exp2(tl.minimum(chunk_total - sums, 0.0))
                anchor = tl.exp2(-0.5 * chunk_total)
                dq, dk, share = _pair_gradients(
                    tile_q, tile_k, from_start * anchor, to_end * anchor, None, pairs_out, own_out, c_offset, row,
                    length, HV * C, wide, C, PRECISION,
                )  # fmt: skip
                _finish(
                    dq, dk, share, from_start, to_end, q_base, k_base, g, offset, q_cross, read_cross, k_cross,
                    carried, dq_out, dk_out, dg_out, row, length, slot, i_h, H * K, cols, HV, K, C, EVEN,
                )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def _strong_gradients(
    q, k, g, v, do, erased, decay, pairs_out, own_out, q_cross, read_cross, k_cross, carried, dq_out, dk_out, dg_out,
    cu_seqlens, scale, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MILD_KNOWN: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for one chunk's blocks of channels in which one decays too much for one anchor.

    The cross shares have the pairs of channels that do not, if MILD_KNOWN.
    """
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length and all_above(decay, END_ANCHOR, slot, i_h, 0, HV, K, K) == 0:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        q_base, k_base = q + (start * H + i_h // G) * K, k + (start * H + i_h // G) * K
        offset = (start * HV + i_h) * K
        c_offset = (start * HV + i_h) * C
        wide: tl.constexpr = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
        _all_score_gradients(
            v, do, erased, pairs_out, own_out, scale, row, length, (start * HV + i_h) * V, c_offset, HV, V, BV, C,
            PRECISION,
        )  # fmt: skip
        for i_k in range((K + BK - 1) // BK):
            if all_above(decay, END_ANCHOR, slot, i_h, i_k * BK, HV, K, BK) == 0:
                cols = i_k * BK + tl.arange(0, BK)
                gates = load_rows(g + offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
                tile_q = load_rows(q_base, row, length, H * K, cols, C, K, EVEN)
                tile_k = load_rows(k_base, row, length, H * K, cols, C, K, EVEN)
                at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
                chunk_total = tl.load(decay + at, mask=cols < K, other=0.0)[None, :]
                gates = tl.maximum(gates * LOG2E, LOWEST_LOG2)
                whole, part = split_sums(gates)
                dq = tl.zeros([C, BK], tl.float32)
                dk = tl.zeros([C, BK], tl.float32)
                share = tl.zeros([C, BK], tl.float32)
                width = tl.full((), C, tl.int32)
                while width > 0:
                    grow, shrink, seen, left = halved_factors(whole, part, width, C)
                    more_q, more_k, more = _pair_gradients(
                        tile_q, tile_k, grow, shrink, seen, pairs_out, own_out, c_offset, row, length, HV * C, wide, C,
                        PRECISION,
                    )  # fmt: skip
                    dq, dk, share = dq + more_q, dk + more_k, share + more
                    width = width // 2 * left
                sums = tl.cumsum(gates, 0)  # as they were rounded for what crosses the chunk's ends
                if MILD_KNOWN:
                    wanted = chunk_total <= END_ANCHOR
                    dq, dk, share = tl.where(wanted, dq, 0.0), tl.where(wanted, dk, 0.0), tl.where(wanted, share, 0.0)
                to_end = tl.exp2(tl.minimum(chunk_total - sums, 0.0))
                _finish(
                    dq, dk, share, tl.exp2(sums), to_end, q_base, k_base, g, offset, q_cross, read_cross,
                    k_cross, carried, dq_out, dk_out, dg_out, row, length, slot, i_h, H * K, cols, HV, K, C, EVEN,
                )  # fmt: skip


def channel_backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor, decay: Tensor, q_cross: Tensor,
    k_cross: Tensor, carried: Tensor, cu_seqlens: Tensor | None, scale: float, *, erased: Tensor | None = None,
    read_cross: Tensor | None = None, has_pairs: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk [B, T, HV, K] and dg, given what crosses the chunks' ends.

    Args:
        decay: log2 decays of chunks [slots, HV, K].
        v, do: [B, T, HV, V]; pairs s <= t have the gradient ``scale * do_t . v_s``.
        q_cross, k_cross: the share of dq and dk without q's and k's own decays.
        carried: dg at the chunks' ends [slots, HV, K].
        erased, read_cross: of k as a reader, whose pairs s < t have the gradient ``-erased_t . v_s``, and its cross.
        has_pairs: whether the cross shares have the pairs inside chunks, but for channels of too strong decay.
    """
    dtype = q.dtype if call.HV == call.H else torch.float32
    dq, dk = (torch.empty_like(q_cross, dtype=dtype) for _ in range(2))
    dg = torch.empty_like(g, dtype=torch.float32)
    pairs, own = (v.new_empty(*v.shape[:3], call.chunk) if x is not None else None for x in (do, erased))
    tile = channels_config(call.K)
    sizes = {
        "G": call.HV // call.H, "K": call.K, "BK": tile.block, "N_PADDED": next_power_of_two(call.N),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, **call.sizes(),
    }  # fmt: skip
    known = q_cross, read_cross, k_cross, carried, dq, dk, dg, cu_seqlens
    of_pairs = {"V": call.V, "BV": min(64, padded_dim(call.V)), "PRECISION": wide_precision(q), **sizes}
    if has_pairs:
        blocks = -(-call.K // tile.block)
        _scaled_gradients[(call.slots * call.HV * blocks,)](q, k, g, decay, *known, call.N, call.T, **sizes)
    else:
        _channel_gradients[(call.slots * call.HV,)](
            q, k, g, v, do, erased, decay, pairs, own, *known, scale, call.N, call.T, **of_pairs
        )
    _strong_gradients[(call.slots * call.HV,)](
        q, k, g, v, do, erased, decay, pairs, own, *known, scale, call.N, call.T, MILD_KNOWN=has_pairs, **of_pairs
    )
    return dq, dk, dg
