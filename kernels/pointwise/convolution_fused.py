"""The causal short convolution as Triton kernels, forward and backward, which computes again what forward did."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.pointwise.activation_fused import ACTIVATION, activate, activate_slope
from archspec.launches import next_power_of_two


@triton.jit
def _tokens(x, state, rows, cols, i_b, T, D, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Tokens ``rows`` of x [B, T, D] in fp32: from ``state`` [B, W - 1, D] before the first, else zero outside."""
    keep = cols[None, :] < D
    at = (i_b * T + rows)[:, None] * D + cols[None, :]
    tile = tl.load(x + at, mask=((rows >= 0) & (rows < T))[:, None] & keep, other=0.0).to(tl.float32)
    if HAS_STATE:
        at = (i_b * (W - 1) + rows + (W - 1))[:, None] * D + cols[None, :]
        before = ((rows < 0) & (rows >= 1 - W))[:, None] & keep
        tile += tl.load(state + at, mask=before, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _convolved(
    x, state, weight, offset, rows, cols, i_b, T, D,
    SHIFT: tl.constexpr, W: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The convolution of tokens ``rows + SHIFT``, before the activation."""
    z = _tokens(x, state, rows + (SHIFT - W + 1), cols, i_b, T, D, W, HAS_STATE)
    z *= tl.load(weight + cols * W, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(1, W):
        factor = tl.load(weight + cols * W + j, mask=cols < D, other=0.0).to(tl.float32)
        z += _tokens(x, state, rows + (SHIFT - W + 1 + j), cols, i_b, T, D, W, HAS_STATE) * factor[None, :]
    if HAS_OFFSET:
        z += tl.load(offset + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["T"])
def _conv_forward(
    x, state, weight, offset, y, T, D,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Program (batch, tokens, channels)."""
    blocks_d, blocks_t = tl.cdiv(D, BD), tl.cdiv(T, BT)
    i_d, i_bt = tl.program_id(0) % blocks_d, tl.program_id(0) // blocks_d
    i_b = tl.cast(i_bt // blocks_t, tl.int64)
    rows = i_bt % blocks_t * BT + tl.arange(0, BT)
    cols = i_d * BD + tl.arange(0, BD)
    z = _convolved(x, state, weight, offset, rows, cols, i_b, T, D, 0, W, HAS_OFFSET, HAS_STATE)
    at = (i_b * T + rows)[:, None] * D + cols[None, :]
    keep = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(y + at, activate(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["T"])
def _conv_slope(
    x, state, weight, offset, dy, dz, T, D,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """dz = dy act'(z) in fp32. Written out: each dz serves W tokens, and taking its slope again for each costs more."""
    blocks_d, blocks_t = tl.cdiv(D, BD), tl.cdiv(T, BT)
    i_d, i_bt = tl.program_id(0) % blocks_d, tl.program_id(0) // blocks_d
    i_b = tl.cast(i_bt // blocks_t, tl.int64)
    rows = i_bt % blocks_t * BT + tl.arange(0, BT)
    cols = i_d * BD + tl.arange(0, BD)
    z = _convolved(x, state, weight, offset, rows, cols, i_b, T, D, 0, W, HAS_OFFSET, HAS_STATE)
    gradient = _tokens(dy, dy, rows, cols, i_b, T, D, W, False) * activate_slope(z, ACT)
    at = (i_b * T + rows)[:, None] * D + cols[None, :]
    tl.store(dz + at, gradient, mask=(rows < T)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=["T", "spans"])
def _conv_backward(
    x, state, weight, dz, dx, dstate, sums, T, D, spans,
    W: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LOOPS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Program (batch, span of tokens, channels); sums [B * spans, W + 1, D] are of dw and d offset.

    With a state, the first span starts at its first token: what it would add to dx there is the state's gradient.
    """
    blocks_d = tl.cdiv(D, BD)
    i_d, i_p = tl.program_id(0) % blocks_d, tl.program_id(0) // blocks_d
    i_b = tl.cast(i_p // spans, tl.int64)
    cols = i_d * BD + tl.arange(0, BD)
    lines = tl.arange(0, BW)
    total = tl.zeros([BW, BD], tl.float32)
    for block in range(LOOPS):
        rows = (i_p % spans * LOOPS + block) * BT + tl.arange(0, BT)
        if HAS_STATE:
            rows -= W - 1
        own = _tokens(dz, dz, rows, cols, i_b, T, D, W, False)
        total += tl.where(lines[:, None] == W, tl.sum(own, 0)[None, :], 0.0)
        gradient = tl.zeros([BT, BD], tl.float32)
        for i in tl.static_range(0, W):
            later = _tokens(dz, dz, rows + (W - 1 - i), cols, i_b, T, D, W, False)
            gradient += later * tl.load(weight + cols * W + i, mask=cols < D, other=0.0).to(tl.float32)[None, :]
            seen = _tokens(x, state, rows + (i - W + 1), cols, i_b, T, D, W, HAS_STATE)
            total += tl.where(lines[:, None] == i, tl.sum(own * seen, 0)[None, :], 0.0)
        keep = (cols < D)[None, :]
        at = (i_b * T + rows)[:, None] * D + cols[None, :]
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=((rows >= 0) & (rows < T))[:, None] & keep)
        if HAS_STATE:
            at = (i_b * (W - 1) + rows + (W - 1))[:, None] * D + cols[None, :]
            tl.store(dstate + at, gradient.to(dstate.dtype.element_ty), mask=(rows < 0)[:, None] & keep)
    at = (tl.cast(i_p, tl.int64) * (W + 1) + lines)[:, None] * D + cols[None, :]
    tl.store(sums + at, total, mask=(lines <= W)[:, None] & (cols < D)[None, :])


CONV_TILE = (32, 64)
CONV_BACKWARD_ROWS = 16
"""Rows of a tile in the backward pass, which loads 2 W shifted ones."""

CONV_LOOPS = 16
"""Tiles one program of the backward pass walks: sums are then a 256th of the tokens."""


def conv_forward(x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str) -> Tensor:
    B, T, D = x.shape
    y = torch.empty_like(x)
    BT, BD = min(CONV_TILE[0], next_power_of_two(T)), CONV_TILE[1]
    _conv_forward[(B * -(-T // BT) * -(-D // BD),)](
        x, state, weight, offset, y, T, D, W=weight.shape[1], BT=BT, BD=BD, ACT=ACTIVATION[activation],
        HAS_OFFSET=offset is not None, HAS_STATE=state is not None, num_warps=4,
    )  # fmt: skip
    return y


_conv_op = torch.library.custom_op("archspec::short_convolution_forward", conv_forward, mutates_args=())


@_conv_op.register_fake
def _conv_fake(x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, and dweight, doffset and dstate (empty without a state)."""
    B, T, D = x.shape
    W = weight.shape[1]
    BT, BD = min(CONV_BACKWARD_ROWS, next_power_of_two(T)), CONV_TILE[1]
    tiles = -(-(T if state is None else T + W - 1) // BT)
    loops = min(CONV_LOOPS, next_power_of_two(tiles))
    spans = -(-tiles // loops)
    dx = torch.empty_like(x)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    sums = torch.empty(B * spans, W + 1, D, dtype=torch.float32, device=x.device)
    dz = dy if activation == "none" else torch.empty_like(x, dtype=torch.float32)
    if activation != "none":
        _conv_slope[(B * -(-T // BT) * -(-D // BD),)](
            x, state, weight, offset, dy, dz, T, D, W=W, BT=BT, BD=BD, ACT=ACTIVATION[activation],
            HAS_OFFSET=offset is not None, HAS_STATE=state is not None, num_warps=4,
        )  # fmt: skip
    _conv_backward[(B * spans * -(-D // BD),)](
        x, state, weight, dz, dx, dstate, sums, T, D, spans, W=W, BW=next_power_of_two(W + 1), BT=BT, BD=BD,
        LOOPS=loops, HAS_STATE=state is not None, num_warps=4,
    )  # fmt: skip
    total = sums.sum(0)
    return dx, total[:W].t().to(weight.dtype).contiguous(), total[W].clone(), dstate


_conv_backward_op = torch.library.custom_op("archspec::short_convolution_backward", conv_backward, mutates_args=())


@_conv_backward_op.register_fake
def _conv_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_offset = torch.empty(x.shape[-1], dtype=torch.float32, device=x.device)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    return torch.empty_like(x), torch.empty_like(weight), d_offset, dstate


def _save_conv(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, offset, state, ctx.activation = inputs
    ctx.save_for_backward(x, weight, offset, state)


def _differentiate_conv(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, offset, state = ctx.saved_tensors
    dx, dw, db, ds = _conv_backward_op(dy.contiguous(), x, weight, offset, state, ctx.activation)
    return dx, dw, None if offset is None else db.to(offset.dtype), None if state is None else ds, None


_conv_op.register_autograd(_differentiate_conv, setup_context=_save_conv)


def short_convolution_fused(
    x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.short_convolution`, checked there."""
    state = None if state is None or not state.numel() else state.contiguous()
    offset = None if offset is None else offset.contiguous()
    y: Tensor = _conv_op(x.contiguous(), weight.contiguous(), offset, state, activation)
    return y
