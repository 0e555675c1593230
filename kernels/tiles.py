"""Jitted helpers that the Triton kernels of several families share: tiles of rows, segments, decays in log2.

Imports triton: only modules that are themselves loaded on demand may import this one.

Time is cut into chunks of C tokens, and a sequence's chunks into segments that run side by side. Log decays are
kept in units of log2, so that decays are exp2 of sums.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A decay below 2^-160 is zero in fp32; clamping there keeps sums of -inf from differing by NaN.
LOWEST_LOG2 = tl.constexpr(-160.0)


@triton.jit
def head_and_block(BLOCKS: tl.constexpr):
    """Split the first grid axis, the only one that may be long: sequence and head, then block; and all heads."""
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.num_programs(0) // BLOCKS


@triton.jit
def sequence_bounds(cu_seqlens, n, T, PACKED: tl.constexpr):
    """First row (int64) and length of sequence n: row n of a batch, or a packed one."""
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = tl.cast(n, tl.int64) * T
        length = T
    return start, length


@triton.jit
def segment_chunks(length, s, NUM_SEGMENTS: tl.constexpr, C: tl.constexpr):
    """First chunk of segment s and one past its last; empty segments give equal bounds."""
    chunks = tl.cdiv(length, C)
    per_segment = tl.cdiv(chunks, NUM_SEGMENTS)
    first = tl.minimum(s * per_segment, chunks)
    return first, tl.minimum(first + per_segment, chunks)


@triton.jit
def first_slot(start, n, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Index of sequence n's first chunk in arrays with one entry a chunk.

    Packed sequences leave at most one entry unused each: floor(start / C) + n rises by at least a sequence's chunks.
    """
    return start // C + n if PACKED else tl.cast(n, tl.int64) * tl.cdiv(T, C)


@triton.jit
def slot_chunk(cu_seqlens, slot, N, T, C: tl.constexpr, PACKED: tl.constexpr, N_PADDED: tl.constexpr):
    """Sequence and chunk of that sequence for a slot; the chunk may lie past the sequence's end."""
    if PACKED:
        index = tl.arange(0, N_PADDED)
        starts = tl.load(cu_seqlens + index, mask=index < N, other=0).to(tl.int64)
        slots = starts // C + index
        n = tl.sum(((index < N) & (slots <= slot)).to(tl.int32)) - 1
        start = tl.load(cu_seqlens + n).to(tl.int64)
        chunk = (slot - (start // C + n)).to(tl.int32)
    else:
        per_row = tl.cdiv(T, C)
        n = slot // per_row
        chunk = slot % per_row
    return n, chunk


@triton.jit
def load_rows(base, first, length, stride, cols, C: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Tile [C, len(cols)] of the rows from ``first`` on; zero past row ``length`` and column D."""
    rows = tl.arange(0, C)
    at = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    keep = (rows < length - first)[:, None]
    if not EVEN:
        keep = keep & (cols < D)[None, :]
    return tl.load(at, mask=keep, other=0.0)


@triton.jit
def store_rows(base, tile, first, length, stride, cols, C: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Write a tile [C, len(cols)] to the rows from ``first`` on, inside row ``length`` and column D."""
    rows = tl.arange(0, C)
    at = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    keep = (rows < length - first)[:, None]
    if not EVEN:
        keep = keep & (cols < D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_sums(base, first, length, C: tl.constexpr):
    """A chunk's inclusive sums of log2 decays [C], the last real one repeated past row ``length``; and that one."""
    rows = tl.minimum(first + tl.arange(0, C), length - 1)
    last = tl.minimum(first + C, length) - 1
    return tl.load(base + rows), tl.load(base + last)


@triton.jit
def seen_pairs(REVERSE: tl.constexpr, STRICT: tl.constexpr, C: tl.constexpr):
    """Pairs (row i, column j) with j before i, or after it; with i itself unless STRICT [C, C]."""
    rows = tl.arange(0, C)[:, None]
    cols = tl.arange(0, C)[None, :]
    if REVERSE:
        return rows < cols if STRICT else rows <= cols
    return rows > cols if STRICT else rows >= cols


@triton.jit
def pair_decay(sums, REVERSE: tl.constexpr, C: tl.constexpr):
    """Decay between row i and column j [C, C]: exp2(G_i - G_j) for j <= i, or exp2(G_j - G_i) for j >= i."""
    rows = tl.arange(0, C)[:, None]
    cols = tl.arange(0, C)[None, :]
    if REVERSE:
        return tl.exp2(tl.where(rows <= cols, sums[None, :] - sums[:, None], float("-inf")))
    return tl.exp2(tl.where(rows >= cols, sums[:, None] - sums[None, :], float("-inf")))


@triton.jit
def level_pairs(WIDTH: tl.constexpr, C: tl.constexpr):
    """Pairs (late row, early column) that the middle of a block of 2 * WIDTH separates [C, C]."""
    rows = tl.arange(0, C)
    late = (rows // WIDTH) % 2 == 1
    same = (rows[:, None] // (2 * WIDTH)) == (rows[None, :] // (2 * WIDTH))
    return late[:, None] & (~late)[None, :] & same
