"""GRU (Cho et al. 2014): the reset gate acts before the recurrent weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cells import State, dense, offset, over_tokens, sigmoid
from .plain import Parameters, hold


def gru(x: Tensor, p: Parameters) -> tuple[Tensor, State]:
    """h_t = z h_{t-1} + (1 - z) tanh(W x + U (r h_{t-1}) + b), z and r sigmoids of W x + U h_{t-1} + b."""

    def token(t: int, state: State) -> tuple[Tensor, State]:
        h = state["h"]
        z, r = (
            sigmoid(dense(p, n, "input", x[:, t]) + dense(p, n, "previous_h", h) + offset(p, n)) for n in ("z", "r")
        )
        g = torch.tanh(dense(p, "g", "input", x[:, t]) + dense(p, "g", "reset", r * h) + offset(p, "g"))
        h = z * h + (1 - z) * g
        return h @ p["output"], {"h": h}

    return over_tokens(x, ("h",), token)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gru(backend: str) -> None:
    hold("gru", gru, backend)
