"""The triangular inverse of the delta rule's chunks as a Triton kernel, one warp a chunk.

With a the strictly lower triangular, decayed products of a chunk's keys and B = Diag(beta), the chunk needs

    core = (I + a B)^{-1} a,        so that        (I + a B)^{-1} r = r - core (beta r).

For tokens cut in two, early (1) and late (2), with a21 between them and the cores of both known,

    core21 = (I - core2 B2) a21 (I - B1 core1),

so that core is built by joining blocks, from single tokens (whose core is zero) to the chunk, and no inverse is formed.
Unlike a power series this does not cancel for like keys. Only blocks that are not zero are multiplied: a chunk is kept
as blocks of 16 tokens, each one warp's own matrix product.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.call import Call, precision
from archspec.kernels.linear.channels_fused import Prepared
from archspec.kernels.tiles import level_pairs, load_rows, sequence_bounds, slot_chunk, store_rows
from archspec.launches import next_power_of_two, padded_dim

_R = tl.constexpr(16)
# Entries of core are kept in fp16 between this and 2^-14 (2^-24 with fewer bits), times one factor a chunk.
_LARGEST = tl.constexpr(16384.0)
# What a divisor is at least; a chunk whose entries are all smaller keeps them in fewer bits.
_SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _between(late, late_strength, pairs, early, early_strength, PRECISION: tl.constexpr):
    """(I - late B2) pairs (I - B1 early): core between two blocks of tokens."""
    right = pairs - tl.dot(pairs * early_strength[None, :], early, input_precision=PRECISION)
    return right - tl.dot(late * late_strength[None, :], right, input_precision=PRECISION)


@triton.jit
def _own_core(pairs, strength, PRECISION: tl.constexpr):
    """Core of one block of 16 tokens: single tokens joined to two, four, eight and sixteen."""
    core = tl.where(level_pairs(1, _R), pairs, 0.0)
    for level in tl.static_range(1, 4):
        join = tl.where(level_pairs(2**level, _R), pairs, 0.0)
        core += _between(core, strength, join, core, strength, PRECISION)
    return core


@triton.jit
def _key_products(
    k, row, length, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """Products of a chunk's keys by blocks of 16 tokens: 00, 10, 11, 20, ... 33 (zero past C)."""
    EVEN: tl.constexpr = K % BK == 0
    p00 = tl.zeros([_R, _R], tl.float32)
    p10 = tl.zeros([_R, _R], tl.float32)
    p11 = tl.zeros([_R, _R], tl.float32)
    p20 = tl.zeros([_R, _R], tl.float32)
    p21 = tl.zeros([_R, _R], tl.float32)
    p22 = tl.zeros([_R, _R], tl.float32)
    p30 = tl.zeros([_R, _R], tl.float32)
    p31 = tl.zeros([_R, _R], tl.float32)
    p32 = tl.zeros([_R, _R], tl.float32)
    p33 = tl.zeros([_R, _R], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        cols = i_k * BK + tl.arange(0, BK)
        k0 = load_rows(k, row, length, HV * K, cols, _R, K, EVEN)
        k1 = load_rows(k, row + _R, length, HV * K, cols, _R, K, EVEN)
        p00 = tl.dot(k0, tl.trans(k0), acc=p00, input_precision=PRECISION)
        p10 = tl.dot(k1, tl.trans(k0), acc=p10, input_precision=PRECISION)
        p11 = tl.dot(k1, tl.trans(k1), acc=p11, input_precision=PRECISION)
        if C == 64:
            k2 = load_rows(k, row + 2 * _R, length, HV * K, cols, _R, K, EVEN)
            k3 = load_rows(k, row + 3 * _R, length, HV * K, cols, _R, K, EVEN)
            p20 = tl.dot(k2, tl.trans(k0), acc=p20, input_precision=PRECISION)
            p21 = tl.dot(k2, tl.trans(k1), acc=p21, input_precision=PRECISION)
            p22 = tl.dot(k2, tl.trans(k2), acc=p22, input_precision=PRECISION)
            p30 = tl.dot(k3, tl.trans(k0), acc=p30, input_precision=PRECISION)
            p31 = tl.dot(k3, tl.trans(k1), acc=p31, input_precision=PRECISION)
            p32 = tl.dot(k3, tl.trans(k2), acc=p32, input_precision=PRECISION)
            p33 = tl.dot(k3, tl.trans(k3), acc=p33, input_precision=PRECISION)
    return p00, p10, p11, p20, p21, p22, p30, p31, p32, p33


@triton.jit
def _seen(pairs, sums, row, length, LATE: tl.constexpr, EARLY: tl.constexpr, GATE: tl.constexpr):
    """A block of pairs [16, 16] times the decays between its tokens, zero where the column is not before the row."""
    rows, cols = tl.arange(0, _R) + LATE * _R, tl.arange(0, _R) + EARLY * _R
    if GATE == 1:
        late = tl.load(sums + tl.minimum(row + rows, length - 1))
        early = tl.load(sums + tl.minimum(row + cols, length - 1))
        # Later rows have decayed more: at most one, also past the sequence's end.
        pairs *= tl.exp2(tl.minimum(late[:, None] - early[None, :], 0.0))
    if LATE == EARLY:
        pairs = tl.where(rows[:, None] > cols[None, :], pairs, 0.0)
    return pairs


@triton.jit
def _given(scores, row, length, stride, LATE: tl.constexpr, EARLY: tl.constexpr, C: tl.constexpr):
    cols = tl.arange(0, _R) + EARLY * _R
    return load_rows(scores, row + LATE * _R, length, stride, cols, _R, C, True).to(tl.float32)


@triton.jit
def _load_strength(beta, row, length, HV: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, _R) + (row + BLOCK * _R)
    return tl.load(beta + rows.to(tl.int64) * HV, mask=rows < length, other=0.0).to(tl.float32)


@triton.jit
def _store_block(base, block, row, length, stride, LATE: tl.constexpr, EARLY: tl.constexpr, C: tl.constexpr):
    cols = tl.arange(0, _R) + EARLY * _R
    store_rows(base, block, row + LATE * _R, length, stride, cols, _R, C, True)


@triton.jit(do_not_specialize=["T", "N", "total_rows"])
def _delta_core(
    k, beta, g, scores, core, units, cu_seqlens, N, T, total_rows,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, N_PADDED: tl.constexpr, PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    """core of one chunk of 32 or 64 tokens [B, T, HV, C], and what its entries are to be multiplied by [slots, HV].

    With decays per channel, from the keys' given ``scores``.
    """
    slot, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_n, chunk = slot_chunk(cu_seqlens, slot, N, T, C, PACKED, N_PADDED)
    start, length = sequence_bounds(cu_seqlens, i_n, T, PACKED)
    row = chunk * C
    if row < length:
        pair_offset = (start * HV + i_h) * C
        sums = g
        if GATE == 1:
            sums = g + i_h * total_rows + start
        if GATE == 2:
            given = scores + pair_offset
            a00 = _given(given, row, length, HV * C, 0, 0, C)
            a10 = _given(given, row, length, HV * C, 1, 0, C)
            a11 = _given(given, row, length, HV * C, 1, 1, C)
            if C == 64:
                a20 = _given(given, row, length, HV * C, 2, 0, C)
                a21 = _given(given, row, length, HV * C, 2, 1, C)
                a22 = _given(given, row, length, HV * C, 2, 2, C)
                a30 = _given(given, row, length, HV * C, 3, 0, C)
                a31 = _given(given, row, length, HV * C, 3, 1, C)
                a32 = _given(given, row, length, HV * C, 3, 2, C)
                a33 = _given(given, row, length, HV * C, 3, 3, C)
        else:
            a00, a10, a11, a20, a21, a22, a30, a31, a32, a33 = _key_products(
                k + (start * HV + i_h) * K, row, length, HV, K, BK, C, PRECISION
            )
        a00 = _seen(a00, sums, row, length, 0, 0, GATE)
        a10 = _seen(a10, sums, row, length, 1, 0, GATE)
        a11 = _seen(a11, sums, row, length, 1, 1, GATE)
        strengths = beta + start * HV + i_h
        b0 = _load_strength(strengths, row, length, HV, 0)
        b1 = _load_strength(strengths, row, length, HV, 1)
        c00 = _own_core(a00, b0, INVERSE_PRECISION)
        c11 = _own_core(a11, b1, INVERSE_PRECISION)
        c10 = _between(c11, b1, a10, c00, b0, INVERSE_PRECISION)
        largest = tl.maximum(tl.abs(c10), tl.maximum(tl.abs(c00), tl.abs(c11)))
        if C == 64:
            a20 = _seen(a20, sums, row, length, 2, 0, GATE)
            a21 = _seen(a21, sums, row, length, 2, 1, GATE)
            a22 = _seen(a22, sums, row, length, 2, 2, GATE)
            a30 = _seen(a30, sums, row, length, 3, 0, GATE)
            a31 = _seen(a31, sums, row, length, 3, 1, GATE)
            a32 = _seen(a32, sums, row, length, 3, 2, GATE)
            a33 = _seen(a33, sums, row, length, 3, 3, GATE)
            b2 = _load_strength(strengths, row, length, HV, 2)
            b3 = _load_strength(strengths, row, length, HV, 3)
            c22 = _own_core(a22, b2, INVERSE_PRECISION)
            c33 = _own_core(a33, b3, INVERSE_PRECISION)
            c32 = _between(c33, b3, a32, c22, b2, INVERSE_PRECISION)
            # The join of both halves, block by block: first a21 (I - B1 core1), then (I - core2 B2) before it.
            a20 -= tl.dot(a20 * b0[None, :], c00, input_precision=INVERSE_PRECISION)
            a20 -= tl.dot(a21 * b1[None, :], c10, input_precision=INVERSE_PRECISION)
            a21 -= tl.dot(a21 * b1[None, :], c11, input_precision=INVERSE_PRECISION)
            a30 -= tl.dot(a30 * b0[None, :], c00, input_precision=INVERSE_PRECISION)
            a30 -= tl.dot(a31 * b1[None, :], c10, input_precision=INVERSE_PRECISION)
            a31 -= tl.dot(a31 * b1[None, :], c11, input_precision=INVERSE_PRECISION)
            read2, read32, read3 = c22 * b2[None, :], c32 * b2[None, :], c33 * b3[None, :]
            c30 = a30 - tl.dot(read32, a20, input_precision=INVERSE_PRECISION)
            c30 -= tl.dot(read3, a30, input_precision=INVERSE_PRECISION)
            c31 = a31 - tl.dot(read32, a21, input_precision=INVERSE_PRECISION)
            c31 -= tl.dot(read3, a31, input_precision=INVERSE_PRECISION)
            c20 = a20 - tl.dot(read2, a20, input_precision=INVERSE_PRECISION)
            c21 = a21 - tl.dot(read2, a21, input_precision=INVERSE_PRECISION)
            largest = tl.maximum(largest, tl.maximum(tl.abs(c22), tl.maximum(tl.abs(c32), tl.abs(c33))))
            largest = tl.maximum(largest, tl.maximum(tl.abs(c20), tl.abs(c21)))
            largest = tl.maximum(largest, tl.maximum(tl.abs(c30), tl.abs(c31)))
        unit = 1.0
        if core.dtype.element_ty == tl.float16:
            top = tl.maximum(tl.max(tl.max(largest, 1), 0), _SMALLEST)
            unit = 1.0 / top * _LARGEST
            tl.store(units + tl.cast(slot, tl.int64) * HV + i_h, top / _LARGEST)
        base = core + pair_offset
        zero = tl.zeros([_R, _R], tl.float32)
        _store_block(base, c00 * unit, row, length, HV * C, 0, 0, C)
        _store_block(base, zero, row, length, HV * C, 0, 1, C)
        _store_block(base, c10 * unit, row, length, HV * C, 1, 0, C)
        _store_block(base, c11 * unit, row, length, HV * C, 1, 1, C)
        if C == 64:
            _store_block(base, zero, row, length, HV * C, 0, 2, C)
            _store_block(base, zero, row, length, HV * C, 0, 3, C)
            _store_block(base, zero, row, length, HV * C, 1, 2, C)
            _store_block(base, zero, row, length, HV * C, 1, 3, C)
            _store_block(base, zero, row, length, HV * C, 2, 3, C)
            _store_block(base, c20 * unit, row, length, HV * C, 2, 0, C)
            _store_block(base, c21 * unit, row, length, HV * C, 2, 1, C)
            _store_block(base, c22 * unit, row, length, HV * C, 2, 2, C)
            _store_block(base, c30 * unit, row, length, HV * C, 3, 0, C)
            _store_block(base, c31 * unit, row, length, HV * C, 3, 1, C)
            _store_block(base, c32 * unit, row, length, HV * C, 3, 2, C)
            _store_block(base, c33 * unit, row, length, HV * C, 3, 3, C)


@triton.jit
def core_product(core, unit, x):
    """core x [C, Z] for a chunk's core as it is kept: in fp32, or in fp16 times ``unit``, with x scaled to fit.

    With bf16's 8 bits here, strengths up to 2 bring errors of outputs to 0.0056; fp16 has three more.
    """
    if core.dtype == tl.float16:
        top = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST)
        product = tl.dot(core, (x * (1.0 / top * _LARGEST)).to(tl.float16))
        product *= top * (unit / _LARGEST)
    else:
        product = tl.dot(core, x, input_precision="tf32")
    return product


def core_dtype(k: Tensor) -> torch.dtype:
    return torch.float32 if k.dtype == torch.float32 else torch.float16


def chunk_cores(
    call: Call, k: Tensor, beta: Tensor, gate: int, sums: Tensor | None, made: Prepared | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return core [B, T, HV, C] of every chunk and, kept in fp16, what its entries are to be multiplied by."""
    scores = made.key_scores if made else None
    core = torch.empty(call.B, call.T, call.HV, call.chunk, dtype=core_dtype(k), device=k.device)
    units = torch.empty(call.slots, call.HV, dtype=torch.float32, device=k.device)
    _delta_core[(call.slots * call.HV,)](
        k, beta, sums, scores, core, units, cu_seqlens, call.N, call.T, call.rows, K=call.K,
        BK=min(32, padded_dim(call.K)), GATE=gate, N_PADDED=next_power_of_two(call.N), PRECISION=precision(k),
        INVERSE_PRECISION="tf32x3" if k.dtype == torch.float32 else "tf32", **call.sizes(), num_warps=1, num_stages=2,
    )  # fmt: skip
    return core, units
