"""Linear attention with diagonal decay as Triton kernels, forward and backward.

The state stays in registers while a program walks its segment of a sequence chunk by chunk: no per-chunk state is
written. When there are too few heads to fill the device, sequences are cut into segments: `_segment_states` finds
what each segment adds to the state, `_scan_segments` chains them, and all segments then run side by side.

All four products of the family are one sweep over (x, y, z), ``out_i = sum_j decay_ij (x_i . y_j) z_j``:

    o  = sweep(q, k, v)     forward in time       dq = sweep(do, v, k)    forward in time
    dv = sweep(k, q, do)    backward in time      dk = sweep(v, do, q)    backward in time

A decay per key channel is prepared chunk by chunk in parallel (`channels_fused`): the pairs inside a chunk become a
C x C matrix of scores, and q, k are scaled to the chunk's ends, so that the sweep knows only a decay per chunk. What
the forward pass prepared is kept for the backward pass: finding it again would take as long as the sweep itself.

The gradient of the log decay at token t is the sum over all pairs (i, j) with j < t <= i of their share of the loss.
With D the same sum at a chunk's end, dg_t = D + sum over s >= t in the chunk of (q_s dq_s - k_s dk_s); D itself is
<S, dS> at a segment's ends, followed through the chunks between them. The share of pairs inside a chunk enters dq
and dk from equally rounded factors, so it cancels exactly.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from archspec.kernels.direct import direct
from archspec.kernels.linear.call import Call, make_call, precision
from archspec.kernels.linear.channel_gradients_fused import channel_backward
from archspec.kernels.linear.channels_fused import Prepared, empty_channels, prepare_channels, takes_pairs
from archspec.kernels.linear.gates_fused import boundary_shares, carried_shares, token_backward
from archspec.kernels.linear.segments_fused import segment_starts, token_sums
from archspec.kernels.linear.sweep_fused import Sums, chunk_sums, launch_sweep, row_sums
from archspec.launches import NO_GATE, ROW_GATE, TOKEN_GATE, sweep_config

# What other families build on, with the forms of this one.
__all__ = [
    "NO_GATE",
    "ROW_GATE",
    "TOKEN_GATE",
    "Call",
    "Prepared",
    "Sums",
    "boundary_shares",
    "carried_shares",
    "channel_backward",
    "chunk_sums",
    "launch_sweep",
    "linear_attention_fused",
    "make_call",
    "precision",
    "prepare_channels",
    "row_sums",
    "segment_starts",
    "token_backward",
    "token_sums",
]


def _has_channels(g: Tensor | None) -> bool:
    """Whether there is a decay per key channel."""
    return g is not None and g.ndim == 4


def _forward_impl(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    final = torch.empty(call.N, call.HV, call.K, call.V, dtype=torch.float32, device=v.device)
    token_gate = token_sums(call, g, cu_seqlens)
    made = prepare_channels(call, q, k, g, cu_seqlens) if g is not None and _has_channels(g) else None
    decay, scores = (made.decay, made.scores) if made else (None, None)
    reads, writes = (made.q, made.k) if made else (q, k)
    starts: Tensor | None = initial_state
    if call.plan.num_segments > 1:
        starts = segment_starts(call, writes, v, token_gate, decay, initial_state, cu_seqlens, reverse=False)
    o = launch_sweep(
        call, reads, writes, v, starts, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay, scores=scores,
        last_state=final,
    )  # fmt: skip
    kept = starts if starts is not None and starts is not initial_state else final.new_empty(0)
    return o, final, kept, [made.decay, made.q, made.k, made.scores] if made else []


def _backward_impl(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, channels: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    token_gate = token_sums(call, g, cu_seqlens)
    states = starts if starts.numel() else initial_state
    made = Prepared(*channels) if _has_channels(g) else None
    decay = made.decay if made else None
    reads, writes = (made.q, made.k) if made else (q, k)
    d_initial = torch.empty_like(final)
    gradients = dfinal  # the state's gradient from each segment's end on, without the scale
    if call.plan.num_segments > 1 or (dfinal is not None and scale != 1.0):
        gradients = segment_starts(
            call, reads, do, token_gate, decay, dfinal, cu_seqlens, reverse=True, scale=1.0 / scale
        )
    sweep = partial(launch_sweep, call, cu_seqlens=cu_seqlens, scale=scale, g=token_gate, decay=decay)
    scores = made.scores if made else None
    dv = sweep(writes, reads, do, gradients, scores=scores, reverse=True, last_state=d_initial)
    blocks = -(-call.K // sweep_config(call.V, call.K, q.element_size(), gated=g is not None).block)
    sums_q, sums_k = None, None
    if token_gate is not None:
        sums_q, sums_k = row_sums(call, q, blocks), row_sums(call, k, blocks)
    elif made:
        sums_q, sums_k = chunk_sums(call, made.q), chunk_sums(call, made.k)
    pairs = made is None or takes_pairs(q)
    sweep = partial(
        sweep, decay_columns=made is not None, pairs=pairs, transposed=True, wide=made is not None and pairs
    )
    dq = sweep(do, v, writes, states, sums=sums_q)
    dk = sweep(v, do, reads, gradients, sums=sums_k, reverse=True)
    dg = final.new_empty(0)
    if g is not None and sums_q is not None and sums_k is not None:
        boundaries = boundary_shares(call, states, final, gradients, d_initial, scale)
        if made:
            carried = carried_shares(call, boundaries, sums_q, sums_k, cu_seqlens)
            dq, dk, dg = channel_backward(
                call, q, k, v, do, g, made.decay, dq, dk, carried, cu_seqlens, scale, has_pairs=pairs
            )
        else:
            dg = token_backward(call, g, boundaries, sums_q, sums_k, cu_seqlens)
    return _sum_groups(call, dq, q), _sum_groups(call, dk, k), dv, dg, d_initial


def _sum_groups(call: Call, gradient: Tensor, like: Tensor) -> Tensor:
    """Sum [B, T, HV, K] over the value heads that share a key head."""
    if call.HV == call.H:
        return gradient
    return gradient.view(call.B, call.T, call.H, call.HV // call.H, call.K).sum(3).to(like.dtype)


_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("archspec::linear_attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final state [N, HV, K, V], and what the backward pass needs, empty where there is none:

    the segments' start states, and of a decay per key channel what `Prepared` has.
    """
    return _seven(*_forward_impl(q, k, v, g, initial_state, cu_seqlens, scale))


def _seven(o: Tensor, final: Tensor, starts: Tensor, channels: list[Tensor]) -> _Forward:
    decay, reads, writes, scores = channels or [final.new_empty(0) for _ in range(4)]
    return o, final, starts, decay, reads, writes, scores


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float,
) -> _Forward:  # fmt: skip
    call = make_call(q, v, g, cu_seqlens)
    final = v.new_empty(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    starts = final.new_empty(0)
    if call.plan.num_segments > 1:
        starts = final.new_empty(call.plan.num_segments, call.N * call.HV, call.K, call.V)
    made = empty_channels(call, q) if _has_channels(g) else None
    return _seven(torch.empty_like(v), final, starts, [made.decay, made.q, made.k, made.scores] if made else [])


@torch.library.custom_op("archspec::linear_attention_backward", mutates_args=())
def _backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, channels: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dg (empty without a gate) and the initial state's gradient."""
    return _backward_impl(do, dfinal, q, k, v, g, initial_state, cu_seqlens, final, starts, channels, scale)


@_backward.register_fake
def _backward_fake(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, final: Tensor, starts: Tensor, channels: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = final.new_empty(0) if g is None else torch.empty_like(g, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(final)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens, *output[1:])
    ctx.scale, ctx.backward_form = scale, _backward


def _differentiate(ctx, do, dfinal, *_kept):  # type: ignore[no-untyped-def]
    _, _, v, g, initial_state, *_ = saved = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dg, d_initial = ctx.backward_form(do, dfinal, *saved[:8], list(saved[8:]), ctx.scale)
    return dq, dk, dv, None if g is None else dg, None if initial_state is None else d_initial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _flat(*inputs):  # type: ignore[no-untyped-def]
    *output, channels = _forward_impl(*inputs)
    return [*output, *channels]


_direct = direct(_flat, _backward_impl, _save, _differentiate)


def linear_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run the Triton form; arguments as in `archspec.kernels.linear.linear_attention`, checked there.

    Matrix products take bf16 and fp16 inputs as they are and fp32 inputs as tf32; the state is fp32.
    """
    g = None if g is None else g.float().contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    run = _forward if torch.compiler.is_compiling() else _direct
    o, final, *_ = run(q.contiguous(), k.contiguous(), v.contiguous(), g, state, cu_seqlens, scale)
    return o, final if output_final_state else None
