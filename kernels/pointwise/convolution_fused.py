"""The causal short convolution as Triton kernels, forward and backward, which computes again what forward did."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.direct import direct
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
def _filter(weight, offset, cols, D, W: tl.constexpr, BD: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """The W factors of each channel and the offset, or zeros, [1, BD] each in fp32."""
    weights = ()
    for i in tl.static_range(W):
        weights += (tl.load(weight + cols * W + i, mask=cols < D, other=0.0).to(tl.float32)[None, :],)
    bias = tl.zeros([1, BD], tl.float32)
    if HAS_OFFSET:
        bias += tl.load(offset + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    return weights, bias


@triton.jit
def _segments(i_p, B, T, segments, BS: tl.constexpr, STEPS: tl.constexpr):
    """The first tokens of program i_p's BS segments of STEPS tokens, and the sequences they are of.

    A line after the last segment walks tokens after the last: they load zeros there and store nothing.
    """
    segment = i_p * BS + tl.arange(0, BS)
    first = tl.where(segment < B * segments, segment % segments * STEPS, T)
    return first, tl.cast(tl.minimum(segment // segments, B - 1), tl.int64)


@triton.jit
def _ahead(x, at, first, some, T, D, step, SHIFT: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr):
    """Load the tokens, SHIFT later, of steps ``step`` to step + UNROLL - 1 of a walk; nothing after its end."""
    found = ()
    for u in tl.static_range(SHIFT, SHIFT + UNROLL):
        keep = ((first + (step + u) < T) & (step < STEPS))[:, None] & some[None, :]
        found += (tl.load(x + at + (step + u) * D, mask=keep, other=0.0),)
    return found


@triton.jit
def _convolved(weights, bias, xs, W: tl.constexpr):
    """The convolution of the last of W tokens, oldest first, before the activation."""
    z = bias + weights[0] * xs[0]
    for i in tl.static_range(1, W):
        z += weights[i] * xs[i]
    return z


@triton.jit(do_not_specialize=["B", "T", "segments"])
def _conv_forward(
    x, state, weight, offset, y, B, T, D, segments,
    W: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, ACT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Program (BS segments of STEPS tokens, channels).

    Each segment is a line of the tile and is walked token by token, the W - 1 before it in registers.
    """
    blocks_d = tl.cdiv(D, BD)
    cols = tl.program_id(0) % blocks_d * BD + tl.arange(0, BD)
    some = cols < D
    first, i_b = _segments(tl.program_id(0) // blocks_d, B, T, segments, BS, STEPS)
    at = (i_b * T + first)[:, None] * D + cols[None, :]
    weights, bias = _filter(weight, offset, cols, D, W, BD, HAS_OFFSET)
    xs = ()
    for j in tl.static_range(W - 1):
        xs += (_tokens(x, state, first + (j - W + 1), cols, i_b, T, D, W, HAS_STATE),)
    # The next tokens' loads are under way while these are computed with.
    x_new = _ahead(x, at, first, some, T, D, 0, 0, STEPS, UNROLL)
    for step in range(0, STEPS, UNROLL):
        x_now = x_new
        x_new = _ahead(x, at, first, some, T, D, step + UNROLL, 0, STEPS, UNROLL)
        for u in tl.static_range(UNROLL):
            xs += (x_now[u].to(tl.float32),)
            out = activate(_convolved(weights, bias, xs, W), ACT).to(y.dtype.element_ty)
            tl.store(y + at + (step + u) * D, out, mask=(first + (step + u) < T)[:, None] & some[None, :])
            xs = xs[1:]


@triton.jit
def _walked(x, dy, weights, bias, xs, dzs, ACT: tl.constexpr, W: tl.constexpr):
    """Append token t of x and dz = dy act'(z) to the W - 1 before it: windows of W, oldest first, in fp32."""
    xs += (x.to(tl.float32),)
    dz = dy.to(tl.float32)
    if ACT != 0:
        dz *= activate_slope(_convolved(weights, bias, xs, W), ACT)
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
    first, i_b = _segments(i_p, B, T, segments, BS, STEPS)
    at = (i_b * T + first)[:, None] * D + cols[None, :]
    weights, bias = _filter(weight, offset, cols, D, W, BD, HAS_OFFSET)
    xs, dzs, dws = (), (), ()
    for _ in tl.static_range(W):
        dws += (tl.zeros([BS, BD], tl.float32),)
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
    x_new = _ahead(x, at, first, some, T, D, 0, W - 1, STEPS, UNROLL)
    dy_new = _ahead(dy, at, first, some, T, D, 0, W - 1, STEPS, UNROLL)
    for step in range(0, STEPS, UNROLL):
        x_now, dy_now = x_new, dy_new
        x_new = _ahead(x, at, first, some, T, D, step + UNROLL, W - 1, STEPS, UNROLL)
        dy_new = _ahead(dy, at, first, some, T, D, step + UNROLL, W - 1, STEPS, UNROLL)
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


CONV_WALK = 512
"""Elements of a tile: 4 a thread, of each of which the backward pass keeps 2 W - 2 values of tokens and W + 1 sums."""

CONV_WALK_COLUMNS = 128

CONV_STEPS = 64
"""Most tokens of a segment, which loads up to 2 W - 2 beside its own."""

CONV_BACKWARD_STEPS = 8
"""Fewest tokens of a segment of the backward pass."""

CONV_UNROLL = (8, 4)
"""Tokens whose loads are under way together, forward and backward: 64 bytes a thread in bf16."""


def _conv_cut(x: Tensor, fewest: int, unroll: int) -> tuple[int, dict[str, int]]:
    """Return the segments of a sequence, and the sizes of the tile."""
    B, T, D = x.shape
    BD = min(CONV_WALK_COLUMNS, next_power_of_two(D))
    BS = CONV_WALK // BD
    steps = max(fewest, min(walk_length(B * T * -(-D // BD) // BS, CONV_STEPS), next_power_of_two(T)))
    return -(-T // steps), {"BS": BS, "BD": BD, "STEPS": steps, "UNROLL": min(unroll, steps)}


def conv_forward(x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str) -> Tensor:
    B, T, D = x.shape
    y = torch.empty_like(x)
    segments, cut = _conv_cut(x, 1, CONV_UNROLL[0])
    _conv_forward[(-(-B * segments // cut["BS"]) * -(-D // cut["BD"]),)](
        x, state, weight, offset, y, B, T, D, segments, W=weight.shape[1], **cut, ACT=ACTIVATION[activation],
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
    """Return dx, dweight, doffset and dstate (empty without them)."""
    B, T, D = x.shape
    W = weight.shape[1]
    segments, cut = _conv_cut(x, CONV_BACKWARD_STEPS, CONV_UNROLL[1])
    lines = -(-B * segments // cut["BS"])
    dx = torch.empty_like(x)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    sums = torch.empty(lines, W + 1, D, dtype=torch.float32, device=x.device)
    _conv_backward[(lines * -(-D // cut["BD"]),)](
        x, state, weight, offset, dy, dx, dstate, sums, B, T, D, segments, W=W, **cut, ACT=ACTIVATION[activation],
        HAS_OFFSET=offset is not None, HAS_STATE=state is not None, num_warps=4,
    )  # fmt: skip
    total = sums.sum(0)
    d_offset = total.new_empty(0) if offset is None else total[W].clone()
    return dx, total[:W].t().to(weight.dtype).contiguous(), d_offset, dstate


_conv_backward_op = torch.library.custom_op("archspec::short_convolution_backward", conv_backward, mutates_args=())


@_conv_backward_op.register_fake
def _conv_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_offset = torch.empty(0 if offset is None else x.shape[-1], dtype=torch.float32, device=x.device)
    dstate = x.new_empty(0) if state is None else torch.empty_like(state)
    return torch.empty_like(x), torch.empty_like(weight), d_offset, dstate


def _save_conv(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, offset, state, ctx.activation = inputs
    ctx.save_for_backward(x, weight, offset, state)
    ctx.backward_form = _conv_backward_op


def _differentiate_conv(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, offset, state = ctx.saved_tensors
    dx, dw, db, ds = ctx.backward_form(dy.contiguous(), x, weight, offset, state, ctx.activation)
    return dx, dw, None if offset is None else db.to(offset.dtype), None if state is None else ds, None


_conv_op.register_autograd(_differentiate_conv, setup_context=_save_conv)


_direct = direct(conv_forward, conv_backward, _save_conv, _differentiate_conv)


def short_convolution_fused(
    x: Tensor, weight: Tensor, offset: Tensor | None, state: Tensor | None, activation: str
) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.short_convolution`, checked there."""
    state = None if state is None or not state.numel() else state.contiguous()
    offset = None if offset is None else offset.contiguous()
    run = _conv_op if torch.compiler.is_compiling() else _direct
    y: Tensor = run(x.contiguous(), weight.contiguous(), offset, state, activation)
    return y
