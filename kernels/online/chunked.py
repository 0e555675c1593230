"""Online memories in chunks, in torch on any device: the general form for nonlinear memories.

All gradients of a chunk are taken at its anchor, so one batched pass over its tokens gives, for every weight, the
layer inputs x_j and back-propagated errors delta_j of all tokens at once, and coefficients.py says how they add up.
Reads run the same network with a product that puts the sum in place of the weight. Chunks follow one another;
within one, no loop over tokens is left (the dual form of TTT, arXiv:2407.04620, section 2.5, for any network).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from archspec.errors import UnsupportedError
from archspec.kernels.online.channel_decay import ChannelDecay, channel_decay
from archspec.kernels.online.coefficients import Axis, Coefficients, averaged, shared, summed
from archspec.kernels.online.problem import OnlineState, Problem, Weights

Sums = Coefficients | ChannelDecay
"""How one weight's steps of one chunk add up."""


def gate_axis(problem: Problem, name: str) -> Axis | None:
    """Return the axis that a weight's decay and momentum vary along, or None where chunks cannot serve the gates.

    A step size may vary along either axis besides; gates on both at once leave no rank-one form.
    """
    axes = set()
    for gates in (problem.log_decay, problem.momentum):
        if gates is not None:
            axes |= _axes(gates[name])
    if len(axes) > 1 or len(_axes(problem.step_size[name])) > 1:
        return None
    return axes.pop() if axes else "none"


def _axes(gate: Tensor) -> set[Axis]:
    axes: set[Axis] = set()
    if gate.shape[-2] > 1:
        axes.add("input")
    if gate.shape[-1] > 1:
        axes.add("output")
    return axes


def online_memory_chunked(problem: Problem, state: OnlineState) -> tuple[Tensor, OnlineState]:
    """Run the recurrence chunk by chunk.

    Returns:
        o [B, H, T, V] and the state after the last token.

    Raises:
        UnsupportedError: a network that uses a weight more than once, or not at all.
    """
    B, H, T = problem.query.shape[:3]
    weights, anchor = _flat(state.weights), _flat(state.anchor)
    momentum = None if state.momentum is None else _flat(state.momentum)
    phase = state.phase
    outputs = []
    stretches = _stretches(phase, T, problem.chunk_size)
    chunks = problem.split([length for length, count in stretches for _ in range(count)])
    for chunk, coefficients in zip(chunks, _coefficients(problem, stretches, list(weights), phase), strict=True):
        anchor = weights if phase == 0 else anchor
        inputs, errors = gradient_factors(chunk, anchor)
        if problem.shares is not None and momentum is not None:
            momentum = {name: torch.zeros_like(x) for name, x in momentum.items()} if phase == 0 else momentum
        summed = problem.shares is not None
        base = anchor if summed else weights
        buffers = anchor if problem.reduce == "mean" and not summed else momentum
        read = _read_linear(coefficients, base, buffers, inputs, errors)
        outputs.append(chunk.network(read, chunk.query))
        weights = {
            name: coefficients[name].end(weight, None if buffers is None else buffers[name], inputs[name], errors[name])
            for name, weight in base.items()
        }
        if momentum is not None:
            momentum = {
                name: coefficients[name].end_buffer(momentum[name], inputs[name], errors[name]) for name in momentum
            }
        phase = (phase + chunk.query.shape[2]) % problem.chunk_size
    anchor = weights if phase == 0 else anchor

    def shaped(flat: Weights) -> Weights:
        return {name: x.view(B, H, *x.shape[1:]) for name, x in flat.items()}

    kept = None if momentum is None else shaped(momentum)
    end = OnlineState(shaped(weights), shaped(anchor), kept, phase)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), end


def _flat(weights: Weights) -> Weights:
    return {name: x.flatten(0, 1) for name, x in weights.items()}


def gradient_factors(chunk: Problem, anchor: Weights) -> tuple[Weights, Weights]:
    """Return x_j [M, C, d_in] and step-scaled delta_j [M, C, d_out] of every weight, gradients taken at the anchor.

    The gradient of weight ``name`` on token j's loss is x_j delta_j^T. Under ``no_grad`` the pass records its own
    tape and drops it; otherwise the factors stay differentiable in all that they depend on.

    Raises:
        UnsupportedError: a network that uses a weight more than once, or not at all.
    """
    B, H, C = chunk.key.shape[:3]
    inputs: Weights = {}
    products: Weights = {}

    def linear(name: str, x: Tensor) -> Tensor:
        if name in products:
            raise UnsupportedError(f"online_memory: the network uses weight {name!r} more than once; give it two.")
        inputs[name] = x.reshape(B * H, C, -1)
        out = torch.bmm(inputs[name], anchor[name])
        products[name] = out if out.requires_grad else out.requires_grad_()
        return products[name].view(B, H, C, -1)

    outer = _needs_graph(chunk, anchor)
    with torch.enable_grad():
        prediction = chunk.network(linear, chunk.key)
        if len(products) < len(anchor):
            unused = ", ".join(sorted(set(anchor) - set(products)))
            raise UnsupportedError(f"online_memory: the network does not use {unused}; leave it out of weights.")
        predicted = prediction
        if chunk.read_key is not None:
            predicted = chunk.network(_flat_linear(anchor), chunk.read_key)
        delta = chunk.delta(predicted)
        errors = torch.autograd.grad(prediction, list(products.values()), delta, create_graph=outer)
    factors = dict(zip(products, errors, strict=True))
    if not outer:
        inputs = {name: x.detach() for name, x in inputs.items()}
    for name in factors:
        inputs[name], factors[name] = _scale(chunk.step_size[name], inputs[name], factors[name])
    return inputs, factors


def _needs_graph(chunk: Problem, anchor: Weights) -> bool:
    """Whether gradients will be asked for: of the inputs, or of parameters that the network or the error hold."""
    if not torch.is_grad_enabled():
        return False
    if any(x.requires_grad for x in (chunk.key, chunk.value, *anchor.values())):
        return True
    return chunk.delta(chunk.network(_flat_linear(anchor), chunk.key)).requires_grad


def _scale(step_size: Tensor, inputs: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Put step sizes [B, H, C, d_in or 1, d_out or 1] on the side of the outer product along which they vary."""
    step_size = step_size.flatten(0, 1)
    if step_size.shape[-2] > 1:
        return inputs * step_size.squeeze(-1), errors
    return inputs, errors * step_size.squeeze(-2)


def _flat_linear(weights: Weights) -> Callable[[str, Tensor], Tensor]:
    def linear(name: str, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[2:])
        return torch.bmm(flat, weights[name]).view(*x.shape[:3], -1)

    return linear


def _read_linear(
    coefficients: dict[str, Sums], weights: Weights, buffers: Weights | None, inputs: Weights, errors: Weights
) -> Callable[[str, Tensor], Tensor]:
    def linear(name: str, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[2:])
        buffer = None if buffers is None else buffers[name]
        out = coefficients[name].read(flat, weights[name], buffer, inputs[name], errors[name])
        return out.view(*x.shape[:3], -1)

    return linear


def _stretches(phase: int, num_tokens: int, chunk_size: int) -> list[tuple[int, int]]:
    """Return (length, count): the rest of an open chunk, the whole chunks together, and what is left."""
    first = min(chunk_size - phase, num_tokens) if phase else 0
    whole, last = divmod(num_tokens - first, chunk_size)
    return [(length, count) for length, count in ((first, 1), (chunk_size, whole), (last, 1)) if length and count]


def _coefficients(
    problem: Problem, stretches: list[tuple[int, int]], names: list[str], phase: int
) -> list[dict[str, Sums]]:
    """Return the coefficients of every chunk by weight, those of whole chunks computed together."""
    found: list[dict[str, Sums]] = []
    parts = problem.split([length * count for length, count in stretches])
    for part, (length, count) in zip(parts, stretches, strict=True):
        alike: dict[tuple[int, ...], list[Sums]] = {}
        columns: dict[str, list[Sums]] = {}
        for name in names:
            gates = [None if x is None else x[name] for x in (part.log_decay, part.momentum)]
            identity = tuple(id(x) for x in gates)
            if identity not in alike:
                alike[identity] = _of_weight(part, name, length, count, phase)
            columns[name] = alike[identity]
        found += [{name: column[n] for name, column in columns.items()} for n in range(count)]
        phase = 0
    return found


def _of_weight(part: Problem, name: str, length: int, count: int, phase: int) -> list[Sums]:
    """Return one weight's coefficients in ``count`` chunks of equal length."""
    B, H = part.query.shape[:2]
    like = part.query.new_empty(()).expand(B * H, count, length)
    if part.shares is not None:
        return _unbound(shared(part.shares, phase, like, before=part.read == "before"), count)
    if part.reduce == "mean":
        return _unbound(averaged(phase, like, before=part.read == "before"), count)
    axis = gate_axis(part, name)
    if axis is None:
        raise UnsupportedError(
            f"online_memory: the gates of {name!r} vary along both axes of the weight; use backend='reference'."
        )
    step_first, before = part.order == "step_first", part.read == "before"
    if axis != "none" and part.log_decay is not None and part.momentum is None:
        log_decay = part.log_decay[name].reshape(B * H, count, length, -1)
        return [*channel_decay(log_decay, step_first=step_first, before=before, axis=axis)]
    widths = [x[name].shape[-2:].numel() for x in (part.log_decay, part.momentum) if x is not None]

    def lay_out(gates: Weights | None) -> Tensor | None:
        if gates is None:
            return None
        gate = gates[name].reshape(B * H, count, length, -1)  # [M, N, C, 1 or d]
        return gate[..., 0] if axis == "none" else gate.expand(-1, -1, -1, max(widths)).transpose(-1, -2)

    decay, momentum = lay_out(part.log_decay), lay_out(part.momentum)
    return _unbound(summed(decay, momentum, like, step_first=step_first, before=before, axis=axis), count)


def _unbound(batch: Coefficients, count: int) -> list[Sums]:
    """Split coefficients [M, N, ...] into those of each of the N chunks."""
    fields = {}
    for name, x in vars(batch).items():
        common = not isinstance(x, Tensor) or (name == "mix" and x.ndim == 2) or (name == "mix_end" and x.ndim == 1)
        fields[name] = (x,) * count if common else x.unbind(1)
    return [Coefficients(**{name: values[n] for name, values in fields.items()}) for n in range(count)]
