"""Why a lowering family cannot run a rule: one function a family, which returns the reason, or None when it can."""

from __future__ import annotations

from archspec.families import Gate, gates_of
from archspec.rule import Rule

MAX_WINDOW, MAX_WINDOW_PER_KEY = 8, 4
"""Tokens of a loss's window up to which a triangular system of its rows is worth its cost on a CPU: where windows share
the products of their keys, and where gates of key channels tell them apart."""


def _first(*refusals: str | None) -> str | None:
    return next((refusal for refusal in refusals if refusal is not None), None)


def not_softmax(rule: Rule) -> str | None:
    if not rule.memory.grows:
        return f"memory {rule.memory.kind} stores weights, not tokens"
    return _reads_after(rule)


def _reads_after(rule: Rule) -> str | None:
    return None if rule.read == "after" else "the query reads before its own token is written"


def _is_matrix(rule: Rule) -> str | None:
    return None if rule.memory.kind == "matrix" else f"memory {rule.memory.kind} is not a matrix"


def _plain_descent(rule: Rule) -> str | None:
    if rule.update.kind != "gradient_descent":
        return f"update {rule.update.kind} is not one plain gradient step a token"
    if rule.update.anchor is not None:
        return f"gradients are taken every {rule.update.anchor.every} tokens"
    return None


def _no_link(rule: Rule) -> str | None:
    if rule.retention.turns:
        return f"retention {rule.retention.kind} turns pairs of states"
    return f"retention {rule.retention.kind} has a nonlinear link" if rule.retention.has_link else None


def _no_window(rule: Rule) -> str | None:
    return "the loss sums over a window of tokens" if rule.bias.window is not None else None


def _axes(rule: Rule, *, decays: tuple[str, ...], steps: tuple[str, ...]) -> str | None:
    gate = rule.retention.decay_gate
    if gate is not None and rule.granularity(gate) not in decays:
        return f"the decay varies per {rule.granularity(gate)}, not per {' or '.join(decays)}"
    sizes = {"step_size": rule.update.step_size, "write_size": rule.update.write_size, "weights": _weights(rule)}
    for name, size in sizes.items():
        if size is not None and rule.granularity(size) not in steps:
            return f"{name} varies per {rule.granularity(size)}, not per {' or '.join(steps)}"
    return None


def not_linear(rule: Rule) -> str | None:
    error = rule.bias.error
    return _first(
        _is_matrix(rule),
        None if error == "value" else f"bias {rule.bias.kind} has an error that depends on the prediction",
        None if rule.update.kind == "multi_step" else _plain_descent(rule),
        _no_link(rule),
        _no_window(rule),
        _axes(rule, decays=("head", "key"), steps=("head", "key", "value")),
        _reads_after(rule),
    )


def _residual(rule: Rule) -> str | None:
    linear = rule.bias.error in ("residual", "weighted")
    return None if linear else f"bias {rule.bias.kind} has an error that is not M(k) - v, weighed or not"


def _weights(rule: Rule) -> Gate | None:
    """Return the gate on the errors, which is a factor on the step."""
    return getattr(rule.bias, "weights", None) if rule.bias.error == "weighted" else None


def not_delta(rule: Rule) -> str | None:
    return _first(
        _is_matrix(rule),
        _residual(rule),
        _delta_steps(rule),
        _turns(rule) if rule.retention.turns else _no_link(rule),
        _short_window(rule),
        _one_axis(rule),
    )


def _one_axis(rule: Rule) -> str | None:
    """Gates vary over keys, or over values, whose channels are then columns apart; a window's over keys alone."""
    gates = {
        "decay": rule.retention.decay_gate,
        "step_size": rule.update.step_size,
        "write_size": rule.update.write_size,
        "weights": _weights(rule),
    }
    if getattr(rule.retention, "pairs", "key") == "value":  # then it is a factor on the strengths
        gates["gain"] = getattr(rule.retention, "gain", None)
    if getattr(rule.retention, "discretization", "exact") == "bilinear":  # then magnitudes depend on it
        gates["phase"] = getattr(rule.retention, "phase", None)
    grains = {name: rule.granularity(gate) for name, gate in gates.items() if gate is not None}
    of_values = [name for name, grain in grains.items() if grain in ("value", "state")]
    of_keys = [name for name, grain in grains.items() if grain in ("key", "state")]
    if of_values and of_keys:
        both = [name for name in of_values if name in of_keys]
        return f"{both[0]} varies per state" if both else f"{of_values[0]} varies per value and {of_keys[0]} per key"
    if of_values and (rule.bias.window is not None or rule.bias.erase_key != "key"):
        return f"{of_values[0]} varies per value, and columns erase and write one key a token"
    return None


def _short_window(rule: Rule) -> str | None:
    window, gates = rule.bias.window, (rule.retention.decay_gate, rule.update.step_size)
    if window is None:
        return None
    per_key = any(gate is not None and rule.granularity(gate) != "head" for gate in gates)
    if window.length <= (MAX_WINDOW_PER_KEY if per_key else MAX_WINDOW):
        return None
    gates_say = ", with gates per key" if per_key else ""
    return f"the loss sums over {window.length} tokens{gates_say}: as many rows a token cost more than a step a token"


def _turns(rule: Rule) -> str | None:
    """Turns of pairs are taken into keys and queries, or into values, where the step's strengths allow it."""
    retention, update = rule.retention, rule.update
    if rule.bias.window is not None:
        return _no_window(rule)
    grains = {name: rule.granularity(gate) for name, gate in gates_of(retention)}
    steps = {
        name: rule.granularity(size)
        for name, size in (
            ("step_size", update.step_size),
            ("write_size", update.write_size),
            ("weights", _weights(rule)),
        )
        if size is not None
    }
    exact = getattr(retention, "discretization", "exact") == "exact"
    if getattr(retention, "pairs", "key") == "value":
        if not exact:
            return "the decay turns what is erased as well"
        if retention.order == "together":
            return "the decay turns pairs of values that the step has not"
        if grains["phase"] in ("key", "state"):
            return f"phase varies per {grains['phase']}, and pairs of values turn"
        if grains.get("gain") in ("key", "state"):
            return f"gain varies per {grains['gain']}, and pairs of values turn"
        return next((f"{n} varies per {g}, within a pair" for n, g in steps.items() if g in ("value", "state")), None)
    received = not exact or getattr(retention, "gain", None) is not None
    turning = [name for name in grains if name != "gate" or received]  # what turns, and turned factors, are made of
    for name in turning:
        if grains[name] in ("value", "state"):
            return f"{name} varies per {grains[name]}, and pairs of keys turn"
    by_key = received or any(grain in ("key", "state") for grain in steps.values())
    if by_key and (update.write_size is not None or rule.bias.erase_key != "key"):
        return "the decay turns keys of which some write and others erase, each with strengths of its own"
    if rule.bias.erase_key != "key" and retention.order == "together":
        return "the decay turns pairs of keys between what is read and what is erased"
    return None


def _delta_steps(rule: Rule) -> str | None:
    """Several steps are more tokens of the same rule, and an implicit step is an explicit one of another size."""
    update = rule.update
    if update.kind == "multi_step":
        return None
    if update.kind == "implicit":
        if getattr(update, "diagonal", False):
            return "the diagonal implicit step decays every state by itself"
        return None
    return _plain_descent(rule)


def not_momentum_delta(rule: Rule) -> str | None:
    update = rule.update
    momentum = getattr(update, "momentum", None)
    if update.kind != "momentum" or momentum is None:
        return f"update {update.kind} has no momentum"
    if rule.granularity(momentum) != "head":
        return f"momentum varies per {rule.granularity(momentum)}, not per head"
    return _first(
        _is_matrix(rule),
        _residual(rule),
        f"gradients are taken every {update.anchor.every} tokens" if update.anchor is not None else None,
        _no_link(rule),
        _no_window(rule),
        _axes(rule, decays=("head",), steps=("head", "key")),
    )


def not_scan(rule: Rule) -> str | None:
    return _first(
        _is_matrix(rule),
        _mixing_step(rule),
        None if rule.retention.turns else _no_link(rule),
        _no_window(rule),
    )


def _mixing_step(rule: Rule) -> str | None:
    """Whether a step mixes the entries of the weights: one on a given direction, or a diagonal one, does not."""
    update, decays = rule.update, rule.retention.decay_gate is not None
    if update.kind == "implicit" and getattr(update, "diagonal", False):
        if rule.retention.turns:
            return _no_link(rule)
        if decays and rule.retention.order == "together":
            return "the step is taken from undecayed weights, so that a state's factor may change sign"
        return None
    if rule.bias.error != "value":
        return f"bias {rule.bias.kind} has an error that mixes the states"
    return _plain_descent(rule)


def not_solve(rule: Rule) -> str | None:
    return None if rule.update.solves else f"update {rule.update.kind} does not solve for the weights"


def gradient_is_fixed(rule: Rule) -> bool:
    """Whether dl/dW does not depend on W, so that any anchor gives the same function."""
    return rule.memory.kind == "matrix" and rule.bias.error == "value"


def not_online(rule: Rule) -> str | None:
    update, anchor = rule.update, rule.update.anchor
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    if update.kind not in ("gradient_descent", "momentum"):
        return f"update {update.kind} is not linear in the gradients"
    if anchor is None and not gradient_is_fixed(rule):
        return "every token's gradient is taken at the weights that the token before it left"
    decay = rule.retention.decay_gate
    if decay is not None and rule.granularity(decay) == "state":
        return "the decay varies per state, along both axes of a weight"
    return _first(
        _no_link(rule),
        _no_window(rule),
        "the anchor lags one token behind" if anchor is not None and anchor.lag else None,
        "the write has a strength of its own" if update.write_size is not None else None,
        "the error is erased with another key than it is written with" if rule.bias.erase_key != "key" else None,
    )


def not_anchored(rule: Rule) -> str | None:
    update, anchor = rule.update, rule.update.anchor
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    if update.kind not in ("gradient_descent", "momentum", "muon"):
        if update.kind != "multi_step" or not gradient_is_fixed(rule):
            return f"update {update.kind} needs the weights between its steps"
        if rule.retention.order == "together" and rule.retention.decay_gate is not None:
            return "every step of a token decays the weights"
    if anchor is None and not gradient_is_fixed(rule):
        return "every token's gradient is taken at the weights that the token before it left"
    return "the steps since the anchor are averaged" if anchor is not None and anchor.reduce != "sum" else None


def not_sequential(rule: Rule) -> str | None:
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    return f"update {rule.update.kind} solves for the weights" if rule.update.solves else None
