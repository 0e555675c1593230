"""ParaLSTM (Danieli et al. 2025): the state enters each gate channel by channel; input and forget gate are tied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cells import State, by_head, diagonal, offset, over_tokens, sigmoid
from .plain import Parameters, hold


def para_lstm(x: Tensor, p: Parameters) -> tuple[Tensor, State]:
    """c_t = f c_{t-1} + (1 - f) g, h_t = o tanh(c_t); f sees h and c of t - 1, g sees h, o sees h and c_t."""

    def token(t: int, state: State) -> tuple[Tensor, State]:
        z = {
            n: by_head(p, n, "input", x[:, t]) + diagonal(p, n, "previous_h", state["h"]) + offset(p, n) for n in "fgo"
        }
        f = sigmoid(z["f"] + diagonal(p, "f", "previous_c", state["c"]))
        c = f * state["c"] + (1 - f) * torch.tanh(z["g"])
        h = sigmoid(z["o"] + diagonal(p, "o", "c", c)) * torch.tanh(c)
        return h @ p["output"], {"c": c, "h": h}

    return over_tokens(x, ("c", "h"), token)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_para_lstm(backend: str) -> None:
    hold("para_lstm", para_lstm, backend)
