"""The largest of several nodes, channel by channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.cells import Arithmetic

if TYPE_CHECKING:
    from torch import Tensor


class Maximum(Arithmetic, kind="maximum"):
    """max(a, b, ...)"""

    def combine(self, operands: list[Tensor]) -> Tensor:
        found = operands[0]
        for operand in operands[1:]:
            found = found.maximum(operand)
        return found
