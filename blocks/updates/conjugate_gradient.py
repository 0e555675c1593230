"""The whole regression solved for every query (MesaNet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from archspec.component import Integer
from archspec.families import Gate, Update

if TYPE_CHECKING:
    from torch import Tensor


class ConjugateGradient(Update, kind="conjugate_gradient"):
    """o_t = S_t^T (H_t + diag(ridge))^-1 q_t with H_t = a H_{t-1} + b k k^T and S_t = a S_{t-1} + b k v^T.

    The inverse is applied by ``iterations`` steps of the conjugate gradient method from zero; with as many as key
    channels it is exact in exact arithmetic. b is the step size.

    Source: MesaNet (arXiv:2506.05233), equations 5 to 7.
    """

    iterations: Annotated[Integer, Field(ge=1, le=1000)] = 30
    ridge: Gate = Field(default_factory=lambda: Gate.parse(1.0))

    solves: ClassVar[bool] = True

    def solve(self, apply: Callable[[Tensor], Tensor], target: Tensor, ridge: Tensor) -> Tensor:
        """Return x with apply(x) = target [..., K]; ``apply`` is symmetric and positive definite."""
        x = target * 0
        residual, direction = target, target
        square = residual.square().sum(-1, keepdim=True)
        for _ in range(self.iterations):
            image = apply(direction)
            # A residual of zero is a solution: the floors make the remaining steps stand still there.
            rate = square / (direction * image).sum(-1, keepdim=True).clamp(min=1e-30)
            x = x + rate * direction
            residual = residual - rate * image
            following = residual.square().sum(-1, keepdim=True)
            direction = residual + following / square.clamp(min=1e-30) * direction
            square = following
        return x
