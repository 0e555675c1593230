"""The (gated) RMS norm of heads as Triton kernels, forward and backward, which computes again what forward did."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.direct import direct
from archspec.kernels.pointwise.activation_fused import ACTIVATION, activate, activate_slope
from archspec.launches import next_power_of_two, walk_length


@triton.jit
def _normed(x, rows, keep, at, eps, D: tl.constexpr):
    """x / its norm, and one over the norm."""
    tile = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)
    return tile * inverse[:, None], inverse


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_forward(
    x, weight, gate, y, N, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Program (rows, head) of x [N, H, D]; ACT 0 is no gate."""
    i_h = tl.program_id(0) % H
    rows = tl.cast(tl.program_id(0) // H, tl.int64) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    keep = (rows < N)[:, None] & (cols < D)[None, :]
    at = (rows * H + i_h)[:, None] * D + cols[None, :]
    out, _ = _normed(x, rows, keep, at, eps, D)
    if HAS_WEIGHT:
        out *= tl.load(weight + i_h * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if ACT != 0:
        out *= activate(tl.load(gate + at, mask=keep, other=0.0).to(tl.float32), ACT)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_backward(
    x, weight, gate, dy, dx, dgate, sums, N, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LOOPS: tl.constexpr,
    ACT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Program (span of rows, head): with n = x / norm, dx = (dn - n mean(n dn)) / norm; sums [spans, H, D]."""
    i_h, i_p = tl.program_id(0) % H, tl.program_id(0) // H
    cols = tl.arange(0, BD)
    total = tl.zeros([BT, BD], tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + i_h * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for block in range(LOOPS):
        rows = (tl.cast(i_p, tl.int64) * LOOPS + block) * BT + tl.arange(0, BT)
        keep = (rows < N)[:, None] & (cols < D)[None, :]
        at = (rows * H + i_h)[:, None] * D + cols[None, :]
        normed, inverse = _normed(x, rows, keep, at, eps, D)
        gradient = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
        if ACT != 0:
            opened = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
            slope = gradient * normed * activate_slope(opened, ACT)
            if HAS_WEIGHT:
                slope *= factor
            tl.store(dgate + at, slope.to(dgate.dtype.element_ty), mask=keep)
            gradient *= activate(opened, ACT)
        if HAS_WEIGHT:
            total += gradient * normed
            gradient *= factor
        along = tl.sum(gradient * normed, 1) / D
        gradient = (gradient - normed * along[:, None]) * inverse[:, None]
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=keep)
    if HAS_WEIGHT:
        tl.store(sums + (tl.cast(i_p, tl.int64) * H + i_h) * D + cols, tl.sum(total, 0), mask=cols < D)


NORM_TILE = 2048
"""Elements of one program's tile: 16 a thread, of which the backward pass holds up to five."""

NORM_LOOPS = 16
"""Most tiles one program of the backward pass walks when it sums a weight's gradient."""


def norm_sizes(x: Tensor, weight: Tensor | None) -> tuple[int, int, int, int, int]:
    """Return N rows, H heads with a weight each, D, and the tile (rows, columns)."""
    D = x.shape[-1]
    H = weight.shape[0] if weight is not None and weight.ndim == 2 else 1
    BD = next_power_of_two(D)
    return x.numel() // (H * D), H, D, max(1, NORM_TILE // BD), BD


def norm_warps(BD: int) -> int:
    return 4 if BD <= NORM_TILE else 8


def norm_forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float) -> Tensor:
    N, H, D, BT, BD = norm_sizes(x, weight)
    y = torch.empty_like(x)
    _norm_forward[(-(-N // BT) * H,)](
        x, weight, gate, y, N, eps, H=H, D=D, BT=BT, BD=BD,
        ACT=0 if gate is None else ACTIVATION[activation], HAS_WEIGHT=weight is not None, num_warps=norm_warps(BD),
    )  # fmt: skip
    return y


_norm_op = torch.library.custom_op("archspec::head_norm_forward", norm_forward, mutates_args=())


@_norm_op.register_fake
def _norm_fake(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float) -> Tensor:
    return torch.empty_like(x)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, and dweight and dgate (empty without them)."""
    N, H, D, BT, BD = norm_sizes(x, weight)
    tiles = -(-N // BT)
    loops = 1 if weight is None else walk_length(tiles * H, NORM_LOOPS)
    spans = -(-tiles // loops)
    dx = torch.empty_like(x)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    sums = torch.empty(0 if weight is None else spans, H, D, dtype=torch.float32, device=x.device)
    _norm_backward[(spans * H,)](
        x, weight, gate, dy, dx, dgate, sums, N, eps, H=H, D=D, BT=BT, BD=BD, LOOPS=loops,
        ACT=0 if gate is None else ACTIVATION[activation], HAS_WEIGHT=weight is not None, num_warps=norm_warps(BD),
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else sums.sum(0).to(weight.dtype).reshape(weight.shape), dgate


_norm_backward_op = torch.library.custom_op("archspec::head_norm_backward", norm_backward, mutates_args=())


@_norm_backward_op.register_fake
def _norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dgate = (x.new_empty(0) if other is None else torch.empty_like(other) for other in (weight, gate))
    return torch.empty_like(x), dw, dgate


def _save_norm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, gate, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.backward_form = _norm_backward_op


def _differentiate_norm(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, gate = ctx.saved_tensors
    dx, dw, dgate = ctx.backward_form(dy.contiguous(), x, weight, gate, ctx.activation, ctx.eps)
    return dx, None if weight is None else dw, None if gate is None else dgate, None, None


_norm_op.register_autograd(_differentiate_norm, setup_context=_save_norm)


_direct = direct(norm_forward, norm_backward, _save_norm, _differentiate_norm)


def head_norm_fused(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.gated_rms_norm`, checked there."""
    weight = None if weight is None else weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    run = _norm_op if torch.compiler.is_compiling() else _direct
    y: Tensor = run(x.contiguous(), weight, gate, activation, eps)
    return y
