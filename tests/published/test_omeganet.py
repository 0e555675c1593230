"""OmegaNet (Behrouz et al. 2025, "ATLAS"): the loss of the last eight tokens, gradients at the start of chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.blocks.carry import Carry

from .miras import LAYERS, Weights, gate_input, kept, memory, projected, read_out, slopes, started
from .plain import Parameters, hold, perturbed, sigmoid, silu

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
    step = sigmoid(gate_input(x, p, "update/step_size", HEADS))[..., None] / 32
    g = sigmoid(gate_input(x, p, "bias/window/weights", HEADS)) / 8
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


def grown(name: str, mixer: str) -> float:
    """Return |W| after 128 times one token, whose steps and window weights are the largest there are, over |W_0|."""
    model = perturbed(name, "auto", narrow=f"layout: {{repeat: 1, of: main}}\nblocks: {{main: {{mixer: {mixer}}}}}")
    layers: Any = model.layers
    module = layers[0].mixer
    with torch.no_grad():
        for gate in ("bias/window/weights", "update/step_size"):
            module.get_parameter(f"gates.{gate}.source.weight").fill_(1)
        carry = Carry(None, 0)
        module(torch.ones(1, 128, model.spec.model_dim, dtype=torch.float64), carry)
        end = {path.rpartition(".")[2]: weight for path, weight in carry.outgoing.items() if ".dual." in path}
        start = dict(module.named_parameters())
        return max(float(weight.norm() / start[f"memory.{layer}"].norm()) for layer, weight in end.items())


@pytest.mark.parametrize("name", ["omeganet", "dot"])
def test_a_repeated_token_at_the_largest_steps_leaves_the_memory_its_size(name: str) -> None:
    assert grown(name, "{num_heads: 4}") < 2


def test_twice_over_the_bound_the_same_equations_diverge() -> None:
    doubled = "{num_heads: 4, bias: {window: {weights: {scale: 1}}}, update: {step_size: {scale: 0.0078125}}}"
    assert grown("omeganet", doubled) > 1e6
