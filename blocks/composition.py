"""Compositions as modules: mixers side by side and one after another, and the learned tokens before a sequence.

Every module here is called like the mixers it is made of: x [B, T, D] to [B, T, D], its state through the carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.initial import Parameters

Mix = Callable[[Tensor, Carry], Tensor]


def after_prefix(mix: Mix, prefix: Tensor | None, x: Tensor, carry: Carry) -> Tensor:
    """Return ``mix`` of x [B, T, D] behind learned tokens [P, D] that it reads before the first of a sequence.

    They are read once, at the start; they shift every position by P, and nothing is predicted of them.
    """
    if prefix is None:
        return mix(x, carry)
    count = prefix.shape[0]
    if carry.incoming is not None:
        return mix(x, replace(carry, position=carry.position + count))
    learned = prefix.to(x.dtype).expand(x.shape[0], -1, -1)
    return mix(torch.cat([learned, x], dim=1), carry)[:, count:]


class Composition(Declared):
    """Mixers with what the composition learns beyond them: ``weight`` and ``prefix``, where declared."""

    def __init__(self, mixers: Sequence[nn.Module], parameters: Parameters) -> None:
        super().__init__()
        self.of = nn.ModuleList(mixers)
        self.declare(parameters)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return [B, T, D] for x [B, T, D]; the state passes through ``carry``."""
        return after_prefix(self.mix, self.values().get("prefix"), x, carry)

    def mix(self, x: Tensor, carry: Carry) -> Tensor:
        """Return [B, T, D] for x [B, T, D], the learned tokens included."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes")


class ParallelModule(Composition):
    """y_1, ..., y_n of the same x, combined as ``blocks.mixers.parallel`` says."""

    def __init__(self, combine: str, mixers: Sequence[nn.Module], parameters: Parameters) -> None:
        super().__init__(mixers, parameters)
        self.combine = combine

    def mix(self, x: Tensor, carry: Carry) -> Tensor:
        outputs = torch.stack([mixer(x, carry) for mixer in self.of])  # [n, B, T, D]
        if self.combine == "product":
            return outputs.prod(0)
        if self.combine == "mean":
            return outputs.mean(0)
        if self.combine == "gated":
            gates = (x @ self.values()["weight"]).softmax(-1)  # [B, T, n]
            return torch.einsum("nbtd,btn->btd", outputs, gates)
        if self.combine == "concat":
            return torch.cat(list(outputs), dim=-1) @ self.values()["weight"]
        return outputs.sum(0)


class SerialModule(Composition):
    """f_n(... f_1(x))."""

    def mix(self, x: Tensor, carry: Carry) -> Tensor:
        for mixer in self.of:
            x = mixer(x, carry)
        return x
