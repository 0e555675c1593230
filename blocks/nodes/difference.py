"""The difference of two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.cells import Pairwise

if TYPE_CHECKING:
    from torch import Tensor


class Difference(Pairwise, kind="difference"):
    """a - b"""

    def combine(self, operands: list[Tensor]) -> Tensor:
        first, second = operands
        return first - second
