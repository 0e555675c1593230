"""sLSTM (Beck et al. 2024): exponential gates with a normaliser and a stabiliser, four heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .cells import State, by_head, offset, over_tokens, sigmoid
from .plain import Parameters, heads, hold, short_convolution, silu


def slstm(x: Tensor, p: Parameters) -> tuple[Tensor, State]:
    """c = e^(log f + m' - m) c' + e^(i - m) tanh z;  n likewise of 1;  h = sigmoid(o) c / n, m the larger exponent."""
    convolved, last = short_convolution(x, p["streams.conv.source.conv"])
    convolved = silu(convolved)

    def token(t: int, state: State) -> tuple[Tensor, State]:
        entering = {"i": ("conv", convolved), "f": ("conv", convolved), "z": ("input", x), "o": ("input", x)}
        i, f, z, o = (
            by_head(p, n, name, source[:, t]) + by_head(p, n, "previous_h", state["h"]) + offset(p, n)
            for n, (name, source) in entering.items()
        )
        log_f = -torch.log(1 + torch.exp(-f))
        m = torch.where(i > log_f + state["m"], i, log_f + state["m"])
        keep, write = torch.exp(log_f + state["m"] - m), torch.exp(i - m)
        c = keep * state["c"] + write * torch.tanh(z)
        n = keep * state["n"] + write
        h = sigmoid(o) * c / n
        return h, {"c": c, "n": n, "m": m, "h": h}

    read, state = over_tokens(x, ("c", "n", "m", "h"), token)
    grouped = heads(read, 4)
    centred = grouped - grouped.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    normed = p["readout.norm.weight"] * scaled + p["readout.norm.shift"]
    return normed.flatten(2), {**state, "streams.conv.conv": last}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_slstm(backend: str) -> None:
    hold("slstm", slstm, backend)
