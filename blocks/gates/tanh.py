"""A gate in (-1, 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Tanh(Gate, kind="tanh"):
    """tanh(z)."""

    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z.tanh()
