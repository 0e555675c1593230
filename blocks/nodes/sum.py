"""Sums of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.cells import Arithmetic

if TYPE_CHECKING:
    from torch import Tensor


class Sum(Arithmetic, kind="sum"):
    """a + b + ..."""

    def combine(self, operands: list[Tensor]) -> Tensor:
        return sum(operands[1:], operands[0])
