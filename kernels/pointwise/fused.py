"""The pieces around a recurrence as Triton kernels, forward and backward.

Every backward kernel recomputes what its forward pass computed from the inputs, so that nothing but inputs is kept;
sums over tokens for the gradients of weights are written once a program and added up in a fixed order.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.linear.cost import next_power_of_two

ACTIVATION = {"none": 0, "silu": 1, "sigmoid": 2}
_SOFTPLUS_SERIES = tl.constexpr(-5.0)  # below, log(1 + e^z) loses digits that e^z - e^2z / 2 + e^3z / 3 keeps
_SOFTPLUS_LINEAR = tl.constexpr(20.0)  # above, softplus(z) is z, as in torch


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == 1:
        return z * tl.sigmoid(z)
    if ACT == 2:
        return tl.sigmoid(z)
    return z


@triton.jit
def _activate_slope(z, ACT: tl.constexpr):
    """d act / dz."""
    s = tl.sigmoid(z)
    if ACT == 1:
        return s * (1.0 + z * (1.0 - s))
    return s * (1.0 - s)


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
    tl.store(y + at, _activate(z, ACT).to(y.dtype.element_ty), mask=keep)


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
    gradient = _tokens(dy, dy, rows, cols, i_b, T, D, W, False) * _activate_slope(z, ACT)
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


@triton.jit
def _normed(x, rows, keep, at, eps, D: tl.constexpr, MEAN: tl.constexpr):
    """x / its norm, and one over the norm."""
    tile = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    square = tl.sum(tile * tile, 1)
    if MEAN:
        square = square / D
    inverse = tl.rsqrt(square + eps)
    return tile * inverse[:, None], inverse


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_forward(
    x, weight, gate, y, N, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, MEAN: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Program (rows, head) of x [N, H, D]; ACT 0 is no gate."""
    i_h = tl.program_id(0) % H
    rows = tl.cast(tl.program_id(0) // H, tl.int64) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    keep = (rows < N)[:, None] & (cols < D)[None, :]
    at = (rows * H + i_h)[:, None] * D + cols[None, :]
    out, _ = _normed(x, rows, keep, at, eps, D, MEAN)
    if HAS_WEIGHT:
        out *= tl.load(weight + i_h * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if ACT != 0:
        out *= _activate(tl.load(gate + at, mask=keep, other=0.0).to(tl.float32), ACT)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_backward(
    x, weight, gate, dy, dx, dgate, sums, N, eps,
    H: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LOOPS: tl.constexpr, MEAN: tl.constexpr,
    ACT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Program (span of rows, head): with n = x / norm, dx = (dn - n mean or sum(n dn)) / norm; sums [spans, H, D]."""
    i_h, i_p = tl.program_id(0) % H, tl.program_id(0) // H
    cols = tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + i_h * D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for block in range(LOOPS):
        rows = (tl.cast(i_p, tl.int64) * LOOPS + block) * BT + tl.arange(0, BT)
        keep = (rows < N)[:, None] & (cols < D)[None, :]
        at = (rows * H + i_h)[:, None] * D + cols[None, :]
        normed, inverse = _normed(x, rows, keep, at, eps, D, MEAN)
        gradient = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
        if ACT != 0:
            opened = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
            slope = gradient * normed * _activate_slope(opened, ACT)
            if HAS_WEIGHT:
                slope *= factor
            tl.store(dgate + at, slope.to(dgate.dtype.element_ty), mask=keep)
            gradient *= _activate(opened, ACT)
        if HAS_WEIGHT:
            total += tl.sum(gradient * normed, 0)
            gradient *= factor
        along = tl.sum(gradient * normed, 1)
        if MEAN:
            along = along / D
        gradient = (gradient - normed * along[:, None]) * inverse[:, None]
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=keep)
    if HAS_WEIGHT:
        tl.store(sums + (tl.cast(i_p, tl.int64) * H + i_h) * D + cols, total, mask=cols < D)


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


NORM_TILE = 2048
"""Elements of one program's tile: 16 a thread, of which the backward pass holds up to five."""

NORM_LOOPS = 16
"""Tiles one program of the backward pass walks when it sums a weight's gradient."""


def _norm_sizes(x: Tensor, weight: Tensor | None) -> tuple[int, int, int, int, int]:
    """Return N rows, H heads with a weight each, D, and the tile (rows, columns)."""
    D = x.shape[-1]
    H = weight.shape[0] if weight is not None and weight.ndim == 2 else 1
    BD = next_power_of_two(D)
    return x.numel() // (H * D), H, D, max(1, NORM_TILE // BD), BD


def _norm_warps(BD: int) -> int:
    return 4 if BD <= NORM_TILE else 8


def norm_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float
) -> Tensor:
    N, H, D, BT, BD = _norm_sizes(x, weight)
    y = torch.empty_like(x)
    _norm_forward[(-(-N // BT) * H,)](
        x, weight, gate, y, N, eps, H=H, D=D, BT=BT, BD=BD, MEAN=kind == "rms",
        ACT=0 if gate is None else ACTIVATION[activation], HAS_WEIGHT=weight is not None, num_warps=_norm_warps(BD),
    )  # fmt: skip
    return y


_norm_op = torch.library.custom_op("archspec::head_norm_forward", norm_forward, mutates_args=())


@_norm_op.register_fake
def _norm_fake(x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float) -> Tensor:
    return torch.empty_like(x)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, and dweight and dgate (empty without them)."""
    N, H, D, BT, BD = _norm_sizes(x, weight)
    tiles = -(-N // BT)
    loops = 1 if weight is None else min(NORM_LOOPS, next_power_of_two(tiles))
    spans = -(-tiles // loops)
    dx = torch.empty_like(x)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    sums = torch.empty(0 if weight is None else spans, H, D, dtype=torch.float32, device=x.device)
    _norm_backward[(spans * H,)](
        x, weight, gate, dy, dx, dgate, sums, N, eps, H=H, D=D, BT=BT, BD=BD, LOOPS=loops, MEAN=kind == "rms",
        ACT=0 if gate is None else ACTIVATION[activation], HAS_WEIGHT=weight is not None, num_warps=_norm_warps(BD),
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else sums.sum(0).to(weight.dtype).reshape(weight.shape), dgate


_norm_backward_op = torch.library.custom_op("archspec::head_norm_backward", norm_backward, mutates_args=())


@_norm_backward_op.register_fake
def _norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dgate = (x.new_empty(0) if other is None else torch.empty_like(other) for other in (weight, gate))
    return torch.empty_like(x), dw, dgate


def _save_norm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, gate, ctx.kind, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(x, weight, gate)


def _differentiate_norm(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, gate = ctx.saved_tensors
    dx, dw, dgate = _norm_backward_op(dy.contiguous(), x, weight, gate, ctx.kind, ctx.activation, ctx.eps)
    return dx, None if weight is None else dw, None if gate is None else dgate, None, None, None


_norm_op.register_autograd(_differentiate_norm, setup_context=_save_norm)


def head_norm_fused(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float
) -> Tensor:
    """Run the Triton form; ``kind`` is ``l2`` or ``rms``, other arguments as in `gated_rms_norm`."""
    weight = None if weight is None else weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    y: Tensor = _norm_op(x.contiguous(), weight, gate, kind, activation, eps)
    return y


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
