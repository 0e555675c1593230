"""RWKV-7 (Peng et al. 2025): the time mix of a layer after the first."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .plain import Parameters, heads, hold, sigmoid, unit

HEADS = 4
FIRST = "first.mixer.value.4.16"  # values of the first layer, by their place and size


def time_mix(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """S_t = S_{t-1} (diag(w_t) - p_t^T (a_t * p_t)) + v_t^T k~_t in the paper's layout, S [V, K]."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    state = {}

    def mixed(source: str, kept: str) -> Tensor:
        state[f"{kept}.shift"] = x[:, -1:]
        mix = p[f"{source}.source.shift_mix"]
        return (1 - mix) * x + mix * before

    def low_rank(source: Tensor, name: str) -> Tensor:
        z = source @ p[f"{name}.source.down"] @ p[f"{name}.source.up"] + p[f"{name}.source.offset"]
        return heads(z, HEADS)

    r = heads(mixed("projections.query", "query") @ p["projections.query.source.weight"], HEADS)
    k = heads(mixed("projections.key", "key") @ p["projections.key.source.weight"], HEADS)
    x_v = mixed("streams.shifted", "streams.shifted")
    v = heads(x_v @ p["projections.value.source.weight"], HEADS)
    v = v + (p[FIRST] - v) * sigmoid(low_rank(x_v, "projections.value.blend"))

    decay = "gates.retention/gate"
    inner = torch.tanh(mixed(decay, "retention.gate") @ p[f"{decay}.source.down"])
    w = torch.exp(
        -math.exp(-0.5) * sigmoid(heads(inner @ p[f"{decay}.source.up"] + p[f"{decay}.source.offset"], HEADS))
    )
    a = sigmoid(low_rank(mixed("gates.update/step_size", "update.step_size"), "gates.update/step_size"))
    inner = sigmoid(mixed("gates.readout/gate", "readout.gate") @ p["gates.readout/gate.source.down"])
    g = inner @ p["gates.readout/gate.source.up"]

    removal = unit(k * p["gates.bias/read_key/scale.raw"][..., 0])
    k = k * (1 + (a - 1) * p["gates.gates/written.inner.mix.raw"][..., 0])
    s = torch.zeros(x.shape[0], HEADS, v.shape[-1], k.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        p_t = removal[:, t]
        transition = torch.diag_embed(w[:, t]) - p_t[..., :, None] * (a[:, t] * p_t)[..., None, :]
        s = s @ transition + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("bhvk,bhk->bhv", s, r[:, t]))
    o = torch.stack(outputs, dim=1)
    centred = o - o.mean(-1, keepdim=True)
    o = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 64e-5)
    o = o * p["norm.weight"] + p["norm.shift"]  # of each channel of each head
    bonus = (r * k * p["gates.readout/skip/gate.weight"][..., 0]).sum(-1, keepdim=True)
    return ((o + bonus * v).flatten(2) * g) @ p["output"], {"dual.w": s.mT, **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rwkv7(backend: str) -> None:
    hold("rwkv7", time_mix, backend, length=70, layer=1, shared={FIRST: 16})
