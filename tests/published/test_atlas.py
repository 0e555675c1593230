"""Atlas (Behrouz et al. 2025), equation 33: orthogonalised momentum of the Omega rule, chunks of 16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .miras import LAYERS, gate_input, kept, memory, projected, read_out, started
from .plain import Parameters, hold, sigmoid, silu, softplus
from .test_omeganet import CHUNK, HEADS, NARROW, omega, waiting


def newton_schulz(s: Tensor) -> Tensor:
    """Return the fifth iterate of X <- a X + b (X X^T) X + c (X X^T)^2 X from S over its Frobenius norm."""
    x = s / torch.sqrt((s * s).sum((-2, -1), keepdim=True))
    for _ in range(5):
        # An odd polynomial of the singular values: the same from either side.
        x = 3.4445 * x - 4.775 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


def atlas(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = mu_t S_{t-1} - grad; W_t = a_t W_{t-1} + eta_t NS_5(S_t); o_t = M(W_t, q_t)."""
    q, k, v, state = projected(x, p, HEADS)
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))[..., None]
    mu = sigmoid(gate_input(x, p, "update/momentum", HEADS))[..., None]
    step = softplus(gate_input(x, p, "update/step_size", HEADS))[..., None]
    g = sigmoid(gate_input(x, p, "bias/window/weights", HEADS)) / 8
    w = anchor = started(p, x.shape[0])
    s = {name: torch.zeros_like(w[name]) for name in LAYERS}
    outputs = []
    for t in range(x.shape[1]):
        if t % CHUNK == 0:
            anchor = w
        slope = omega(anchor, k, v, g, t, p)
        s = {name: mu[:, t] * s[name] - slope[name] for name in LAYERS}
        w = {name: decay[:, t] * w[name] + step[:, t] * newton_schulz(s[name]) for name in LAYERS}
        outputs.append(memory(w, q[:, t], p))
    gate = silu(x @ p["gates.readout/gate.source.weight"])
    return read_out(outputs, gate, p), {**kept(dual=w, anchor=anchor, momentum=s), **waiting(k, v, g), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_atlas(backend: str) -> None:
    hold("atlas", atlas, backend, narrow=NARROW)
