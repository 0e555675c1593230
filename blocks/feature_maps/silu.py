"""SiLU as a feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Silu(FeatureMap, kind="silu"):
    """phi(x) = x sigmoid(x), after the norm and the position (a projection's ``activation`` comes before them)."""

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import silu

        return silu(x)
