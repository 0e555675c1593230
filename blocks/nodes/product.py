"""Products of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.cells import Arithmetic

if TYPE_CHECKING:
    from torch import Tensor


class Product(Arithmetic, kind="product"):
    """a b ..."""

    def combine(self, operands: list[Tensor]) -> Tensor:
        found = operands[0]
        for operand in operands[1:]:
            found = found * operand
        return found
