"""The L2 norm as Triton kernels, forward and backward, which keeps its result and one number a row, not its input."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.direct import direct
from archspec.kernels.pointwise.norm_fused import norm_sizes, norm_warps


@triton.jit
def _tile(N, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Rows, elements and which of them there are of one program's tile of x [N, D]."""
    rows = tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    return rows, rows[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D)[None, :]


@triton.jit(do_not_specialize=["N", "eps"])
def _l2_forward(x, y, inverses, N, eps, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """y = x / sqrt(||x||^2 + eps) of x [N, D], and what it was multiplied by [N]."""
    rows, at, keep = _tile(N, D, BT, BD)
    tile = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tile * tile, 1) + eps)
    tl.store(y + at, (tile * inverse[:, None]).to(y.dtype.element_ty), mask=keep)
    tl.store(inverses + rows, inverse, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _l2_backward(dy, y, inverses, dx, N, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """dx = (dy - y <y, dy>) / norm."""
    rows, at, keep = _tile(N, D, BT, BD)
    normed = tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
    gradient = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
    inverse = tl.load(inverses + rows, mask=rows < N, other=0.0)
    gradient = (gradient - normed * tl.sum(gradient * normed, 1)[:, None]) * inverse[:, None]
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=keep)


def l2_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    N, _, D, BT, BD = norm_sizes(x, None)
    y, inverses = torch.empty_like(x), x.new_empty(N, dtype=torch.float32)
    _l2_forward[(-(-N // BT),)](x, y, inverses, N, eps, D=D, BT=BT, BD=BD, num_warps=norm_warps(BD))
    return y, inverses


_l2_op = torch.library.custom_op("archspec::l2_norm_forward", l2_forward, mutates_args=())


@_l2_op.register_fake
def _l2_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def l2_backward(dy: Tensor, y: Tensor, inverses: Tensor) -> list[Tensor]:
    N, _, D, BT, BD = norm_sizes(y, None)
    dx = torch.empty_like(y)
    _l2_backward[(-(-N // BT),)](dy, y, inverses, dx, N, D=D, BT=BT, BD=BD, num_warps=norm_warps(BD))
    return [dx]


_l2_backward_op = torch.library.custom_op("archspec::l2_norm_backward", l2_backward, mutates_args=())


@_l2_backward_op.register_fake
def _l2_backward_fake(dy: Tensor, y: Tensor, inverses: Tensor) -> list[Tensor]:
    return [torch.empty_like(y)]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.backward_form = _l2_backward_op


def _differentiate(ctx, dy, _):  # type: ignore[no-untyped-def]
    return None if dy is None else ctx.backward_form(dy.contiguous(), *ctx.saved_tensors)[0], None


_l2_op.register_autograd(_differentiate, setup_context=_save)


_direct = direct(l2_forward, l2_backward, _save, _differentiate)


def l2_norm_fused(x: Tensor, eps: float) -> Tensor:
    """Run the Triton form of `archspec.kernels.pointwise.l2_norm`."""
    run = _l2_op if torch.compiler.is_compiling() else _direct
    y: Tensor = run(x.contiguous(), eps)[0]
    return y
