"""The exponential gate of xLSTM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Exponential(Gate, kind="exponential"):
    """exp(z)."""

    bounds: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z.exp()

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z
