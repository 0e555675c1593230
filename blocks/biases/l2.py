"""Squared error: l = 1/2 ||M(k) - v||^2 (regression; the delta rule on a matrix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Bias

if TYPE_CHECKING:
    from torch import Tensor


class L2(Bias, kind="l2"):
    """l = 1/2 ||r||^2 with r = M(k) - v; delta = r. (Papers that print ||r||^2 absorb the 2 in the step size.)"""

    error: ClassVar = "residual"

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (prediction - value).square().sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return prediction - value
