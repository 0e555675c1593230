"""The fused pieces that a compiled model may be given, as its modules see them.

Blocks never import kernels. A module that has ``pieces`` asks whether they serve its tensors, and runs its plain torch
form where they do not; which pieces have a kernel at all is for ``archspec.pieces`` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Pieces(Protocol):
    """Kernels for the chains of element-wise operations around a recurrence, and for sums of gradients."""

    def serves(self, x: Tensor) -> bool:
        """Whether the kernels take tensors of x's device and dtype."""

    def convolution(
        self, x: Tensor, weight: Tensor, offset: Tensor | None, activation: str, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return act(conv(x) + offset) [B, T, D], and the last tokens for what follows [B, width - 1, D]."""

    def norm(
        self, x: Tensor, kind: str, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
    ) -> Tensor:
        """Return the ``l2`` or ``rms`` norm of x [.., dim], times act(gate) when there is a gate."""

    def maps(self, x: Tensor, factors: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
        """Return x W + b for every (W [D, n], b [n] or None), whose products add up the gradient of x."""

    def gated_map(self, gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
        """Return (act(gate) up) W, keeping gate and up alone for the backward pass."""

    def log_decay(self, z: Tensor, log_rate: Tensor) -> Tensor:
        """Return -exp(log_rate) softplus(z) in fp32 for z [B, T, H, K]."""
