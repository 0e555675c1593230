"""Log decays, -exp(log_rate) softplus(z + offset), as Triton kernels, forward and backward."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.direct import direct
from archspec.launches import next_power_of_two, walk_length


@triton.jit
def _softplus(z):
    """softplus(z) and its slope, sigmoid(z), in both tails with no relative error but that of exp and of rounding.

    With e = exp(-|z|), softplus is max(z, 0) + log(1 + e), and log(1 + e) = 2 artanh(s) of s = e / (2 + e) <= 1/3.
    """
    e = tl.exp(-tl.abs(z))
    both = 1.0 / ((1.0 + e) * (2.0 + e))
    s = e * (1.0 + e) * both
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(z, 0.0) + 2.0 * s * series, (2.0 + e) * both * tl.where(z < 0.0, e, 1.0)


@triton.jit
def _start(offset, cols, C, HAS_OFFSET: tl.constexpr, BC: tl.constexpr):
    """The offset [1, BC] in fp32, or zeros."""
    if HAS_OFFSET:
        return tl.load(offset + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    return tl.zeros([1, BC], tl.float32)


@triton.jit(do_not_specialize=["N"])
def _decay_forward(
    z, log_rate, offset, out, N, C,
    SHARED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Program (rows, channels) of z [N, C]; SHARED channels have one rate."""
    blocks = tl.cdiv(C, BC)
    rows = tl.cast(tl.program_id(0) // blocks, tl.int64) * BT + tl.arange(0, BT)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    keep = (rows < N)[:, None] & (cols < C)[None, :]
    rate = tl.exp(tl.load(log_rate + cols // SHARED, mask=cols < C, other=0.0).to(tl.float32))
    at = rows[:, None] * C + cols[None, :]
    tile = tl.load(z + at, mask=keep, other=0.0).to(tl.float32) + _start(offset, cols, C, HAS_OFFSET, BC)
    size, _ = _softplus(tile)
    tl.store(out + at, -rate[None, :] * size, mask=keep)


@triton.jit(do_not_specialize=["N"])
def _decay_backward(
    z, log_rate, offset, dy, dz, sums, N, C,
    SHARED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, LOOPS: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    """Program (span of rows, channels); sums [spans, 2, C] are those of the log rate's and the offset's gradients."""
    blocks = tl.cdiv(C, BC)
    i_p = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    rate = tl.exp(tl.load(log_rate + cols // SHARED, mask=cols < C, other=0.0).to(tl.float32))[None, :]
    start = _start(offset, cols, C, HAS_OFFSET, BC)
    rows = i_p * LOOPS * BT + tl.arange(0, BT)
    at = rows[:, None] * C + cols[None, :]
    keep = (rows < N)[:, None] & (cols < C)[None, :]
    z_new = tl.load(z + at, mask=keep, other=0.0)
    dy_new = tl.load(dy + at, mask=keep, other=0.0)
    d_rate, d_offset = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32)
    for block in range(LOOPS):
        tile, gradient = z_new.to(tl.float32) + start, dy_new
        # The next tile's loads are under way while this one is computed with.
        ahead = at + (block + 1) * BT * C
        keep = ((rows < N - (block + 1) * BT) & (block + 1 < LOOPS))[:, None] & (cols < C)[None, :]
        z_new = tl.load(z + ahead, mask=keep, other=0.0)
        dy_new = tl.load(dy + ahead, mask=keep, other=0.0)
        size, slope = _softplus(tile)
        d_rate += gradient * size
        gradient *= slope
        d_offset += gradient
        keep = (rows < N - block * BT)[:, None] & (cols < C)[None, :]
        tl.store(dz + at + block * BT * C, (-rate * gradient).to(dz.dtype.element_ty), mask=keep)
    # Products are summed by element on the way, and over rows once.
    to = sums + i_p * 2 * C + cols
    tl.store(to, tl.sum(-rate * d_rate, 0), mask=cols < C)
    tl.store(to + C, tl.sum(-rate * d_offset, 0), mask=cols < C)


DECAY_TILE = 1024
DECAY_LOOPS = 16
"""Most tiles that one program of the backward pass walks."""


def _decay_sizes(z: Tensor) -> tuple[int, int, int, int]:
    """Return N rows, C channels and the tile (rows, columns)."""
    C = z.shape[-2] * z.shape[-1]
    BC = min(128, next_power_of_two(C))
    return z.numel() // C, C, DECAY_TILE // BC, BC


def decay_forward(z: Tensor, log_rate: Tensor, offset: Tensor | None) -> Tensor:
    N, C, BT, BC = _decay_sizes(z)
    out = torch.empty_like(z, dtype=torch.float32)
    _decay_forward[(-(-N // BT) * -(-C // BC),)](
        z, log_rate, offset, out, N, C, SHARED=C // log_rate.numel(), BT=BT, BC=BC, HAS_OFFSET=offset is not None,
        num_warps=4,
    )  # fmt: skip
    return out


_decay_op = torch.library.custom_op("archspec::log_decay_forward", decay_forward, mutates_args=())


@_decay_op.register_fake
def _decay_fake(z: Tensor, log_rate: Tensor, offset: Tensor | None) -> Tensor:
    return torch.empty_like(z, dtype=torch.float32)


def decay_backward(dy: Tensor, z: Tensor, log_rate: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, and the gradients of the log rate and of the offset."""
    N, C, BT, BC = _decay_sizes(z)
    tiles, blocks = -(-N // BT), -(-C // BC)
    loops = walk_length(tiles * blocks, DECAY_LOOPS)
    spans = -(-tiles // loops)
    dz = torch.empty_like(z)
    sums = torch.empty(spans, 2, C, dtype=torch.float32, device=z.device)
    _decay_backward[(spans * blocks,)](
        z, log_rate, offset, dy, dz, sums, N, C, SHARED=C // log_rate.numel(), BT=BT, BC=BC, LOOPS=loops,
        HAS_OFFSET=offset is not None, num_warps=4,
    )  # fmt: skip
    total = sums.sum(0)
    d_rate = total[0].view(log_rate.numel(), -1).sum(1).view(log_rate.shape).to(log_rate.dtype)
    return dz, d_rate, total[1].view(z.shape[-2:]).clone()


_decay_backward_op = torch.library.custom_op("archspec::log_decay_backward", decay_backward, mutates_args=())


@_decay_backward_op.register_fake
def _decay_backward_fake(
    dy: Tensor, z: Tensor, log_rate: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(log_rate), z.new_empty(z.shape[-2:], dtype=torch.float32)


def _save_decay(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.backward_form = _decay_backward_op


def _differentiate_decay(ctx, dy):  # type: ignore[no-untyped-def]
    z, log_rate, offset = ctx.saved_tensors
    dz, d_rate, d_offset = ctx.backward_form(dy.contiguous(), z, log_rate, offset)
    return dz, d_rate, None if offset is None else d_offset.to(offset.dtype)


_decay_op.register_autograd(_differentiate_decay, setup_context=_save_decay)


_direct = direct(decay_forward, decay_backward, _save_decay, _differentiate_decay)


def log_decay_fused(z: Tensor, log_rate: Tensor, offset: Tensor | None) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.log_decay`, checked there."""
    offset = None if offset is None else offset.contiguous()
    run = _decay_op if torch.compiler.is_compiling() else _direct
    y: Tensor = run(z.contiguous(), log_rate.contiguous(), offset)
    return y
