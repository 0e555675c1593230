"""The anchored family's form: the gradients of a chunk in one batch, and the weights of its tokens side by side.

Between two anchors no gradient sees the weights that move, so all gradients of the stretch are one vector-Jacobian
product, and the loss's window is a sum over neighbouring tokens. Momentum and decay are elementwise recurrences (an
associative scan each), and what is nonlinear afterwards (a link, an orthogonalised step, the read-out) acts on the
weights of all tokens at once. That holds d_in d_out numbers a token, unlike the online family's coefficients, which
need the weights to be linear in the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archspec.blocks.descending import gradients, laid_step, loss_gradients, product, retained, scaled
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.kernels.scan.chunked import linear_scan
from archspec.rule import Rule

FREE_LENGTH = 16  # any length is exact where gradients do not see the weights

Weights = dict[str, Tensor]


def anchored(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """Run the rule from anchor to anchor; arguments and results as for ``recurrence``."""
    state = initial_state(rule, quantities) if state is None else dict(state)
    reads, first = [], 0
    for length in _stretches(rule, position, quantities.query.shape[1]):
        part = _part(quantities, first, length)
        read, state = _stretch(rule, part, state, position + first)
        reads.append(read)
        first += length
    return torch.cat(reads, dim=2).transpose(1, 2).to(quantities.query.dtype), state


def _stretches(rule: Rule, position: int, length: int) -> list[int]:
    """Return how many tokens lie between the anchors, the first and last of them cut by the call's ends."""
    anchor = rule.update.anchor
    found: list[int] = []
    while length:
        if anchor is None:
            size = FREE_LENGTH
        else:
            index = position % anchor.every
            size = 1 if anchor.lag and index == 0 else anchor.every - index
        size = min(size, length)
        found.append(size)
        position, length = position + size, length - size
    return found


def _part(quantities: Quantities, first: int, length: int) -> Quantities:
    """Some tokens in the layout of memories [B, H, C, d]; gates [B or 1, H, C or 1, 1 or K, 1 or V].

    With S steps a token, keys, values and strengths have S C rows.
    """
    dtype, steps = quantities.state_dtype, quantities.steps

    def of(tensor: Tensor, rows: int = 1) -> Tensor:
        tokens = slice(first * rows, (first + length) * rows)
        return (tensor[:, tokens] if tensor.shape[1] > 1 else tensor[:, :1]).transpose(1, 2).to(dtype)

    return Quantities(
        query=of(quantities.query),
        key=of(quantities.key, steps),
        value=of(quantities.value, steps),
        gates={
            path: of(gate, steps if path in quantities.stepped_gates else 1) for path, gate in quantities.gates.items()
        },
        start=quantities.start,
        parameters={name: tensor.to(dtype) for name, tensor in quantities.parameters.items()},
        read_key=None if quantities.read_key is None else of(quantities.read_key),
        steps=steps,
    )


def _stretch(rule: Rule, part: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Advance over tokens whose gradients share one anchor; return the reads [B, H, C, V] and the state after."""
    anchor, names, count = rule.update.anchor, list(rule.memory.weights(rule.dims)), part.query.shape[2]
    before = {name: state[f"dual.{name}"] for name in names}
    fresh = anchor is not None and position % anchor.every == 0
    point = before
    if anchor is not None:
        point = _linked(rule, before) if fresh else {name: state[f"anchor.{name}"] for name in names}
    increments, after = _increments(rule, part, state, point)
    duals = {name: _moved(rule, part, name, before[name], increments[name]) for name in names}
    last = {name: tensor[:, :, -1] for name, tensor in duals.items()}
    after.update({f"dual.{name}": tensor for name, tensor in last.items()})
    if rule.links_at_anchors:
        lines = {name: point[name] if fresh else state[f"linear.{name}"] for name in names}
        weights = {name: _line(rule, part, name, lines[name] - before[name], duals[name]) for name in names}
    else:
        lines, weights = _linked(rule, before), _linked(rule, duals)
    if anchor is not None:
        # As in the recurrence, a chunk's end is the next one's anchor, and a lagging one stands after its first token.
        if (position + count) % anchor.every == 0 or (anchor.lag and fresh):
            point = _linked(rule, last)
            if rule.links_at_anchors:
                linked = {name: point[name] for name in names}
                lags = anchor.lag and fresh
                weights = {name: linked[name][:, :, None] for name in names} if lags else weights
                after.update({f"linear.{name}": tensor for name, tensor in linked.items()})
        elif rule.links_at_anchors:
            after.update({f"linear.{name}": tensor[:, :, -1] for name, tensor in weights.items()})
        after.update({f"anchor.{name}": tensor for name, tensor in point.items()})
    if rule.read == "before":
        weights = {name: torch.cat([lines[name][:, :, None], weights[name][:, :, :-1]], dim=2) for name in names}
    read = rule.memory.network(product(weights), part.query, part.parameters)
    return rule.memory.finish(read, rule.dims), after


def _increments(rule: Rule, part: Quantities, state: MemoryState, point: Weights) -> tuple[Weights, MemoryState]:
    """Return every token's increment of every weight [B, H, C, d_in, d_out], and the buffers and window after."""
    after: MemoryState = {}
    if rule.bias.window is None:
        found, stepped = gradients(rule, part, _spread(point, part.key.shape[2]))
    else:
        joined, after = _windowed(rule, part, state)
        own = loss_gradients(rule, joined, _spread(point, joined.key.shape[2]))
        found = {name: _band(tensor, rule.bias.window.length, part.key.shape[2]) for name, tensor in own.items()}
        stepped = scaled(rule, found, part.gates["update.step_size"])
    if part.steps > 1:  # gradients that do not see the weights: the steps of a token are one
        found, stepped = ({name: _summed(x, part.steps) for name, x in of.items()} for of in (found, stepped))
    increments = {}
    for name in point:
        step = laid_step(rule, part, name, found[name], stepped[name], point[name][:, :, None])
        buffers = {}
        for buffer in rule.update.buffers:
            start = state[f"{buffer}.{name}"]
            sums = _scanned(step.gates[buffer], rule.update.momentum_input(step), start)
            buffers[buffer] = torch.cat([start[:, :, None], sums[:, :, :-1]], dim=2)
            after[f"{buffer}.{name}"] = sums[:, :, -1]
        increments[name], _ = rule.update.increment(step, buffers)
    return increments, after


def _summed(x: Tensor, steps: int) -> Tensor:
    """Return the sum over the steps of every token, of [B, H, S C, d_in, d_out]."""
    return x.reshape(*x.shape[:2], -1, steps, *x.shape[3:]).sum(3)


def _moved(rule: Rule, part: Quantities, name: str, before: Tensor, increments: Tensor) -> Tensor:
    """Return the dual after every token [B, H, C, d_in, d_out]."""
    retention, gates = rule.retention, retained(rule, part, name)
    if retention.turns:
        return _turned(retention, gates, before, increments)
    factor = _kept(gates, increments)
    if retention.order == "step_first":
        increments = factor * increments
    if not retention.feeds_back:
        return _scanned(factor, increments, before)
    duals = []
    factor = factor.expand(-1, -1, increments.shape[2], -1, -1)
    for own, step in zip(factor.unbind(2), increments.unbind(2), strict=True):
        before = retention.project(own * before + step)
        duals.append(before)
    return torch.stack(duals, dim=2)


def _turned(retention: Any, gates: Mapping[str, Tensor], before: Tensor, increments: Tensor) -> Tensor:
    """Return the dual after every token where pairs of states are complex numbers that turn."""
    factor, received = retention.factors(gates)
    steps = retention.to_complex(increments)
    steps = steps if received is None else received * steps
    steps = factor * steps if retention.order == "step_first" else steps
    duals: Tensor = retention.to_real(_scanned(factor, steps, retention.to_complex(before)))
    return duals


def _line(rule: Rule, part: Quantities, name: str, apart: Tensor, duals: Tensor) -> Tensor:
    """Return in-chunk weights: they take the dual's steps, and what they differ by only decays."""
    gates = retained(rule, part, name)
    return duals + _scanned(_kept(gates, duals), torch.zeros_like(duals), apart)


def _kept(gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Return alpha of every token on a weight's axes; 1 where nothing decays."""
    return gates["gate"].exp() if "gate" in gates else torch.ones_like(like[..., :1, :1])


def _scanned(factor: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """Return h_t = factor_t h_{t-1} + x_t along the tokens of [B, H, C, d_in, d_out], from h_0 = ``start``."""
    factor = factor.expand(-1, -1, x.shape[2], -1, -1).movedim(2, 1)
    return linear_scan(factor, x.movedim(2, 1), start).movedim(1, 2)


def _windowed(rule: Rule, part: Quantities, state: MemoryState) -> tuple[Quantities, MemoryState]:
    """Put the window's earlier tokens before the stretch, and keep what the next token will need."""
    window = rule.bias.window
    if window is None:
        raise RuntimeError("a loss without a window has none to join")
    batch, heads, count = part.key.shape[:3]
    fields = {"key": part.key, "value": part.value}
    if part.read_key is not None:
        fields["read_key"] = part.read_key
    rows = {
        path: gate.squeeze(-2).expand(batch, heads, count, -1)
        for path, gate in part.gates.items()
        if path.startswith("bias.") and not path.startswith("bias.read_key.")
    }
    joined = {
        name: torch.cat([state[f"window.{name}"], tensor], dim=2) if f"window.{name}" in state else tensor
        for name, tensor in {**fields, **rows}.items()
    }
    joined = {name: tensor[:, :, -(count + window.length - 1) :] for name, tensor in joined.items()}
    first = max(0, joined["key"].shape[2] - window.length + 1)
    kept = {f"window.{name}": tensor[:, :, first:] for name, tensor in joined.items()}
    gates = {**part.gates, **{path: joined[path].unsqueeze(-2) for path in rows}}
    return part.replaced(joined["key"], joined["value"], joined.get("read_key"), gates), kept


def _band(tensor: Tensor, length: int, count: int) -> Tensor:
    """Return for each of the last ``count`` tokens the sum over the ``length`` tokens that end with it."""
    missing = count + length - 1 - tensor.shape[2]
    if missing:
        zeros = torch.zeros_like(tensor[:, :, :1]).expand(-1, -1, missing, -1, -1)
        tensor = torch.cat([zeros, tensor], dim=2)
    total = tensor[:, :, :count]
    for index in range(1, length):
        total = total + tensor[:, :, index : index + count]
    return total


def _spread(weights: Mapping[str, Tensor], count: int) -> Weights:
    """Return a copy of the weights for each token, so that a product with them pulls back to each apart."""
    return {name: tensor[:, :, None].expand(-1, -1, count, -1, -1) for name, tensor in weights.items()}


def _linked(rule: Rule, dual: Mapping[str, Tensor]) -> Weights:
    return {name: rule.retention.link(tensor) for name, tensor in dual.items()}
