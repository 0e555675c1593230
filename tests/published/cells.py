"""What the published loops of recurrent cells share: maps by raw parameter names, and the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plain import Parameters

State = dict[str, Tensor]


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + torch.exp(-x))


def dense(p: Parameters, node: str, name: str, x: Tensor) -> Tensor:
    """Return x W."""
    return x @ p[f"nodes.{node}.w_{name}"]


def by_head(p: Parameters, node: str, name: str, x: Tensor) -> Tensor:
    """Return the channels of each head times a matrix of its own."""
    weight = p[f"nodes.{node}.w_{name}"]
    parts = x.chunk(weight.shape[0], dim=-1)
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight, strict=True)], dim=-1)


def diagonal(p: Parameters, node: str, name: str, x: Tensor) -> Tensor:
    """Return x * w, channel by channel."""
    return x * p[f"nodes.{node}.w_{name}"].flatten()


def offset(p: Parameters, node: str) -> Tensor:
    """Return b."""
    return p[f"nodes.{node}.offset"].flatten()


def over_tokens(
    x: Tensor, names: tuple[str, ...], token: Callable[[int, State], tuple[Tensor, State]]
) -> tuple[Tensor, State]:
    """Return the outputs of all tokens and the state after the last, from a state of zeros as wide as x."""
    state = {name: torch.zeros_like(x[:, 0]) for name in names}
    outputs = []
    for t in range(x.shape[1]):
        output, state = token(t, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state
