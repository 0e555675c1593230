"""The causal short convolution as Triton kernels, forward and backward, which computes again what forward did."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.pointwise.activation_fused import ACTIVATION, activate, activate_slope
from archspec.launches import next_power_of_two, walk_length


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
    W: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The convolution of tokens ``rows``, before the activation."""
    z = _tokens(x, state, rows + (1 - W), cols, i_b, T, D, W, HAS_STATE)
    z *= tl.load(weight + cols * W, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(1, W):
        factor = tl.load(weight + cols * W + j, mask=cols < D, other=0.0).to(tl.float32)
        z += _tokens(x, state, rows + (1 - W + j), cols, i_b, T, D, W, HAS_STATE) * factor[None, :]
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
    z = _convolved(x, state, weight, offset, rows, cols, i_b, T, D, W, HAS_OFFSET, HAS_STATE)
    at = (i_b * T + rows)[:, None] * D + cols[None, :]
    keep = (rows < T)[:, None] & (cols < D)[None, :]
    tl.store(y + at, activate(z, ACT).to(y.dtype.element_ty), mask=keep)


@triton.jit
def _tokens_ahead(x, dy, at, first, some, T, D, step, W: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr):
    """Load x and dy of the tokens that steps ``step`` to step + UNROLL - 1 of a walk reach; nothing after its end."""
    xs, dys = (), ()
    for u in tl.static_range(W - 1, W - 1 + UNROLL):
        keep = ((first + (step + u) < T) & (step < STEPS))[:, None] & some[None, :]
        xs += (tl.load(x + at + (step + u) * D, mask=keep, other=0.0),)
        dys += (tl.load(dy + at + (step + u) * D, mask=keep, other=0.0),)
    return xs, dys


@triton.jit
def _walked(x, dy, weights, bias, xs, dzs, ACT: tl.constexpr, W: tl.constexpr):
    """Append token t of x and dz = dy act'(z) to the W - 1 before it: windows of W, oldest first, in fp32."""
    xs += (x.to(tl.float32),)
    dz = dy.to(tl.float32)
    if ACT != 0:
        z = bias + weights[0] * xs[0]
        for i in tl.static_range(1, W):
            z += weights[i] * xs[i]
        dz *= activate_slope(z, ACT)
    dzs += (dz,)
    return xs, dzs


@triton.jit
def _spread(weights, dzs, W: tl.constexpr):
    """What the W tokens from s on, whose dz are given, send back to token s: dx_s = sum_i w_i dz_{s + W - 1 - i}."""
    gradient = weights[0] * dzs[W - 1]
    for i in tl.static_range(1, W):
        gradient += weights[i] * dzs[W - 1 - i]
    return gradient


@triton.jit
def _gather(sums, own, dzs, W: tl.constexpr):
    """Add token s's x_s dz_{s + W - 1 - i} to the sum of each weight's gradient."""
    total = ()
    for i in tl.static_range(W):
        total += (sums[i] + own * dzs[W - 1 - i],)
    return total


@triton.jit(do_not_specialize=["B", "T", "segments"])
def _conv_backward(
    x, state, weight, offset, dy, dx, dstate, sums, B, T, D, segments,
    W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, ACT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Program (BS segments of STEPS tokens, channels); sums [programs of segments, W + 1, D] are of dw and d offset.

    Each segment is a line of the tile and is walked token by token. At token t the last W of x and of dz = dy act'(z)
    stand in registers, so that each is loaded and computed once, and give dx of token s = t - W + 1, the segment's
    own. Products are summed by element, and over the lines once, after the walk.
    """
    blocks_d = tl.cdiv(D, BD)
    i_d, i_p = tl.program_id(0) % blocks_d, tl.program_id(0) // blocks_d
    cols = i_d * BD + tl.arange(0, BD)
    some = cols < D
    segment = i_p * BS + tl.arange(0, BS)
    # A line after the last segment walks tokens after the last: nothing of dy is loaded there, and nothing stored.
    first = tl.where(segment < B * segments, segment % segments * STEPS, T)
    i_b = tl.cast(tl.minimum(segment // segments, B - 1), tl.int64)
    at = (i_b * T + first)[:, None] * D + cols[None, :]
    weights, xs, dzs, dws = (), (), (), ()
    for i in tl.static_range(W):
        weights += (tl.load(weight + cols * W + i, mask=some, other=0.0).to(tl.float32)[None, :],)
        dws += (tl.zeros([BS, BD], tl.float32),)
    bias = tl.zeros([1, BD], tl.float32)
    if HAS_OFFSET:
        bias += tl.load(offset + cols, mask=some, other=0.0).to(tl.float32)[None, :]
    d_offset = tl.zeros([BS, BD], tl.float32)
    for j in tl.static_range(W - 1):
        xs += (_tokens(x, state, first + (j - W + 1), cols, i_b, T, D, W, HAS_STATE),)
        dzs += (tl.zeros([BS, BD], tl.float32),)
    for j in tl.static_range(W - 1):
        keep = (first + j < T)[:, None] & some[None, :]
        x_t = tl.load(x + at + j * D, mask=keep, other=0.0)
        dy_t = tl.load(dy + at + j * D, mask=keep, other=0.0)
        xs, dzs = _walked(x_t, dy_t, weights, bias, xs, dzs, ACT, W)
        if HAS_STATE:  # what dx of tokens before the first would be is the state's gradient
            before = (first == 0)[:, None] & some[None, :]
            to = (i_b * (W - 1) + j)[:, None] * D + cols[None, :]
            tl.store(dstate + to, _spread(weights, dzs, W).to(dstate.dtype.element_ty), mask=before)
            dws = _gather(dws, tl.where(before, xs[0], 0.0), dzs, W)
        xs, dzs = xs[1:], dzs[1:]
    # The next tokens' loads are under way while these are computed with.
    x_new, dy_new = _tokens_ahead(x, dy, at, first, some, T, D, 0, W, STEPS, UNROLL)
    for step in range(0, STEPS, UNROLL):
        x_now, dy_now = x_new, dy_new
        x_new, dy_new = _tokens_ahead(x, dy, at, first, some, T, D, step + UNROLL, W, STEPS, UNROLL)
        for u in tl.static_range(UNROLL):
            xs, dzs = _walked(x_now[u], dy_now[u], weights, bias, xs, dzs, ACT, W)
            gradient = _spread(weights, dzs, W).to(dx.dtype.element_ty)
            tl.store(dx + at + (step + u) * D, gradient, mask=(first + (step + u) < T)[:, None] & some[None, :])
            dws = _gather(dws, xs[0], dzs, W)
            if HAS_OFFSET:
                d_offset += dzs[0]
            xs, dzs = xs[1:], dzs[1:]
    to = sums + tl.cast(i_p, tl.int64) * (W + 1) * D + cols
    for i in tl.static_range(W):
        tl.store(to + i * D, tl.sum(dws[i], 0), mask=some)
    tl.store(to + W * D, tl.sum(d_offset, 0), mask=some)


CONV_TILE = (32, 64)
CONV_WALK = 512
"""Elements of the backward pass' tile: 4 a thread, of each of which 2 W - 2 tokens and W + 1 sums stay."""

CONV_WALK_COLUMNS = 128

CONV_STEPS = (8, 64)
"""Fewest and most tokens of a segment, which loads W - 1 tokens before it and after it beside its own."""

CONV_UNROLL = 4
"""Tokens whose loads are under way together: 64 bytes a thread in bf16."""


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
    BD = min(CONV_WALK_COLUMNS, next_power_of_two(D))
    BS = CONV_WALK // BD
    least, most = CONV_STEPS
    steps = max(least, min(walk_length(B * T * -(-D // BD) // BS, most), next_power_of_two(T)))
    segments = -(-T // steps)
    lines = -(-B * segments // BS)
    dx = torch.empty_like(x)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    sums = torch.empty(lines, W + 1, D, dtype=torch.float32, device=x.device)
    _conv_backward[(lines * -(-D // BD),)](
        x, state, weight, offset, dy, dx, dstate, sums, B, T, D, segments, W=W, BS=BS, BD=BD, STEPS=steps,
        UNROLL=CONV_UNROLL, ACT=ACTIVATION[activation], HAS_OFFSET=offset is not None, HAS_STATE=state is not None,
        num_warps=4,
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
