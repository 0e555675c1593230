"""Deep linear attention (Behrouz et al. 2025, "ATLAS"): the dot bias on a deep memory, chunks of 16."""

from __future__ import annotations

import pytest
from torch import Tensor

from .miras import LAYERS, gate_input, kept, memory, projected, read_out, slopes, started
from .plain import Parameters, hold, sigmoid, silu
from .test_omeganet import CHUNK, HEADS, NARROW


def deep_linear_attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """W_t = a_t W_{t-1} + eta_t grad <M(W*, k_t), v_t>; o_t = M(W_t, q_t)."""
    q, k, v, state = projected(x, p, HEADS)
    decay = sigmoid(gate_input(x, p, "retention/gate", HEADS))[..., None]
    step = sigmoid(gate_input(x, p, "update/step_size", HEADS))[..., None] / 32
    w = anchor = started(p, x.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        if t % CHUNK == 0:
            anchor = w
        rise = slopes(anchor, k[:, t], v[:, t], p)
        w = {name: decay[:, t] * w[name] + step[:, t] * rise[name] for name in LAYERS}
        outputs.append(memory(w, q[:, t], p))
    gate = silu(x @ p["gates.readout/gate.source.weight"])
    return read_out(outputs, gate, p), {**kept(dual=w, anchor=anchor), **state}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dla(backend: str) -> None:
    hold("dla", deep_linear_attention, backend, narrow=NARROW)
