"""Squared error with a weight for every value channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Bias, Gate

if TYPE_CHECKING:
    from torch import Tensor


class WeightedL2(Bias, kind="weighted_l2"):
    """l = 1/2 r^T Diag(w) r with r = M(k) - v; delta = w * r.

    Args:
        weights: w >= 0, per value channel or head. All 1 is l2.

    Source: Longhorn (arXiv:2407.14207), equation 5, whose regression weighs every channel by beta.
    """

    weights: Gate

    error: ClassVar = "weighted"

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (gates["weights"] * (prediction - value).square()).sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return gates["weights"] * (prediction - value)
