"""Gradients of q, k and a decay per key channel from the pairs inside chunks."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, wide_precision
from archspec.kernels.linear.channels_fused import _R, _scale_block
from archspec.kernels.linear.cost import gradients_config, next_power_of_two, padded_dim
from archspec.kernels.tiles import (
    LOG2E,
    LOWEST_LOG2,
    load_rows,
    seen_pairs,
    sequence_bounds,
    slot_chunk,
    store_rows,
)


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
