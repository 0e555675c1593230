"""Rotary positions whose scores fade with distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.blocks.positions.rope import Rope
from archspec.component import Positive

if TYPE_CHECKING:
    from torch import Tensor


class Xpos(Rope, kind="xpos"):
    """Rope, then channel pair i of a query times s_i^(t / scale_base) and of a key times s_i^(-t / scale_base).

    s_i = (2i/K + gamma) / (1 + gamma), so that the scores of high frequencies fade with the distance. Keys grow as
    they are counted from the start: at the defaults the fastest pair's reach fp32's end after some 36,000 tokens;
    ``modulo`` restarts the count, and a larger ``scale_base`` fades more slowly.

    Args:
        theta: base of the frequencies.
        modulo: count positions modulo this.
        scale_base: tokens over which pair i fades by s_i.
        gamma: how fast the fastest pair fades.

    Source: Sun et al. (arXiv:2212.10554), algorithm 1, in the half-split layout of Llama.
    """

    scale_base: Positive = 512.0
    gamma: Positive = 0.4

    def apply(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        import torch

        half = x.shape[-1] // 2
        index = positions % self.modulo if self.modulo else positions
        pair = torch.arange(half, device=x.device, dtype=torch.float64)
        base = (pair / max(half, 1) + self.gamma) / (1 + self.gamma)
        sign = 1.0 if is_query else -1.0
        scale = base ** (sign * index.to(torch.float64)[:, None, None] / self.scale_base)  # [T, 1, K/2]
        both = torch.cat([scale, scale, scale.new_ones(*scale.shape[:-1], x.shape[-1] - 2 * half)], dim=-1)
        return super().apply(x, positions, is_query=is_query) * both.to(x.dtype)
