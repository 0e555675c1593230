"""A positive gate: step sizes and thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Softplus(Gate, kind="softplus"):
    """softplus(z) = log(1 + exp(z))."""

    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate

        return activate("softplus", z)
