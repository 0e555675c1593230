"""Momentum whose steps are orthogonalised by Newton-Schulz iterations (Atlas)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from archspec.component import Integer
from archspec.families import Gate, Step, Update

if TYPE_CHECKING:
    from torch import Tensor


NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


class Muon(Update, kind="muon"):
    """S_t = mu_t S_{t-1} - dl/dW;  W_t = alpha_t W_{t-1} + eta_t NS(S_t).

    NS: X = S / ||S||_F, then X <- a X + b (X X^T) X + c (X X^T)^2 X with (a, b, c) = (3.4445, -4.775, 2.0315), as
    often as ``iterations`` says: it drives the singular values of S towards one.

    Source: Atlas (arXiv:2505.23735), equation 33; Muon (Jordan et al., 2024) for the coefficients.
    """

    momentum: Gate = Field(default_factory=lambda: Gate.parse(0.0))
    iterations: Annotated[Integer, Field(ge=0, le=20)] = 5

    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        moving = step.gates["momentum"] * buffers["momentum"] - step.gradient
        return step.gates["step_size"] * self.orthogonalised(moving), {"momentum": moving}

    def momentum_input(self, step: Step) -> Tensor:
        return -step.gradient

    def orthogonalised(self, moving: Tensor) -> Tensor:
        """Return NS(S) for S [..., d_in, d_out]."""
        a, b, c = NEWTON_SCHULZ
        tall = moving.shape[-2] > moving.shape[-1]
        x = moving.transpose(-1, -2) if tall else moving
        # The floor under the root keeps the gradient finite at S = 0, where the step is 0.
        x = x / x.square().sum((-2, -1), keepdim=True).clamp(min=1e-14).sqrt()
        for _ in range(self.iterations):
            gram = x @ x.transpose(-1, -2)
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.transpose(-1, -2) if tall else x
