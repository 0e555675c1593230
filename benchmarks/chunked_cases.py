"""The cases of benchmarks.chunked: inputs, the kernels' two forms, and a tight token loop for every rule.

The loops here cut the inputs once, keep the state in one tensor and spend as few operations a token as the rule
needs; they are what one would write by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from archspec.kernels.delta import delta_rule
from archspec.kernels.dplr import dplr_rule
from archspec.kernels.linear import linear_attention
from archspec.kernels.momentum_delta import momentum_delta_rule
from archspec.kernels.online import online_memory
from archspec.kernels.scan import diagonal_scan
from archspec.kernels.softmax import softmax_attention

B, H, K, V = 8, 2, 32, 32
WINDOW = 64
CHUNK = 16

Inputs = dict[str, Tensor]
Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One rule with one kind of gate.

    Args:
        family: the kernel's folder.
        name: what distinguishes the case.
        inputs: makes fp32 inputs of T tokens.
        chunked, reference: the kernel's forms, from inputs to o [B, T, H, V].
        loop: the tight loop.
    """

    family: str
    name: str
    inputs: Callable[[int], Inputs]
    chunked: Form
    reference: Form
    loop: Form


def _inputs(*names: str) -> Callable[[int], Inputs]:
    def make(T: int) -> Inputs:
        torch.manual_seed(0)
        key = normalize(torch.randn(B, T, H, K), dim=-1)
        all_inputs = {
            "q": torch.randn(B, T, H, K),
            "k": key,
            "v": torch.randn(B, T, H, V),
            "beta": torch.rand(B, T, H),
            "g": -0.1 * torch.rand(B, T, H),
            "g_key": -0.1 * torch.rand(B, T, H, K),
            "a": -key,
            "b": key * torch.rand(B, T, H, K),
            "step": 0.5 * torch.rand(B, T, H),
            "momentum": 0.9 * torch.rand(B, T, H),
            "x": torch.randn(B, T, H, K),
            "step_size": 0.1 * torch.rand(B, T, H),
            "w1": torch.randn(B, H, K, 2 * K) / K**0.5,
            "w2": torch.randn(B, H, 2 * K, V) / (2 * K) ** 0.5,
        }
        return {name: all_inputs[name] for name in names}

    return make


def _forms(op: Callable[..., tuple[Tensor, Any]], **options: Any) -> tuple[Form, Form]:
    """Return an op's chunked and reference forms, key-channel decays under the name g."""

    def form(backend: str) -> Form:
        def run(**inputs: Tensor) -> Tensor:
            if "g_key" in inputs:
                inputs["g"] = inputs.pop("g_key")
            o: Tensor = op(**inputs, **options, backend=backend)[0]
            return o

        return run

    return form("chunked"), form("reference")


def _tokens(x: Tensor) -> tuple[Tensor, ...]:
    """Cut [B, T, H, ...] into T tensors [B * H, ...]."""
    return x.transpose(1, 2).flatten(0, 1).unbind(1)


def _joined(outputs: list[Tensor]) -> Tensor:
    """Return T rows [B * H, 1, V] as [B, T, H, V]."""
    return torch.cat(outputs, 1).view(B, H, len(outputs), -1).transpose(1, 2)


def _decays(g: Tensor | None, g_key: Tensor | None) -> tuple[Tensor, ...]:
    """Return alpha of every token, [B * H, 1 or K, 1]."""
    alpha = g.exp()[..., None, None] if g is not None else _given(g_key).exp()[..., None]
    return _tokens(alpha)


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("a decay is needed: g or g_key")
    return x


def linear_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_key: Tensor | None = None) -> Tensor:
    """S = alpha S + k v^T; o = S^T q."""
    state = q.new_zeros(B * H, K, V)
    outputs = []
    rows = zip(_tokens((q * K**-0.5)[..., None, :]), _tokens(k[..., None]), _tokens(v[..., None, :]), strict=True)
    for (query, key, value), alpha in zip(rows, _decays(g, g_key), strict=True):
        state = torch.baddbmm(state * alpha, key, value)
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def delta_loop(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, g_key: Tensor | None = None
) -> Tensor:
    """S = alpha S; S += k (beta (v - S^T k))^T; o = S^T q."""
    state = q.new_zeros(B * H, K, V)
    outputs = []
    strong = _tokens(k[..., None, :] * beta[..., None, None])
    written = _tokens((v * beta[..., None])[..., None, :])
    rows = zip(_tokens((q * K**-0.5)[..., None, :]), _tokens(k[..., None]), strong, written, strict=True)
    for (query, key, reader, value), alpha in zip(rows, _decays(g, g_key), strict=True):
        state = state * alpha
        state = torch.baddbmm(state, key, torch.baddbmm(value, reader, state, alpha=-1))
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def dplr_loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g_key: Tensor) -> Tensor:
    """S = alpha S + b (a^T S) + k v^T; o = S^T q."""
    state = q.new_zeros(B * H, K, V)
    outputs = []
    writers = _tokens(torch.stack([b, k], dim=-1))  # [B * H, K, 2]
    rows = zip(_tokens((q * K**-0.5)[..., None, :]), writers, _tokens(a[..., None, :]), strict=True)
    values = _tokens(v[..., None, :])
    for (query, writer, reader), value, alpha in zip(rows, values, _decays(None, g_key), strict=True):
        written = torch.cat([torch.bmm(reader, state), value], dim=1)  # [B * H, 2, V]
        state = torch.baddbmm(state * alpha, writer, written)
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def momentum_delta_loop(q: Tensor, k: Tensor, v: Tensor, step: Tensor, momentum: Tensor, g: Tensor) -> Tensor:
    """P = mu P + theta k (v - S^T k)^T; S = alpha S + P; o = S^T q."""
    state = moving = q.new_zeros(B * H, K, V)
    outputs = []
    parts = (q[..., None, :] * K**-0.5, k[..., None, :], v[..., None, :], step[..., None, None])
    rows = zip(*(_tokens(x) for x in parts), _tokens(momentum[..., None, None]), _decays(g, None), strict=True)
    for query, key, value, theta, mu, alpha in rows:
        error = torch.baddbmm(value, key, state, alpha=-1)
        moving = torch.baddbmm(mu * moving, (theta * key).mT, error)
        state = torch.addcmul(moving, alpha, state)
        outputs.append(torch.bmm(query, state))
    return _joined(outputs)


def scan_loop(x: Tensor, g_key: Tensor) -> Tensor:
    """h = alpha h + x."""
    state, outputs = torch.zeros_like(x[:, 0]), []
    for alpha, written in zip(g_key.exp().unbind(1), x.unbind(1), strict=True):
        state = torch.addcmul(written, alpha, state)
        outputs.append(state)
    return torch.stack(outputs, 1)


def softmax_loop(window: int | None) -> Form:
    """o_t = softmax(q_t K^T) V over the tokens so far, or the last of them."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # [B * H, T, ...]
        keys = keys.transpose(1, 2)
        outputs = []
        for t, query in enumerate(_tokens((q * K**-0.5)[..., None, :])):
            seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
            outputs.append(torch.bmm(torch.bmm(query, keys[..., seen]).softmax(-1), values[:, seen]))
        return _joined(outputs)

    return run


def _network(linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    return x + linear("w2", silu(linear("w1", x)))


def _l2(prediction: Tensor, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return prediction - value


def _online(backend: str) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, step_size: Tensor, g: Tensor) -> Tensor:
        o, _ = online_memory(
            q, k, v, {"w1": w1, "w2": w2}, network=_network, error=_l2, step_size=step_size, log_decay=g,
            chunk_size=CHUNK, backend=backend,
        )  # fmt: skip
        return o

    return run


def online_loop(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, step_size: Tensor, g: Tensor) -> Tensor:
    """The same two-layer memory with its gradients by hand, anchored at every CHUNK-th token."""
    first, second = w1.flatten(0, 1), w2.flatten(0, 1)
    rows = (_tokens(x[..., None, :]) for x in (q, k, v))
    gates = (_tokens(x[..., None, None]) for x in (step_size, g.exp()))
    outputs = []
    for t, (query, key, value, step, alpha) in enumerate(zip(*rows, *gates, strict=True)):
        if t % CHUNK == 0:
            anchor1, anchor2 = first, second
        inner = torch.bmm(key, anchor1)
        gate = inner.sigmoid()
        hidden = inner * gate
        error = step * (torch.baddbmm(key - value, hidden, anchor2))
        back = torch.bmm(error, anchor2.transpose(1, 2)) * (gate + hidden * (1 - gate))
        first = torch.baddbmm(first * alpha, key.transpose(1, 2), back, alpha=-1)
        second = torch.baddbmm(second * alpha, hidden.transpose(1, 2), error, alpha=-1)
        outputs.append(torch.baddbmm(query, silu(torch.bmm(query, first)), second))
    return _joined(outputs)


CASES = (
    Case("linear", "scalar decay", _inputs("q", "k", "v", "g"), *_forms(linear_attention), linear_loop),
    Case("linear", "key decay", _inputs("q", "k", "v", "g_key"), *_forms(linear_attention), linear_loop),
    Case("delta", "scalar decay", _inputs("q", "k", "v", "beta", "g"), *_forms(delta_rule), delta_loop),
    Case("delta", "key decay", _inputs("q", "k", "v", "beta", "g_key"), *_forms(delta_rule), delta_loop),
    Case("dplr", "key decay", _inputs("q", "k", "v", "a", "b", "g_key"), *_forms(dplr_rule), dplr_loop),
    Case(
        "momentum_delta",
        "scalar decay",
        _inputs("q", "k", "v", "step", "momentum", "g"),
        *_forms(momentum_delta_rule),
        momentum_delta_loop,
    ),
    Case("scan", "elementwise decay", _inputs("x", "g_key"), *_forms(diagonal_scan), scan_loop),
    Case("softmax", "all tokens", _inputs("q", "k", "v"), *_forms(softmax_attention), softmax_loop(None)),
    Case(
        "softmax",
        f"window {WINDOW}",
        _inputs("q", "k", "v"),
        *_forms(softmax_attention, window=WINDOW),
        softmax_loop(WINDOW),
    ),
    Case(
        "online",
        f"two layers, anchor {CHUNK}",
        _inputs("q", "k", "v", "w1", "w2", "step_size", "g"),
        _online("chunked"),
        _online("reference"),
        online_loop,
    ),
)
