"""One token of a memory whose weights move: decay, gradient, update, link, read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities, gate_on_weight, weight_axis
from archspec.families import Step
from archspec.rule import Rule

Weights = dict[str, Tensor]
Keeper = Callable[[Tensor], Tensor]


def descend(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Advance weights by one token, in the layout [B, H, C, d] (C > 1: several steps a token), and read."""
    source, after = advance(rule, token, state, position)
    read = rule.memory.network(product(source), token.query, token.parameters)
    return rule.memory.finish(read, rule.dims).squeeze(2), after


def advance(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Weights, MemoryState]:
    """Advance weights by one token; return those that its query reads, and the state after it."""
    names = list(rule.memory.weights(rule.dims))
    before = {name: state[f"dual.{name}"] for name in names}
    keep = {name: _keeper(rule, token, name) for name in names}
    anchor = rule.update.anchor
    fresh = anchor is not None and position % anchor.every == 0
    anchored: Weights = {}
    if anchor is not None:
        anchored = _linked(rule, before) if fresh else {name: state[f"anchor.{name}"] for name in names}
    linear = _in_chunk(rule, state, anchored, fresh)

    dual, kept = _moved(rule, token, state, before, keep, anchored, position)
    after: MemoryState = {f"dual.{name}": tensor for name, tensor in dual.items()}
    after.update(kept)
    moves = {name: _line(keep[name], linear[name], before[name], dual[name]) for name in linear}
    weights = moves or _linked(rule, dual)
    if anchor is not None:
        # Between two chunks the anchor already stands where the next one begins; a lagging anchor stands after
        # the chunk's first token.
        lags = anchor.lag and fresh
        if (position + 1) % anchor.every == 0 or lags:
            anchored = _linked(rule, dual)
            moves = anchored if linear else {}
            weights = anchored if lags else weights
        after.update({f"anchor.{name}": tensor for name, tensor in anchored.items()})
        after.update({f"linear.{name}": tensor for name, tensor in moves.items()})
    return (linear or _linked(rule, before)) if rule.read == "before" else weights, after


def _in_chunk(rule: Rule, state: MemoryState, anchored: Weights, fresh: bool) -> Weights:
    """With the link at anchors only, the weights read inside a chunk run linearly from the anchor's."""
    if not rule.links_at_anchors:
        return {}
    return {name: tensor if fresh else state[f"linear.{name}"] for name, tensor in anchored.items()}


def _line(keep: Keeper, linear: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Give the in-chunk weights the step that the dual took: both decay alike, so their difference only decays."""
    return after + keep(linear - before)


def _moved(
    rule: Rule,
    token: Quantities,
    state: MemoryState,
    before: Weights,
    keep: Mapping[str, Keeper],
    anchored: Weights,
    position: int,
) -> tuple[Weights, MemoryState]:
    """Return the dual after the token's steps, and the update's buffers and window."""
    order = rule.retention.order
    dual = {name: keep[name](tensor) for name, tensor in before.items()} if order == "decay_first" else dict(before)
    buffers = {name: {buffer: state[f"{buffer}.{name}"] for buffer in rule.update.buffers} for name in before}
    kept: MemoryState = {}
    for index in range(token.steps):
        part = token.step(index) if token.steps > 1 else token
        part, kept = _windowed(rule, part, state)
        point = anchored or _linked(rule, dual)
        found, stepped = gradients(rule, part, point)
        for name in before:
            step = laid_step(rule, part, name, found[name], stepped[name] * _mean_factor(rule, position), point[name])
            increment, buffers[name] = rule.update.increment(step, buffers[name])
            increment = rule.retention.receive(increment, retained(rule, part, name))
            dual[name] = (keep[name](dual[name]) if order == "together" else dual[name]) + increment
            dual[name] = _mean_reduced(rule, state, name, dual[name], increment, position)
            if f"steps.{name}" in state:
                dual[name], kept[f"steps.{name}"] = _shared(rule, token, state, name, increment, position)
    if order == "step_first":
        dual = {name: keep[name](tensor) for name, tensor in dual.items()}
    dual = {name: rule.retention.project(tensor) for name, tensor in dual.items()}
    for name, tensors in buffers.items():
        kept.update({f"{buffer}.{name}": tensor for buffer, tensor in tensors.items()})
    return dual, kept


def laid_step(rule: Rule, token: Quantities, name: str, gradient: Tensor, stepped: Tensor, point: Tensor) -> Step:
    """Return what the update sees of one weight: its gradient, and the update's gates laid on it."""
    return Step(
        gradient=gradient,
        stepped=stepped,
        gates={
            path.removeprefix("update."): gate_on_weight(gate, weight_axis(rule, name, gate))
            for path, gate in token.gates.items()
            if path.startswith("update.")
        },
        key=token.key[:, :, -1],
        point=point,
        value=token.value[:, :, -1],
    )


def _mean_factor(rule: Rule, position: int) -> float:
    """1/i for the i-th token of a chunk whose steps are averaged, else 1."""
    anchor = rule.update.anchor
    return 1.0 / (position % anchor.every + 1) if anchor is not None and anchor.reduce == "mean" else 1.0


def _shared(
    rule: Rule, token: Quantities, state: MemoryState, name: str, increment: Tensor, position: int
) -> tuple[Tensor, Tensor]:
    """With ``reduce: learned``, W_i = W_0 + c_i times the sum of the first i steps, which is kept."""
    anchor = rule.update.anchor
    shares = None if anchor is None else anchor.shares(token.parameters)
    if anchor is None or shares is None:
        raise AssertionError("sums of steps are kept where their shares are learned")
    index = position % anchor.every
    start = state[f"dual.{name}"] if index == 0 else state[f"anchor.{name}"]
    steps = increment if index == 0 else state[f"steps.{name}"] + increment
    return start + shares[index] * steps, steps


def _mean_reduced(rule: Rule, state: MemoryState, name: str, dual: Tensor, increment: Tensor, position: int) -> Tensor:
    """With ``reduce: mean``, W_i = W_0 + (1/i) sum of the first i steps; from W_{i-1} that is a running mean."""
    anchor = rule.update.anchor
    if anchor is None or anchor.reduce != "mean":
        return dual
    index = position % anchor.every  # i - 1
    start = state[f"dual.{name}"] if index == 0 else state[f"anchor.{name}"]
    return start + (state[f"dual.{name}"] - start) * (index / (index + 1)) + increment


def _windowed(rule: Rule, token: Quantities, state: MemoryState) -> tuple[Quantities, MemoryState]:
    """Put the last tokens of the window before the current one, and keep what the next token will need."""
    window = rule.bias.window
    if window is None:
        return token, {}
    fields = {"key": token.key, "value": token.value}
    if token.read_key is not None:
        fields["read_key"] = token.read_key
    rows = {
        path: gate
        for path, gate in token.gates.items()
        if path.startswith("bias.") and not path.startswith("bias.read_key.")
    }
    batch, heads = token.key.shape[:2]
    # A gate without batch or channels of its own is laid out per token, so that it can wait in the window.
    fields.update({path: gate.squeeze(-2).expand(batch, heads, -1).unsqueeze(2) for path, gate in rows.items()})
    joined = {
        name: torch.cat([state[f"window.{name}"], tensor], dim=2) if f"window.{name}" in state else tensor
        for name, tensor in fields.items()
    }
    joined = {name: tensor[:, :, -window.length :] for name, tensor in joined.items()}
    first = max(0, joined["key"].shape[2] - window.length + 1)
    kept = {f"window.{name}": tensor[:, :, first:] for name, tensor in joined.items()}
    gates = {**token.gates, **{path: joined[path].unsqueeze(-2) for path in rows}}
    return token.replaced(joined["key"], joined["value"], joined.get("read_key"), gates), kept


def gradients(rule: Rule, token: Quantities, point: Weights) -> tuple[Weights, Weights]:
    """Return dl/dW at the evaluation point, and the same with the step sizes on it."""
    step_size, write_size = token.gates["update.step_size"], token.gates.get("update.write_size")
    if write_size is None and rule.bias.erase_key == "key":
        found = loss_gradients(rule, token, point)
        return found, scaled(rule, found, step_size)
    # l2 and dot only: the erased part M(W*, p) and the written part v have keys and strengths of their own.
    read_key = token.key if token.read_key is None else token.read_key
    prediction, pull = _pullback(rule, token, point, token.key)
    if token.read_key is not None:
        prediction = rule.memory.network(product(point), read_key, token.parameters)
    pull_erase = pull if rule.bias.erase_key == "key" else _pullback(rule, token, point, read_key)[1]
    erase = pull_erase(prediction if rule.bias.error == "residual" else torch.zeros_like(prediction))
    write = pull(-rule.memory.target(token.value))
    stepped_erase = scaled(rule, erase, step_size)
    stepped_write = scaled(rule, write, step_size if write_size is None else write_size)
    return (
        {name: erase[name] + write[name] for name in erase},
        {name: stepped_erase[name] + stepped_write[name] for name in erase},
    )


def loss_gradients(rule: Rule, token: Quantities, point: Weights) -> Weights:
    """Return J(k)^T delta, delta the bias's error where the prediction is read, weighed by the window's gate."""
    gates = bias_gates(token)
    prediction, pull = _pullback(rule, token, point, token.key)
    if token.read_key is not None:
        prediction = rule.memory.network(product(point), token.read_key, token.parameters)
    delta = rule.bias.gradient(prediction, rule.memory.target(token.value), gates)
    return pull(delta * gates["window.weights"] if "window.weights" in gates else delta)


def bias_gates(token: Quantities) -> dict[str, Tensor]:
    """Return the bias's gates by field name in the layout of errors, [B or 1, H, C, 1 or V]."""
    found = {}
    for path, gate in token.gates.items():
        if path.startswith("bias.") and not path.startswith("bias.read_key."):
            laid = gate.squeeze(-2)
            found[path.removeprefix("bias.")] = laid if laid.ndim == 4 else laid.unsqueeze(2)
    return found


def _pullback(rule: Rule, token: Quantities, point: Weights, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Weights]]:
    """Return M(W*, x) and the map delta -> J(x)^T delta, by automatic differentiation of the memory's network."""

    def network(weights: Weights) -> Tensor:
        return rule.memory.network(product(weights), x, token.parameters)

    pulled: Any = torch.func.vjp(network, dict(point))
    prediction, vjp = pulled
    return prediction, lambda delta: vjp(delta)[0]


def product(weights: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """Return x @ W by name, for weights [B, H, d_in, d_out] or, with one for each token, [B, H, C, d_in, d_out]."""

    def linear(name: str, x: Tensor) -> Tensor:
        weight = weights[name]
        return x @ weight if weight.ndim == 4 else (x.unsqueeze(-2) @ weight).squeeze(-2)

    return linear


def _linked(rule: Rule, dual: Weights) -> Weights:
    return {name: rule.retention.link(tensor) for name, tensor in dual.items()}


def _keeper(rule: Rule, token: Quantities, name: str) -> Keeper:
    gates = retained(rule, token, name)
    return lambda weight: rule.retention.keep(weight, gates)


def retained(rule: Rule, token: Quantities, name: str) -> dict[str, Tensor]:
    """Return the retention's gates by field name, laid on a weight."""
    return {
        path.removeprefix("retention."): gate_on_weight(gate, weight_axis(rule, name, gate))
        for path, gate in token.gates.items()
        if path.startswith("retention.")
    }


def scaled(rule: Rule, gradients: Weights, gate: Tensor) -> Weights:
    """Return every gradient times a gate laid on its weight."""
    return {name: gate_on_weight(gate, weight_axis(rule, name, gate)) * tensor for name, tensor in gradients.items()}
