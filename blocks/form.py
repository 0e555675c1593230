"""What a memory mixer is given beside its input: the form that runs its rule, and which tokens its memory takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities
from archspec.rule import Rule


class Form(Protocol):
    """One way to run a rule over a stretch of tokens; ``recurrence`` is the one that defines the result."""

    def __call__(
        self, rule: Rule, quantities: Quantities, state: MemoryState | None, position: int
    ) -> tuple[Tensor, MemoryState]:
        """Return the read-outs [B, T, H, V] and the state after the stretch."""


@dataclass(frozen=True)
class Routing:
    """Which tokens a memory takes: the others leave its weights as they are.

    Args:
        taken: 1 for a token that is written, 0 for one that is not, [B, T].
        strength: factor on the strength of its write, [B, T]; 0 where nothing is taken.
    """

    taken: Tensor
    strength: Tensor

    def applied(self, gates: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Return the gates with steps of size 0 and decays of 1 at the tokens that are not taken."""
        found = dict(gates)
        for path in Quantities.stepped_gates:
            if path in gates:
                strength = self.strength.repeat_interleave(steps, dim=1) if steps > 1 else self.strength
                found[path] = gates[path] * strength[:, :, None, None, None].to(gates[path].dtype)
        if "retention.gate" in gates:
            log_decay = gates["retention.gate"]
            # Not a product: a decay of 0 has the logarithm -inf.
            taken = self.taken[:, :, None, None, None] > 0
            found["retention.gate"] = torch.where(taken, log_decay, torch.zeros_like(log_decay))
        return found
