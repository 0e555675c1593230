"""No feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Identity(FeatureMap, kind="identity"):
    """phi(x) = x."""

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x
