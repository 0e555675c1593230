"""Moneta (Behrouz et al. 2025), equations 10, 11 and 24 at (p, q) = (3, 4), gradients at the start of chunks of 16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .miras import LAYERS, Weights, by_layer, gate_input, kept, memory, projected, read_out, slopes, started
from .plain import Parameters, hold, sigmoid, softplus

CHUNK, HEADS = 16, 4


def normalised(a: Weights) -> Weights:
    """Return W = A / ||A||_q^(q - 2) at q = 4, one norm for each matrix."""
    return {name: m / torch.sqrt((m**4).sum((-2, -1), keepdim=True)) for name, m in a.items()}


def moneta(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """A_t = a_t A_{t-1} - eta_t grad; W_t = a_t W_{t-1} - eta_t grad inside a chunk, A / ||A||_4^2 at its end."""
    q, k, v, state = projected(x, p, HEADS)
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))
    step = softplus(gate_input(x, p, "update/step_size", HEADS))
    a = started(p, x.shape[0])
    w = anchor = normalised(a)
    outputs = []
    for t in range(x.shape[1]):
        r = memory(anchor, k[:, t], p) - v[:, t]
        # sign(r) |r|^(p - 1), smoothed; the factor p is part of the step size.
        g = slopes(anchor, k[:, t], torch.tanh(10 * r) * (r * r + 1e-6), p)
        alpha, eta = by_layer(decay[:, t]), by_layer(step[:, t])
        a = {name: alpha[name] * a[name] - eta[name] * g[name] for name in LAYERS}
        w = {name: alpha[name] * w[name] - eta[name] * g[name] for name in LAYERS}
        outputs.append(memory(w, q[:, t], p))
        if (t + 1) % CHUNK == 0:
            w = anchor = normalised(a)
    gate = x @ p["gates.readout/gate.source.weight"]
    return read_out(outputs, gate, p), {**kept(dual=a, anchor=anchor, linear=w), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_moneta(backend: str) -> None:
    hold("moneta", moneta, backend)
