"""OmegaNet (Behrouz et al. 2025, "ATLAS"): the loss of the last eight tokens, gradients at the start of chunks."""

from __future__ import annotations

import pytest
from torch import Tensor

from .miras import LAYERS, Weights, gate_input, kept, memory, projected, read_out, slopes, started
from .plain import Parameters, hold, sigmoid, silu, softplus

CHUNK, WINDOW, HEADS = 16, 8, 4
NARROW = "blocks: {main: {mixer: {num_heads: 4, key_dim: 6, value_dim: 6}}}"


def omega(anchor: Weights, k: Tensor, v: Tensor, g: Tensor, t: int, p: Parameters) -> Weights:
    """Return the gradient of sum_i g_i 1/2 ||M(k_i) - v_i||^2 over the window that ends at t."""
    total: Weights = {}
    for i in range(max(0, t - WINDOW + 1), t + 1):
        found = slopes(anchor, k[:, i], g[:, i] * (memory(anchor, k[:, i], p) - v[:, i]), p)
        total = {name: total.get(name, 0) + found[name] for name in LAYERS}
    return total


def waiting(k: Tensor, v: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Return what of the last tokens the next window needs, [B, H, 7, d]."""
    last = {"key": k, "value": v, "bias.window.weights": g}
    return {f"window.{name}": tensor[:, 1 - WINDOW :].transpose(1, 2) for name, tensor in last.items()}


def omega_net(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """W_t = a_t W_{t-1} - eta_t grad of the windowed loss; o_t = M(W_t, q_t)."""
    q, k, v, state = projected(x, p, HEADS)
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))[..., None]
    step = softplus(gate_input(x, p, "update/step_size", HEADS))[..., None]
    g = sigmoid(gate_input(x, p, "bias/window/weights", HEADS))
    w = anchor = started(p, x.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        if t % CHUNK == 0:
            anchor = w
        slope = omega(anchor, k, v, g, t, p)
        w = {name: decay[:, t] * w[name] - step[:, t] * slope[name] for name in LAYERS}
        outputs.append(memory(w, q[:, t], p))
    gate = silu(x @ p["gates.readout/gate.source.weight"])
    return read_out(outputs, gate, p), {**kept(dual=w, anchor=anchor), **waiting(k, v, g), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_omeganet(backend: str) -> None:
    hold("omeganet", omega_net, backend, narrow=NARROW)
