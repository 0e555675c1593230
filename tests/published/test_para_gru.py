"""ParaGRU (Danieli et al. 2025): the state enters each gate channel by channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cells import State, by_head, diagonal, offset, over_tokens, sigmoid
from .plain import Parameters, hold


def para_gru(x: Tensor, p: Parameters) -> tuple[Tensor, State]:
    """h_t = (1 - z) h_{t-1} + z tanh(a r h_{t-1} + B x + b), z and r sigmoids of a h_{t-1} + B x + b."""

    def token(t: int, state: State) -> tuple[Tensor, State]:
        h = state["h"]
        z, r = (
            sigmoid(by_head(p, n, "input", x[:, t]) + diagonal(p, n, "previous_h", h) + offset(p, n))
            for n in ("z", "r")
        )
        g = torch.tanh(by_head(p, "g", "input", x[:, t]) + diagonal(p, "g", "reset", r * h) + offset(p, "g"))
        h = (1 - z) * h + z * g
        return h @ p["output"], {"h": h}

    return over_tokens(x, ("h",), token)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_para_gru(backend: str) -> None:
    hold("para_gru", para_gru, backend)
