"""LSTM (Hochreiter and Schmidhuber 1997) with forget gates (Gers et al. 2000)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cells import State, dense, offset, over_tokens, sigmoid
from .plain import Parameters, hold


def lstm(x: Tensor, p: Parameters) -> tuple[Tensor, State]:
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t); f, i, o sigmoids and g a tanh of W x + U h_{t-1} + b."""

    def token(t: int, state: State) -> tuple[Tensor, State]:
        z = {n: dense(p, n, "input", x[:, t]) + dense(p, n, "previous_h", state["h"]) + offset(p, n) for n in "fiog"}
        c = sigmoid(z["f"]) * state["c"] + sigmoid(z["i"]) * torch.tanh(z["g"])
        h = sigmoid(z["o"]) * torch.tanh(c)
        return h @ p["output"], {"c": c, "h": h}

    return over_tokens(x, ("c", "h"), token)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lstm(backend: str) -> None:
    hold("lstm", lstm, backend)
