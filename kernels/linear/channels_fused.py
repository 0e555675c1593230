"""A decay per key channel, prepared chunk by chunk in parallel: scaled q and k, and scores of the pairs inside."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, wide_precision
from archspec.kernels.linear.cost import next_power_of_two, prepare_config, scores_config
from archspec.kernels.tiles import LOG2E, LOWEST_LOG2, load_rows, sequence_bounds, slot_chunk, store_rows

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
