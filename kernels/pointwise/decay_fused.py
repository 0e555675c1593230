"""Log decays, -exp(log_rate) softplus(z + offset), as Triton kernels, forward and backward."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.launches import next_power_of_two

_SOFTPLUS_SERIES = tl.constexpr(-5.0)  # below, log(1 + e^z) loses digits that e^z - e^2z / 2 + e^3z / 3 keeps
_SOFTPLUS_LINEAR = tl.constexpr(20.0)  # above, softplus(z) is z, as in torch


@triton.jit
def _softplus(z):
    e = tl.exp(tl.minimum(z, _SOFTPLUS_LINEAR))
    result = tl.where(z < _SOFTPLUS_SERIES, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))
    return tl.where(z > _SOFTPLUS_LINEAR, z, result)


@triton.jit
def _steps(z, offset, rows, cols, keep, C, HAS_OFFSET: tl.constexpr):
    """z + offset in fp32."""
    tile = tl.load(z + rows[:, None] * C + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        tile += tl.load(offset + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    return tile


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
    tile = _steps(z, offset, rows, cols, keep, C, HAS_OFFSET)
    tl.store(out + rows[:, None] * C + cols[None, :], -rate[None, :] * _softplus(tile), mask=keep)


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
    d_rate, d_offset = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    for block in range(LOOPS):
        rows = (i_p * LOOPS + block) * BT + tl.arange(0, BT)
        keep = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        gradient = -rate * tl.load(dy + at, mask=keep, other=0.0)
        tile = _steps(z, offset, rows, cols, keep, C, HAS_OFFSET)
        d_rate += tl.sum(gradient * _softplus(tile), 0)
        gradient *= tl.sigmoid(tile)
        d_offset += tl.sum(gradient, 0)
        tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=keep)
    tl.store(sums + i_p * 2 * C + cols, d_rate, mask=cols < C)
    tl.store(sums + (i_p * 2 + 1) * C + cols, d_offset, mask=cols < C)


DECAY_TILE = 1024
DECAY_LOOPS = 16


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
    tiles = -(-N // BT)
    loops = min(DECAY_LOOPS, next_power_of_two(tiles))
    spans = -(-tiles // loops)
    dz = torch.empty_like(z)
    sums = torch.empty(spans, 2, C, dtype=torch.float32, device=z.device)
    _decay_backward[(spans * -(-C // BC),)](
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


def _differentiate_decay(ctx, dy):  # type: ignore[no-untyped-def]
    z, log_rate, offset = ctx.saved_tensors
    dz, d_rate, d_offset = _decay_backward_op(dy.contiguous(), z, log_rate, offset)
    return dz, d_rate, None if offset is None else d_offset.to(offset.dtype)


_decay_op.register_autograd(_differentiate_decay, setup_context=_save_decay)


def log_decay_fused(z: Tensor, log_rate: Tensor, offset: Tensor | None) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.log_decay`, checked there."""
    offset = None if offset is None else offset.contiguous()
    y: Tensor = _decay_op(z.contiguous(), log_rate.contiguous(), offset)
    return y
