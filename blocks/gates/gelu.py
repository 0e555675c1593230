"""The GELU gate of read-outs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Gelu(Gate, kind="gelu"):
    """z Phi(z), Phi the normal distribution function, by its tanh form."""

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate

        return activate("gelu", z)
