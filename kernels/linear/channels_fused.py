"""A decay per key channel, prepared chunk by chunk in parallel: scaled q and k, and scores of the pairs inside.

With G the sums of the log decays inside a chunk and G_C their total, the score of tokens t >= s is

    sum over channels of q_t k_s e^(G_t - G_s) = (q_t e^(G_t - G_C / 2)) . (k_s e^(G_C / 2 - G_s)),

one product for the whole chunk, since with G_C / 2 as the anchor no exponent exceeds half the chunk's decay. It is
taken in tf32: in bf16 its factors' rounding is the output's largest error (0.0033 in all instead of 0.0027). Where
half the decay is too much, a kernel of its own takes the pairs by sixteen rows: those before the rows from the anchor
G at the row before them, where no factor exceeds one, and those among them one distance t - s at a time, with their
exact decay. It is launched always, since only the device knows whether there is anything to do, and mostly finds
nothing.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call
from archspec.kernels.tiles import LOG2E, LOWEST_LOG2, load_rows, sequence_bounds, slot_chunk, store_rows
from archspec.launches import next_power_of_two, prepare_config

# The strongest decay of a chunk in log2 that one anchor serves: a product of two factors, also of a pair that is
# masked afterwards, then stays inside fp32's (and bf16's) range, with room for the size of q and k.
ONE_ANCHOR = tl.constexpr(-100.0)
BLOCK_ROWS = tl.constexpr(16)


@triton.jit
def one_anchor(decay, slot, i_h, first, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Whether no channel of ``first`` to ``first + BK`` decays too much over a chunk for one anchor."""
    smallest = tl.full((), 0.0, tl.float32)
    for i in tl.static_range((BK + 15) // 16):
        cols = first + i * 16 + tl.arange(0, 16)
        at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
        smallest = tl.minimum(smallest, tl.min(tl.load(decay + at, mask=cols < K, other=0.0), 0))
    return (smallest > ONE_ANCHOR).to(tl.int32)


@triton.jit
def block_factors(sums, block, C: tl.constexpr):
    """Factors of the rows of a block and of the rows before it, zero elsewhere [C, BK], from the row before it."""
    rows = tl.arange(0, C)[:, None]
    anchor = tl.sum(tl.where(rows == block * BLOCK_ROWS - 1, sums, 0.0), 0)[None, :]
    grow = tl.exp2(tl.where(rows // BLOCK_ROWS == block, sums - anchor, float("-inf")))
    return grow, tl.exp2(tl.where(rows < block * BLOCK_ROWS, anchor - sums, float("-inf")))


@triton.jit
def load_shifted(base, first, length, stride, cols, shift, C: tl.constexpr, D: tl.constexpr):
    """Rows ``shift`` after those of a chunk [C, len(cols)]; zero outside each row's own block of sixteen."""
    rows = tl.arange(0, C)
    place = rows % BLOCK_ROWS + shift
    keep = (place >= 0) & (place < BLOCK_ROWS) & (rows + shift < length - first)
    at = base + (tl.cast(first, tl.int64) + rows + shift)[:, None] * stride + cols[None, :]
    return tl.load(at, mask=keep[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_fall(base, first, length, stride, cols, shift, C: tl.constexpr, D: tl.constexpr):
    """Log2 decays of the rows that `load_shifted` loads."""
    return tl.maximum(load_shifted(base, first, length, stride, cols, shift, C, D) * LOG2E, LOWEST_LOG2)


@triton.jit
def _near_scores(tile, k_base, g_base, row, length, k_stride, g_stride, cols, C: tl.constexpr, K: tl.constexpr):
    """Scores [C, C] of a tile's rows with the keys of their own block of sixteen."""
    rows = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    fall = tl.zeros(tile.shape, tl.float32)
    for distance in range(BLOCK_ROWS):
        key = load_shifted(k_base, row, length, k_stride, cols, -distance, C, K)
        if distance > 0:
            fall += load_fall(g_base, row, length, g_stride, cols, 1 - distance, C, K)
        value = tl.sum(tile * key * tl.exp2(fall), 1)
        total += tl.where(rows[None, :] == rows[:, None] - distance, value[:, None], 0.0)
    return total


@triton.jit(do_not_specialize=["T", "N"])
def _prepare_channels(
    q, k, g, decay, q_out, k_out, k_read_out, scores, key_scores, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr,
):  # fmt: skip
    """For one chunk: its log2 decay, q e^G, k e^(G_C - G), and the scores of q with k for s <= t, from one anchor.

    Given k_read_out and key_scores, k e^G and the scores of k with k as well.
    """
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
        total = tl.zeros([C, C], tl.float32)
        if key_scores is not None:
            key_total = tl.zeros([C, C], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            cols = i_k * BK + tl.arange(0, BK)
            gates = load_rows(g + hv_offset, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
            tile_q = load_rows(q + qk_offset, row, length, H * K, cols, C, K, EVEN)
            tile_k = load_rows(k + qk_offset, row, length, H * K, cols, C, K, EVEN)
            gates = tl.maximum(gates * LOG2E, LOWEST_LOG2)
            sums = tl.cumsum(gates, 0)
            chunk_total = tl.sum(gates, 0)
            tl.store(decay + (tl.cast(slot, tl.int64) * HV + i_h) * K + cols, chunk_total, mask=cols < K)
            anchor = tl.exp2(tl.minimum(-0.5 * chunk_total, -0.5 * ONE_ANCHOR))[None, :]
            to_end = tile_k * tl.exp2(tl.minimum(chunk_total[None, :] - sums, 0.0))
            store_rows(k_out + hv_offset, to_end, row, length, HV * K, cols, C, K, EVEN)
            write = tl.trans(to_end * anchor)
            from_start = tl.exp2(sums)
            read = tile_q * from_start
            store_rows(q_out + hv_offset, read, row, length, HV * K, cols, C, K, EVEN)
            total = tl.dot(read * anchor, write, acc=total, input_precision="tf32")
            if key_scores is not None:
                read = tile_k * from_start
                store_rows(k_read_out + hv_offset, read, row, length, HV * K, cols, C, K, EVEN)
                key_total = tl.dot(read * anchor, write, acc=key_total, input_precision="tf32")
        seen = rows[:, None] >= rows[None, :]
        at = (start * HV + i_h) * C
        store_rows(scores + at, tl.where(seen, total, 0.0), row, length, HV * C, rows, C, C, True)
        if key_scores is not None:
            store_rows(key_scores + at, tl.where(seen, key_total, 0.0), row, length, HV * C, rows, C, C, True)


@triton.jit(do_not_specialize=["T", "N"])
def _strong_scores(
    q, k, g, decay, scores, key_scores, cu_seqlens, N, T,
    HV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr,
):  # fmt: skip
    """Replace the scores of a chunk that has a channel whose decay is too strong for one anchor."""
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length and one_anchor(decay, slot, i_h, 0, HV, K, K) == 0:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        q_base, k_base = q + (start * H + i_h // G) * K, k + (start * H + i_h // G) * K
        g_base = g + (start * HV + i_h) * K
        rows = tl.arange(0, C)
        total = tl.zeros([C, C], tl.float32)
        key_total = tl.zeros([C, C], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            cols = i_k * BK + tl.arange(0, BK)
            gates = load_rows(g_base, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
            sums = tl.cumsum(tl.maximum(gates * LOG2E, LOWEST_LOG2), 0)
            tile_q = load_rows(q_base, row, length, H * K, cols, C, K, EVEN).to(tl.float32)
            tile_k = load_rows(k_base, row, length, H * K, cols, C, K, EVEN).to(tl.float32)
            for block in range(1, C // BLOCK_ROWS):
                grow, shrink = block_factors(sums, block, C)
                write = tl.trans(tile_k * shrink)
                total = tl.dot(tile_q * grow, write, acc=total, input_precision="tf32")
                if key_scores is not None:
                    key_total = tl.dot(tile_k * grow, write, acc=key_total, input_precision="tf32")
            total += _near_scores(tile_q, k_base, g_base, row, length, H * K, HV * K, cols, C, K)
            if key_scores is not None:
                key_total += _near_scores(tile_k, k_base, g_base, row, length, H * K, HV * K, cols, C, K)
        at = (start * HV + i_h) * C
        store_rows(scores + at, total, row, length, HV * C, rows, C, C, True)
        if key_scores is not None:
            store_rows(key_scores + at, key_total, row, length, HV * C, rows, C, C, True)


@dataclass(frozen=True)
class Prepared:
    """What `_prepare_channels` makes of q, k and a decay per key channel."""

    decay: Tensor  # log2 decay of a chunk [slots, HV, K]
    q: Tensor  # q e^G [B, T, HV, K]
    k: Tensor  # k e^(G_C - G) [B, T, HV, K]
    scores: Tensor  # of q with k [B, T, HV, C]
    k_read: Tensor | None = None  # k e^G [B, T, HV, K]
    key_scores: Tensor | None = None  # of k with k [B, T, HV, C]


def takes_pairs(q: Tensor) -> bool:
    """Return whether sums over a chunk take the pairs inside it too, by factors up to e^-G_C.

    fp16 has no room for these: there the pairs of a decay per channel are taken later.
    """
    return q.dtype != torch.float16


def empty_channels(call: Call, q: Tensor, *, read_keys: bool = False) -> Prepared:
    """Return what `prepare_channels` fills."""
    shape = (call.B, call.T, call.HV)
    keys = [q.new_empty(*shape, call.K) for _ in range(3 if read_keys else 2)]
    scores = [q.new_empty(*shape, call.chunk) for _ in range(2 if read_keys else 1)]
    decay = q.new_empty(call.slots, call.HV, call.K, dtype=torch.float32)
    return Prepared(decay, keys[0], keys[1], scores[0], *([keys[2], scores[1]] if read_keys else []))


def prepare_channels(
    call: Call, q: Tensor, k: Tensor, g: Tensor, cu_seqlens: Tensor | None, *, read_keys: bool = False
) -> Prepared:
    """Scale q and k of every chunk to its ends and take their scores; of k as a reader too when ``read_keys``."""
    made = empty_channels(call, q, read_keys=read_keys)
    config = prepare_config(call.K)
    shared = {
        "G": call.HV // call.H, "K": call.K, "BK": config.block, "N_PADDED": next_power_of_two(call.N),
        "num_warps": config.num_warps, "num_stages": config.num_stages, **call.sizes(),
    }  # fmt: skip
    _prepare_channels[(call.slots * call.HV,)](
        q, k, g, made.decay, made.q, made.k, made.k_read, made.scores, made.key_scores, cu_seqlens, call.N, call.T,
        **shared,
    )  # fmt: skip
    _strong_scores[(call.slots * call.HV,)](
        q, k, g, made.decay, made.scores, made.key_scores, cu_seqlens, call.N, call.T, **shared
    )
    return made
