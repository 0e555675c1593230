"""The SiLU gate of read-outs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Silu(Gate, kind="silu"):
    """z sigmoid(z)."""

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z * z.sigmoid()
