"""Rotary position encoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.component import Count, Positive
from archspec.families import Position

if TYPE_CHECKING:
    from torch import Tensor


class Rope(Position, kind="rope"):
    """Rotate the pair (x_i, x_{i + K/2}) by the angle t theta^(-2i/K); an odd last channel stays as it is.

    Args:
        theta: base of the frequencies.
        modulo: count positions modulo this (TTT restarts them with each mini-batch).

    Source: Su et al. (arXiv:2104.09864), equation 34, in the half-split layout of Llama.
    """

    theta: Positive = 10000.0
    modulo: Count | None = None

    def apply(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        import torch

        half = x.shape[-1] // 2
        index = positions % self.modulo if self.modulo else positions
        # Angles in fp64: fp32 loses them beyond a few thousand tokens.
        frequency = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / max(half, 1))
        angle = index.to(torch.float64)[:, None, None] * frequency  # [T, 1, K/2]
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)
