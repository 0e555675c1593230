"""A decay per key channel, prepared chunk by chunk in parallel: scaled q and k, and scores of the pairs inside.

With G the sums of the log decays inside a chunk and G_C their total, the score of tokens t >= s is

    sum over channels of q_t k_s e^(G_t - G_s) = (q_t e^(G_t - G_C / 2)) . (k_s e^(G_C / 2 - G_s)),

one product for the whole chunk, since with G_C / 2 as the anchor no exponent exceeds half the chunk's decay. It is
taken in tf32: in bf16 its factors' rounding is the output's largest error (0.0033 in all instead of 0.0027). Where
half the decay is too much, a kernel of its own cuts the chunk in halves until half the decay of none is: pairs in
different halves meet at the middle, where no factor exceeds one, and those in the same half at half its decay. It is
launched always, since only the device knows whether there is anything to do.
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
from archspec.launches import channels_config, next_power_of_two

# The strongest decay of a chunk in log2 that its end serves as the anchor for, where factors reach 2^-decay; and that
# half of it serves for. What factors multiply and sum up to then stays inside fp32's (and bf16's) range of 2^127.
END_ANCHOR = tl.constexpr(-100.0)
HALF_ANCHOR = tl.constexpr(-200.0)


@triton.jit
def all_above(decay, limit, slot, i_h, first, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Whether every channel of ``first`` to ``first + BK`` decays less than to ``limit`` over a chunk."""
    smallest = tl.full((), 0.0, tl.float32)
    for i in tl.static_range((BK + 15) // 16):
        cols = first + i * 16 + tl.arange(0, 16)
        at = (tl.cast(slot, tl.int64) * HV + i_h) * K + cols
        smallest = tl.minimum(smallest, tl.min(tl.load(decay + at, mask=cols < K, other=0.0), 0))
    return (smallest > limit).to(tl.int32)


@triton.jit
def split_sums(gates):
    """Sums of log2 decays over rows [C, BK], of their whole parts, which are exact, and of what is left.

    Differences between sums of thousands would lose three digits of the decay between neighbours.
    """
    whole = tl.floor(gates)
    return tl.cumsum(whole, 0), tl.cumsum(gates - whole, 0)


@triton.jit
def _since(whole, part, index):
    """Sums [C, BK] less those of the rows ``index`` [C], of none where it is negative."""
    at = tl.broadcast_to(tl.maximum(index, 0)[:, None], whole.shape)
    keep = (index >= 0)[:, None]
    return (whole - tl.where(keep, tl.gather(whole, at, 0), 0.0)) + (part - tl.where(keep, tl.gather(part, at, 0), 0.0))


@triton.jit
def halved_factors(whole, part, width, C: tl.constexpr):
    """What serves pairs of rows in blocks of ``width``, given `split_sums` of the chunk.

    Where half of no block's decay is too much, all pairs s <= t of its blocks meet there, and nothing is left. Else
    those in different halves of a block meet at its middle.

    Returns:
        Factors of readers and of writers [C, BK], the pairs [C, C], and whether pairs are left (1 or 0).
    """
    rows = tl.arange(0, C)
    first = rows // width * width
    within = _since(whole, part, first - 1)
    total = within - _since(whole, part, first + width - 1)
    at_middle = _since(whole, part, first + width // 2 - 1)
    left = (tl.min(tl.min(total, 1), 0) <= HALF_ANCHOR).to(tl.int32)
    rise = tl.where(left != 0, at_middle, within - 0.5 * total)
    most = tl.where(left != 0, 0.0, -0.5 * HALF_ANCHOR)
    reads, writes = tl.exp2(tl.minimum(rise, most)), tl.exp2(tl.minimum(-rise, most))
    same = first[:, None] == first[None, :]
    late = rows - first >= width // 2
    apart = late[:, None] & (late[None, :] == 0)
    return reads, writes, same & tl.where(left != 0, apart, rows[:, None] >= rows[None, :]), left


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
            half = tl.maximum(0.5 * chunk_total, 0.5 * HALF_ANCHOR)[None, :]
            to_end = tile_k * tl.exp2(tl.minimum(chunk_total[None, :] - sums, 0.0))
            store_rows(k_out + hv_offset, to_end, row, length, HV * K, cols, C, K, EVEN)
            write = tl.trans(tile_k * tl.exp2(tl.minimum(half - sums, -0.5 * HALF_ANCHOR)))
            # Not e^G times e^(-G_C / 2): e^G may be zero where that product is not.
            from_start, from_half = tl.exp2(sums), tl.exp2(sums - half)
            store_rows(q_out + hv_offset, tile_q * from_start, row, length, HV * K, cols, C, K, EVEN)
            total = tl.dot(tile_q * from_half, write, acc=total, input_precision="tf32")
            if key_scores is not None:
                store_rows(k_read_out + hv_offset, tile_k * from_start, row, length, HV * K, cols, C, K, EVEN)
                key_total = tl.dot(tile_k * from_half, write, acc=key_total, input_precision="tf32")
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
    """Replace the scores of a chunk that has a channel of which half the decay is too strong an anchor."""
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length and all_above(decay, HALF_ANCHOR, slot, i_h, 0, HV, K, K) == 0:
        EVEN: tl.constexpr = K % BK == 0
        H: tl.constexpr = HV // G
        q_base, k_base = q + (start * H + i_h // G) * K, k + (start * H + i_h // G) * K
        rows = tl.arange(0, C)
        total = tl.zeros([C, C], tl.float32)
        key_total = tl.zeros([C, C], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            cols = i_k * BK + tl.arange(0, BK)
            gates = load_rows(g + (start * HV + i_h) * K, row, length, HV * K, cols, C, K, EVEN).to(tl.float32)
            whole, part = split_sums(tl.maximum(gates * LOG2E, LOWEST_LOG2))
            tile_q = load_rows(q_base, row, length, H * K, cols, C, K, EVEN)
            tile_k = load_rows(k_base, row, length, H * K, cols, C, K, EVEN)
            width = tl.full((), C, tl.int32)
            while width > 0:
                reads, writes, pairs, left = halved_factors(whole, part, width, C)
                write = tl.trans(tile_k * writes)
                total += tl.where(pairs, tl.dot(tile_q * reads, write, input_precision="tf32"), 0.0)
                if key_scores is not None:
                    key_total += tl.where(pairs, tl.dot(tile_k * reads, write, input_precision="tf32"), 0.0)
                width = width // 2 * left
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
    config = channels_config(call.K)
    sizes = {
        "G": call.HV // call.H, "K": call.K, "BK": config.block, "N_PADDED": next_power_of_two(call.N),
        "num_warps": config.num_warps, "num_stages": config.num_stages, **call.sizes(),
    }  # fmt: skip
    _prepare_channels[(call.slots * call.HV,)](
        q, k, g, made.decay, made.q, made.k, made.k_read, made.scores, made.key_scores, cu_seqlens, call.N, call.T,
        **sizes,
    )  # fmt: skip
    _strong_scores[(call.slots * call.HV,)](
        q, k, g, made.decay, made.scores, made.key_scores, cu_seqlens, call.N, call.T, **sizes
    )
    return made
