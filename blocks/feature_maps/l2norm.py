"""Length one as a feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Positive
from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class L2Norm(FeatureMap, kind="l2norm"):
    """phi(x) = x / sqrt(||x||^2 + eps), after the position (a projection's ``norm`` comes before it)."""

    eps: Positive = 1e-6

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt()
