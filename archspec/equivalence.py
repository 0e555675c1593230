"""Choices that are the same function of the same parameters: each merge with its reason.

A merge is true only if the parameter tensors correspond one to one (shapes and initial law) and outputs and states
agree for all values and lengths. Hashes and lowering both work on what is left after the merges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from archspec.families import Bias, Dim, Gate, Memory, Retention, Update
from archspec.schema import MemoryMixer


def _constant(gate: Gate | None) -> float | None:
    """Return the number a constant gate is, or None when it is not one."""
    value = getattr(gate, "value_", None)
    return None if gate is None or gate.kind != "constant" or value is None else value * gate.scale


Merge = Callable[[MemoryMixer, int], MemoryMixer]


def simplified(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """Return the simplest mixer that is the same function of the same parameters."""
    for merge in MERGES:
        mixer = merge(mixer, model_dim)
    return mixer


def _with(mixer: MemoryMixer, **choices: Any) -> MemoryMixer:
    return mixer.model_copy(update=choices)


def _one_row(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """A vector is a matrix of one row, whose key and query are 1."""
    memory = mixer.memory
    if memory.kind != "vector":
        return mixer
    fields = {name: getattr(memory, name) for name in ("scale", "initial_")}
    ones = {name: mixer.projection(name) for name in ("query", "key", "value")}  # type: ignore[arg-type]
    matrix = Memory.parse("matrix").model_copy(update=fields)
    return _with(mixer, memory=matrix, key_dim=Dim(fixed=1), qkv=None, qk=None, **ones)


def _score_positions(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """A position that acts on scores is a decay of what is stored."""
    projections = {name: mixer.projection(name) for name in ("query", "key", "value")}  # type: ignore[arg-type]
    position = projections["query"].position
    if position is None or not position.on_scores or mixer.retention.decay_gate is not None:
        return mixer
    decay = Retention.parse({"kind": "decay", "gate": 1.0}).model_copy(update={"gate": position.score_decay()})
    plain = {name: projection.model_copy(update={"position": None}) for name, projection in projections.items()}
    return _with(mixer, retention=decay, qkv=None, qk=None, **plain)


def _no_decay(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """Decay with alpha = 1 is no retention, and its order is void."""
    retention = mixer.retention
    if retention.kind == "decay" and _constant(retention.decay_gate) == 1:
        return _with(mixer, retention=Retention.parse("none"))
    return mixer


def _no_momentum(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """Momentum with mu = 0 is gradient descent."""
    update = mixer.update
    if update.kind != "momentum" or _constant(getattr(update, "momentum", None)) != 0:
        return mixer
    shared = {name: getattr(update, name) for name in Update.model_fields}
    return _with(mixer, update=Update.parse("gradient_descent").model_copy(update=shared))


def _one_step(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """Several steps a token, when they are one, are gradient descent."""
    update = mixer.update
    if update.kind != "multi_step" or update.steps_per_token != 1:
        return mixer
    shared = {name: getattr(update, name) for name in Update.model_fields}
    return _with(mixer, update=Update.parse("gradient_descent").model_copy(update=shared))


def _identity_link(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """At q = 2 both links of lq are the identity: a decay, wherever the link applies."""
    retention, anchor = mixer.retention, mixer.update.anchor
    if retention.kind != "lq" or getattr(retention, "q", None) != 2:
        return mixer
    plain = Retention.parse({"kind": "decay", "gate": 1.0})
    plain = plain.model_copy(update={"gate": retention.decay_gate, "order": retention.order})
    if anchor is not None:
        anchor = anchor.model_copy(update={"link": "token"})
    return _with(mixer, retention=plain, update=mixer.update.model_copy(update={"anchor": anchor}))


def _same_write_size(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """A constant write size equal to the constant step size says nothing new."""
    update = mixer.update
    write = _constant(update.write_size)
    if write is not None and write == _constant(update.step_size):
        return _with(mixer, update=update.model_copy(update={"write_size": None}))
    return mixer


def _simple_bias(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """lp at p = 1 is l1 and at p = 2 is l2 (without smoothing); so is weighted_l2 of ones.

    Huber's forms coincide for one value channel.
    """
    bias = mixer.bias
    shared = {name: getattr(bias, name) for name in Bias.model_fields}
    window = bias.window
    if window is not None and window.length == 1 and (window.weights is None or _constant(window.weights) == 1):
        bias = bias.model_copy(update={"window": None})
        return _simple_bias(_with(mixer, bias=bias), model_dim)
    if bias.kind == "lp" and getattr(bias, "smoothing", None) is None and getattr(bias, "p", None) in (1, 2):
        name = "l1" if getattr(bias, "p", None) == 1 else "l2"
        return _with(mixer, bias=Bias.parse(name).model_copy(update=shared))
    if bias.kind == "weighted_l2" and _constant(getattr(bias, "weights", None)) == 1:
        return _with(mixer, bias=Bias.parse("l2").model_copy(update=shared))
    if bias.kind == "huber" and mixer.dims(model_dim).value_dim == 1:
        return _with(mixer, bias=bias.model_copy(update={"form": "coordinate"}))
    return mixer


def _fixed_gradient(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """On a matrix under dot the gradient does not see W: decay_first is together, and any anchor is the token.

    Not so where a link applies at anchors: it is what is read that changes there.
    """
    anchor = mixer.update.anchor
    if mixer.memory.kind != "matrix" or mixer.bias.error != "value":
        return mixer
    if mixer.retention.has_link and anchor is not None and anchor.link == "anchor":
        return mixer
    retention, update = mixer.retention, mixer.update
    # Several steps a token share one decay, which has no place "together" with each of them.
    if retention.order == "decay_first" and update.steps_per_token == 1:
        retention = retention.model_copy(update={"order": "together"})
    if update.anchor is not None and update.anchor.reduce == "sum":
        update = update.model_copy(update={"anchor": None})
    return _with(mixer, retention=retention, update=update)


def _anchor_of_one(mixer: MemoryMixer, model_dim: int) -> MemoryMixer:
    """An anchor at every token is the token itself; it sees undecayed weights, as ``together`` does."""
    anchor = mixer.update.anchor
    if anchor is None or anchor.every != 1 or anchor.reduce == "learned":
        return mixer
    retention = mixer.retention
    if retention.order == "decay_first":
        retention = retention.model_copy(update={"order": "together"})
    return _with(mixer, retention=retention, update=mixer.update.model_copy(update={"anchor": None}))


MERGES: tuple[Merge, ...] = (
    _one_row,
    _identity_link,
    _one_step,
    _no_decay,
    _score_positions,
    _no_momentum,
    _same_write_size,
    _simple_bias,
    _fixed_gradient,
    _anchor_of_one,
)
