"""The meaning of a spec's four choices, token by token: the specification that every faster form is tested against.

Per head, a memory M with dual weights Z and W = link(Z) (Miras, arXiv:2504.13173, section 3). At token t:

1. delta = bias.gradient(M(W*, p), v), W* the evaluation point: the anchor's weights, or the current ones, decayed
   before (``decay_first``) or not (``together``, ``step_first``);
2. the update rule turns dl/dW = J(k)^T delta into an increment U, J the Jacobian of M(W*, k) in W;
3. Z = alpha Z + U, or alpha (Z + U) for ``step_first``, and W = link(Z);
4. o = M(W, q).

Slow on purpose: only the components' own methods, in any dtype and differentiable in everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities, gate_on_weight, initial_state
from archspec.families import Step
from archspec.rule import Rule

Weights = dict[str, Tensor]


def recurrence(
    rule: Rule, quantities: Quantities, state: MemoryState | None = None, position: int = 0
) -> tuple[Tensor, MemoryState]:
    """Run the rule over a stretch of tokens.

    Args:
        rule: the four choices and the sizes.
        quantities: queries, keys, values and gates of T tokens.
        state: the state before the first of them; None is the start of a sequence.
        position: index of the first of them in its sequence; it sets the anchor's phase.

    Returns:
        The read-outs o [B, T, H, V] in the queries' dtype, and the state after the last token.
    """
    state = initial_state(rule, quantities) if state is None else dict(state)
    advance = _attend if rule.memory.grows else _descend
    outputs = []
    for t in range(quantities.query.shape[1]):
        read, state = advance(rule, _token(quantities, t), state, position + t)
        outputs.append(read)
    return torch.stack(outputs, dim=1).to(quantities.query.dtype), state


def _token(quantities: Quantities, t: int) -> Quantities:
    """One token, in the layout [B, H, 1, d] of memories; gates [B or 1, H, 1 or K, 1 or V]."""
    dtype = quantities.state_dtype

    def of(tensor: Tensor) -> Tensor:
        return tensor[:, t].unsqueeze(2).to(dtype)

    return Quantities(
        query=of(quantities.query),
        key=of(quantities.key),
        value=of(quantities.value),
        gates={name: gate[:, t if gate.shape[1] > 1 else 0].to(dtype) for name, gate in quantities.gates.items()},
        start=quantities.start,
        parameters={name: tensor.to(dtype) for name, tensor in quantities.parameters.items()},
        read_key=None if quantities.read_key is None else of(quantities.read_key),
    )


def _descend(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Advance weights by one token: decay, gradient, update, link, read."""
    names = list(rule.memory.weights(rule.dims))
    before = {name: state[f"dual.{name}"] for name in names}
    alpha = {name: _alpha(rule, token, name) for name in names}
    anchor = rule.update.anchor
    anchored = {}
    if anchor is not None:
        fresh = position % anchor.every == 0
        anchored = _linked(rule, before) if fresh else {name: state[f"anchor.{name}"] for name in names}
    decay_first = rule.retention.order == "decay_first"
    dual = {name: alpha[name] * before[name] for name in names} if decay_first else before
    point = anchored or _linked(rule, dual)

    gradients, stepped = _gradients(rule, token, point)
    after: MemoryState = {}
    for name in names:
        buffers = {buffer: state[f"{buffer}.{name}"] for buffer in rule.update.buffers}
        step = Step(
            gradient=gradients[name],
            stepped=stepped[name] * _mean_factor(rule, position),
            gates={
                path.removeprefix("update."): gate_on_weight(gate, _axis(rule, name, gate))
                for path, gate in token.gates.items()
                if path.startswith("update.")
            },
            key=token.key.squeeze(2),
        )
        increment, buffers = rule.update.increment(step, buffers)
        dual_after = _combine(rule, dual[name], alpha[name], increment)
        after[f"dual.{name}"] = _mean_reduced(rule, state, name, dual_after, increment, position)
        after.update({f"{buffer}.{name}": value for buffer, value in buffers.items()})
        if anchor is not None:
            # At the end of a chunk the anchor moves, so that a state between two chunks says where the next begins.
            ends = (position + 1) % anchor.every == 0
            after[f"anchor.{name}"] = rule.retention.link(after[f"dual.{name}"]) if ends else anchored[name]
    read_from = before if rule.read == "before" else {name: after[f"dual.{name}"] for name in names}
    read = rule.memory.network(_linear(_linked(rule, read_from)), token.query, token.parameters)
    return rule.memory.finish(read, rule.dims).squeeze(2), after


def _combine(rule: Rule, dual: Tensor, alpha: Tensor, increment: Tensor) -> Tensor:
    if rule.retention.order == "decay_first":
        return dual + increment
    if rule.retention.order == "together":
        return alpha * dual + increment
    return alpha * (dual + increment)


def _mean_factor(rule: Rule, position: int) -> float:
    """1/i for the i-th token of a chunk whose steps are averaged, else 1."""
    anchor = rule.update.anchor
    return 1.0 / (position % anchor.every + 1) if anchor is not None and anchor.reduce == "mean" else 1.0


def _mean_reduced(rule: Rule, state: MemoryState, name: str, dual: Tensor, increment: Tensor, position: int) -> Tensor:
    """With ``reduce: mean``, W_i = W_0 + (1/i) sum of the first i steps; from W_{i-1} that is a running mean."""
    anchor = rule.update.anchor
    if anchor is None or anchor.reduce != "mean":
        return dual
    index = position % anchor.every  # i - 1
    start = state[f"dual.{name}"] if index == 0 else state[f"anchor.{name}"]
    return start + (state[f"dual.{name}"] - start) * (index / (index + 1)) + increment


def _gradients(rule: Rule, token: Quantities, point: Weights) -> tuple[Weights, Weights]:
    """Return dl/dW at the evaluation point, and the same with the step sizes on it."""
    target = rule.memory.target(token.value)
    gates = {
        path.removeprefix("bias."): gate.squeeze(-2).unsqueeze(-2)
        for path, gate in token.gates.items()
        if path.startswith("bias.") and gate.shape[-2] == 1
    }
    prediction, pull = _pullback(rule, token, point, token.key)
    read_key = token.key if token.read_key is None else token.read_key
    if token.read_key is not None:
        prediction = rule.memory.network(_linear(point), read_key, token.parameters)
    write_size = token.gates.get("update.write_size")
    split = write_size is not None or rule.bias.erase_key != "key"
    if not split:
        gradients = pull(rule.bias.gradient(prediction, target, gates))
        return gradients, _scaled(rule, gradients, token.gates["update.step_size"])
    # l2 and dot only: the erased part M(W*, p) and the written part v have keys and strengths of their own.
    pull_erase = pull if rule.bias.erase_key == "key" else _pullback(rule, token, point, read_key)[1]
    erase = pull_erase(prediction if rule.bias.error == "residual" else torch.zeros_like(prediction))
    write = pull(-target)
    step_size = token.gates["update.step_size"]
    stepped_erase = _scaled(rule, erase, step_size)
    stepped_write = _scaled(rule, write, step_size if write_size is None else write_size)
    return (
        {name: erase[name] + write[name] for name in erase},
        {name: stepped_erase[name] + stepped_write[name] for name in erase},
    )


def _pullback(rule: Rule, token: Quantities, point: Weights, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Weights]]:
    """Return M(W*, x) and the map delta -> J(x)^T delta, by automatic differentiation of the memory's network."""

    def network(weights: Weights) -> Tensor:
        return rule.memory.network(_linear(weights), x, token.parameters)

    pulled: Any = torch.func.vjp(network, dict(point))
    prediction, vjp = pulled
    return prediction, lambda delta: vjp(delta)[0]


def _linear(weights: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, x: x @ weights[name]


def _linked(rule: Rule, dual: Weights) -> Weights:
    return {name: rule.retention.link(tensor) for name, tensor in dual.items()}


def _alpha(rule: Rule, token: Quantities, name: str) -> Tensor:
    if rule.retention.decay_gate is None:
        return torch.ones((), dtype=token.query.dtype, device=token.query.device)
    log_alpha = token.gates["retention.gate"]
    return gate_on_weight(log_alpha, _axis(rule, name, log_alpha)).exp()


def _scaled(rule: Rule, gradients: Weights, gate: Tensor) -> Weights:
    return {name: gate_on_weight(gate, _axis(rule, name, gate)) * tensor for name, tensor in gradients.items()}


def _axis(rule: Rule, name: str, gate: Tensor) -> str:
    """Where on the weight a gate varies, from the axes the gate itself has."""
    varies = (gate.shape[-2] > 1, gate.shape[-1] > 1)
    per = {(False, False): "head", (True, False): "key", (False, True): "value", (True, True): "state"}[varies]
    return rule.memory.axis(name, per)  # type: ignore[arg-type]


def _attend(rule: Rule, token: Quantities, state: MemoryState, position: int) -> tuple[Tensor, MemoryState]:
    """Keep one more key and value, and read all that are kept: o = sum_j softmax_j(s q.k_j + G_t - G_j) v_j."""
    keys = torch.cat([state["keys"], token.key.transpose(1, 2)], dim=1)
    values = torch.cat([state["values"], token.value.transpose(1, 2)], dim=1)
    window = rule.memory.window  # type: ignore[attr-defined]
    length = keys.shape[1]
    seen = slice(0 if window is None else max(0, length - window), None)
    kept = slice(0 if window is None else max(0, length - window + 1), None)  # what the next token will see
    groups = rule.dims.num_heads // keys.shape[2]
    every_key, every_value = (x[:, seen].repeat_interleave(groups, dim=2) for x in (keys, values))
    after = {"keys": keys[:, kept], "values": values[:, kept]}
    scores = torch.einsum("bhk,bshk->bhs", token.query.squeeze(2), every_key)
    scores = scores * rule.memory.temperature(rule.dims)  # type: ignore[attr-defined]
    if "log_decay" in state:
        # log_decay of a stored token is the sum of log(alpha) over the tokens after it.
        log_alpha = token.gates["retention.gate"][..., 0, 0].expand(keys.shape[0], -1)[:, None]  # [B, 1, H]
        sums = torch.cat([state["log_decay"] + log_alpha, torch.zeros_like(log_alpha)], dim=1)
        scores = scores + sums[:, seen].transpose(1, 2)
        after["log_decay"] = sums[:, kept]
    return torch.einsum("bhs,bshv->bhv", scores.softmax(-1), every_value), after
