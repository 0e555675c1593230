"""The cases of benchmarks.chunked whose chunkwise form is that of a whole rule, not of one kernel.

``chunked`` is the form that ``archspec.compile`` would choose, ``reference`` the recurrence that defines the rule, and
``loop`` the same rule written out by hand, its gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from archspec.blocks.recurrence import recurrence
from archspec.blocks.rule import Quantities
from archspec.forms import form_of
from archspec.loading import load
from archspec.lowering import decide
from archspec.rule import Rule
from archspec.schema import MemoryMixer
from benchmarks.chunked_cases import CHUNK, B, Case, Form, H, Inputs, K, V

WINDOW, ITERATIONS = 3, 8
STEP = {"step_size": "sigmoid"}
NETWORK = {"kind": "mlp", "expansion": 2, "activation": "silu", "residual": True}
DECAY = {"kind": "decay", "gate": "sigmoid"}


@cache
def _rule(name: str) -> Rule:
    """Return the rule of a case; what its gates and projections are is replaced by the case's own tensors."""
    choices: dict[str, dict[str, Any]] = {
        "solve": {
            "memory": {"kind": "matrix", "scale": 1},
            "update": {"kind": "conjugate_gradient", **STEP, "iterations": ITERATIONS, "ridge": 1.0},
            "retention": DECAY,
        },
        "anchored": {
            "memory": {"kind": "matrix", "scale": 1},
            "bias": {"kind": "l2", "window": {"length": WINDOW}},
            "update": {"kind": "gradient_descent", **STEP, "anchor": CHUNK},
            "retention": {**DECAY, "order": "together"},
        },
        "sequential": {
            "memory": NETWORK,
            "update": {"kind": "gradient_descent", **STEP},
            "retention": DECAY,
        },
        "sequential_cubic": {
            "memory": {"kind": "matrix", "scale": 1},
            "bias": {"kind": "lp", "p": 3},
            "update": {"kind": "gradient_descent", **STEP},
            "retention": DECAY,
        },
    }
    mixer = {"num_heads": H, "key_dim": K, "value_dim": V, **choices[name]}
    document = {"name": "case", "model_dim": H * K, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}
    found = load(document).blocks["main"].mixer
    if not isinstance(found, MemoryMixer):
        raise TypeError("a case is a memory")
    rule = Rule.of(found, H * K)
    family = decide(rule).family
    if family != name.partition("_")[0]:
        raise ValueError(f"{name} is of the family {family}")
    return rule


def _inputs(*more: str) -> Callable[[int], Inputs]:
    def make(T: int) -> Inputs:
        torch.manual_seed(0)
        every = {
            "q": torch.randn(B, T, H, K),
            "k": normalize(torch.randn(B, T, H, K), dim=-1),
            "v": torch.randn(B, T, H, V),
            "step": 0.1 * torch.rand(B, T, H),
            "g": -0.1 * torch.rand(B, T, H),
            "w1": torch.randn(H, K, 2 * K) / K**0.5,
            "w2": torch.randn(H, 2 * K, V) / (2 * K) ** 0.5,
        }
        return {name: every[name] for name in ("q", "k", "v", "step", "g", *more)}

    return make


def _form(name: str, backend: str) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor, **start: Tensor) -> Tensor:
        rule = _rule(name)
        gates = {"update.step_size": step[..., None, None], "retention.gate": g[..., None, None]}
        if name == "solve":
            gates["update.ridge"] = torch.ones(1, 1, H, 1, 1)
        form = recurrence if backend == "reference" else form_of(decide(rule))
        return form(rule, Quantities(q, k, v, gates, start), None, 0)[0]

    return run


def _tokens(x: Tensor) -> tuple[Tensor, ...]:
    """Cut [B, T, H, ...] into T tensors [B * H, ...]."""
    return x.transpose(1, 2).flatten(0, 1).unbind(1)


def _rows(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor) -> list[tuple[Tensor, ...]]:
    """Return (query, key, value [B H, 1, d], step, alpha [B H, 1, 1]) of every token."""
    vectors = [_tokens(x[..., None, :]) for x in (q, k, v)]
    gates = [_tokens(x[..., None, None]) for x in (step, g.exp())]
    return list(zip(*vectors, *gates, strict=True))


def _joined(outputs: list[Tensor]) -> Tensor:
    """Return T rows [B * H, 1, V] as [B, T, H, V]."""
    return torch.cat(outputs, 1).view(B, H, len(outputs), -1).transpose(1, 2)


def solve_loop(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor) -> Tensor:
    """H = a H + b k k^T; S = a S + b k v^T; o = S^T (H + 1)^-1 q by conjugate gradients."""
    covariance, state = q.new_zeros(B * H, K, K), q.new_zeros(B * H, K, V)
    outputs = []
    for query, key, value, beta, alpha in _rows(q, k, v, step, g):
        strong = (beta * key).mT
        covariance = torch.baddbmm(alpha * covariance, strong, key)
        state = torch.baddbmm(alpha * state, strong, value)
        x, residual, direction = torch.zeros_like(query), query, query
        square = residual.square().sum(-1, keepdim=True)
        for _ in range(ITERATIONS):
            image = torch.baddbmm(direction, direction, covariance)
            rate = square / (direction * image).sum(-1, keepdim=True).clamp(min=1e-30)
            x = torch.addcmul(x, rate, direction)
            residual = torch.addcmul(residual, rate, image, value=-1)
            following = residual.square().sum(-1, keepdim=True)
            direction = torch.addcmul(residual, following / square.clamp(min=1e-30), direction)
            square = following
        outputs.append(torch.bmm(x, state))
    return _joined(outputs)


def window_loop(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor) -> Tensor:
    """S = a S - eta sum over the last tokens of k (A^T k - v)^T, A the weights at every CHUNK-th token."""
    state = anchor = q.new_zeros(B * H, K, V)
    keys, values, outputs = q.new_zeros(B * H, 0, K), q.new_zeros(B * H, 0, V), list[Tensor]()
    for t, (query, key, value, eta, alpha) in enumerate(_rows(q, k, v, step, g)):
        anchor = state if t % CHUNK == 0 else anchor
        keys, values = torch.cat([keys, key], 1)[:, -WINDOW:], torch.cat([values, value], 1)[:, -WINDOW:]
        error = eta * torch.baddbmm(values, keys, anchor, beta=-1)
        state = torch.baddbmm(alpha * state, keys.mT, error, alpha=-1)
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def network_loop(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """A two-layer memory whose gradients, by hand, are taken at the decayed weights of every token."""
    first, second = (w.expand(B, *w.shape).flatten(0, 1) for w in (w1, w2))
    outputs = []
    for query, key, value, eta, alpha in _rows(q, k, v, step, g):
        first, second = alpha * first, alpha * second
        inner = torch.bmm(key, first)
        gate = inner.sigmoid()
        hidden = inner * gate
        error = eta * torch.baddbmm(key - value, hidden, second)
        back = torch.bmm(error, second.mT) * (gate + hidden * (1 - gate))
        first = torch.baddbmm(first, key.mT, back, alpha=-1)
        second = torch.baddbmm(second, hidden.mT, error, alpha=-1)
        outputs.append(torch.baddbmm(query, silu(torch.bmm(query, first)), second))
    return _joined(outputs)


def cubic_loop(q: Tensor, k: Tensor, v: Tensor, step: Tensor, g: Tensor) -> Tensor:
    """S = a S; S -= eta k (r |r|)^T with r = S^T k - v; o = S^T q."""
    state = q.new_zeros(B * H, K, V)
    outputs = []
    for query, key, value, eta, alpha in _rows(q, k, v, step, g):
        state = alpha * state
        error = torch.baddbmm(value, key, state, beta=-1)
        state = torch.baddbmm(state, (eta * key).mT, error * error.abs(), alpha=-1)
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def _case(name: str, what: str, loop: Form, *more: str) -> Case:
    return Case(name.partition("_")[0], what, _inputs(*more), _form(name, "chunked"), _form(name, "reference"), loop)


RULE_CASES = (
    _case("solve", f"{ITERATIONS} iterations", solve_loop),
    _case("anchored", f"matrix, window {WINDOW}, anchor {CHUNK}", window_loop),
    _case("sequential", "two layers, decay first", network_loop, "w1", "w2"),
    _case("sequential_cubic", "matrix under lp, p = 3", cubic_loop),
)
