"""Adaptive computation time over the passes of a loop: every token decides after how many it halts.

Source: Graves (arXiv:1603.08983); the equations are with ``archspec.schema.Halt``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared
from archspec.schema import Halt


@dataclass
class Pondering:
    """Where every token of a stretch stands between two passes.

    Args:
        x: the states after the last pass, [B, T, D]; those of halted tokens stand still.
        spent: the halting probability used up so far, [B, T, 1].
        running: which tokens have not halted, [B, T, 1].
        result: what the loop returns of the passes so far, [B, T, D].
    """

    x: Tensor
    spent: Tensor
    running: Tensor
    result: Tensor


class HaltingModule(Declared):
    """The halting unit of one loop."""

    weight: Tensor
    offset: Tensor

    def __init__(self, halt: Halt, model_dim: int) -> None:
        super().__init__()
        self.halt = halt
        self.declare(halt.parameters(model_dim))

    def forward(self, x: Tensor, before: Pondering | None, carry: Carry, *, last: bool) -> tuple[Tensor, Pondering]:
        """Take a pass's result x [B, T, D]; return what the next pass reads, or after the last what the loop returns.

        The ponder cost goes to the carry after the last pass: its mean over the tokens of the stretch.
        """
        before = self._start(x) if before is None else before
        x = torch.where(before.running, x, before.x)
        chance = torch.sigmoid((x @ self.weight + self.offset).to(before.spent.dtype))
        halts = before.running & (before.spent + chance >= 1 - self.halt.epsilon)
        if last:
            halts = before.running
        remainder = 1 - before.spent
        share = torch.where(halts, remainder, chance) * before.running
        after = Pondering(
            x=x,
            spent=before.spent + share,
            running=before.running & ~halts,
            result=before.result + (share * x).to(x.dtype),
        )
        if self.halt.ponder:
            # R of the tokens that halt now, and one for every token that took this pass: N + R in the end.
            cost = before.running.to(remainder.dtype) + torch.where(halts, remainder, torch.zeros_like(remainder))
            carry.auxiliary.append(self.halt.ponder * cost.mean())
        return (after.result if last else x), after

    def _start(self, x: Tensor) -> Pondering:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        none = torch.zeros(*x.shape[:2], 1, dtype=dtype, device=x.device)
        return Pondering(x, none, none == 0, torch.zeros_like(x))
