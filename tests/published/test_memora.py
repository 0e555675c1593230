"""Memora (Behrouz et al. 2025), equation 27, as printed: a softmax of decayed logarithms, with lag tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .miras import LAYERS, Weights, gate_input, kept, memory, projected, read_out, slopes, started
from .plain import Parameters, hold, sigmoid, softplus

CHUNK, HEADS = 16, 4


def distribution(z: Weights) -> Weights:
    """Return exp(z) over its sum along the inputs of each output."""
    powers = {name: torch.exp(m - m.amax(-2, keepdim=True)) for name, m in z.items()}
    return {name: m / m.sum(-2, keepdim=True) for name, m in powers.items()}


def memora(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """First of a chunk: W_t = softmax(a_t log W - eta_t grad), the anchor of the others, whose W runs linearly."""
    q, k, v, state = projected(x, p, HEADS)
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))[..., None]
    step = softplus(gate_input(x, p, "update/step_size", HEADS))[..., None]
    logits = started(p, x.shape[0])
    w = anchor = distribution(logits)
    ended = w  # the chunk's end as printed: a softmax of decayed logarithms of the one before
    outputs = []
    for t in range(x.shape[1]):
        alpha, eta = decay[:, t], step[:, t]
        g = slopes(anchor, k[:, t], memory(anchor, k[:, t], p) - v[:, t], p)
        logits = {name: alpha * logits[name] - eta * g[name] for name in LAYERS}
        ended = distribution({name: alpha * torch.log(ended[name]) - eta * g[name] for name in LAYERS})
        if t % CHUNK == 0:
            w = anchor = ended
        else:
            w = {name: alpha * w[name] - eta * g[name] for name in LAYERS}
        outputs.append(memory(w, q[:, t], p))
        if (t + 1) % CHUNK == 0:
            w = anchor = ended
    gate = x @ p["gates.readout/gate.source.weight"]
    return read_out(outputs, gate, p), {**kept(dual=logits, anchor=anchor, linear=w), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_memora(backend: str) -> None:
    hold("memora", memora, backend)
