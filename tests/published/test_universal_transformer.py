"""The Universal Transformer (Dehghani et al. 2018) with adaptive computation time (Graves 2016)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .plain import TOLERANCE, Parameters, error, heads, hold, perturbed

PASSES, EPSILON, PONDER = 6, 0.01, 0.01


def attention(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """o_t = sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j, without positions of its own."""
    q, k, v = (heads(x @ p[f"projections.{name}.source.weight"], 4) for name in ("query", "key", "value"))
    rows = []
    for t in range(x.shape[1]):
        scores = torch.exp(torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(q.shape[-1]))
        weights = scores / scores.sum(-1, keepdim=True)
        rows.append(torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1]))
    return torch.stack(rows, dim=1).flatten(2) @ p["output"], {"keys": k, "values": v}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_universal_transformer(backend: str) -> None:
    hold("universal_transformer", attention, backend, length=20)


def code(place: int, dim: int) -> Tensor:
    """Return sin(place / 10000^(2j / dim)) for the first half of the channels, the cosines for the second."""
    angle = place * torch.tensor([10000.0 ** (-2 * j / dim) for j in range(dim // 2)], dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()])


def layer_norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)
    return p[f"{name}.weight"] * scaled + p[f"{name}.shift"]


def one_pass(s: Tensor, number: int, p: Parameters) -> Tensor:
    """Return LN(a + FFN(a)), a = LN(s + Attention(s)), with the codes of position and pass added to s first."""
    codes = torch.stack([code(t, s.shape[-1]) for t in range(s.shape[1])]) + code(number, s.shape[-1])
    s = s + codes
    mixer = {name.removeprefix("layers.0.mixer."): tensor for name, tensor in p.items() if ".mixer." in name}
    a = layer_norm(s + attention(s, mixer)[0], p, "layers.0.mixer_norm")
    hidden = (a @ p["layers.0.feed_forward.up"]).clamp(min=0)
    return layer_norm(a + hidden @ p["layers.0.feed_forward.down"], p, "layers.0.channel_norm")


def test_every_token_halts_by_itself() -> None:
    """Tokens are looked at one by one: when each halts, what it leaves for others to read, and what it costs."""
    enlarged = {"halting.0.weight": 20.0, "halting.0.offset": -0.5}
    model = perturbed("universal_transformer", "auto", enlarged)
    p = dict(model.named_parameters())
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(6))
    s = p["embedding.weight"][tokens] * math.sqrt(p["embedding.weight"].shape[1])
    halted: dict[tuple[int, int], int] = {}
    spent = {(b, t): torch.zeros((), dtype=torch.float64) for b in range(2) for t in range(9)}
    result = {place: torch.zeros(s.shape[-1], dtype=torch.float64) for place in spent}
    cost = torch.zeros((), dtype=torch.float64)
    for number in range(PASSES):
        moved = one_pass(s, number, p)
        rows = {place: s[place] if place in halted else moved[place] for place in spent}
        s = torch.stack([torch.stack([rows[b, t] for t in range(9)]) for b in range(2)])
        for place in spent:
            if place in halted:
                continue
            h = 1 / (1 + torch.exp(-(s[place] @ p["halting.0.weight"] + p["halting.0.offset"])[0]))
            if number == PASSES - 1 or spent[place] + h >= 1 - EPSILON:
                remainder = 1 - spent[place]
                result[place] = result[place] + remainder * s[place]
                halted[place] = number + 1
                cost = cost + (number + 1 + remainder)
            else:
                result[place] = result[place] + h * s[place]
                spent[place] = spent[place] + h
    assert len(set(halted.values())) > 2, halted
    y = torch.stack([torch.stack([result[b, t] for t in range(9)]) for b in range(2)])
    wanted = layer_norm(y, p, "norm") @ p["embedding.weight"].t()
    output = model(tokens)
    assert error(output.logits, wanted) < TOLERANCE
    assert output.auxiliary_loss is not None
    wanted_cost = PONDER * cost / len(spent)
    assert error(output.auxiliary_loss, wanted_cost) < TOLERANCE
    names = ["halting.0.weight", "halting.0.offset", "embedding.weight", "layers.0.feed_forward.up"]
    ours, theirs = (
        torch.autograd.grad(logits.square().sum() + 100 * loss, [p[name] for name in names])
        for logits, loss in ((output.logits, output.auxiliary_loss), (wanted, wanted_cost))
    )
    for name, mine, plain in zip(names, ours, theirs, strict=True):
        assert error(mine, plain) < TOLERANCE, name
