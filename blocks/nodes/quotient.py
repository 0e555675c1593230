"""The quotient of two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archspec.cells import Pairwise

if TYPE_CHECKING:
    from torch import Tensor


class Quotient(Pairwise, kind="quotient"):
    """a / b; whoever writes it sees to it that b is not 0."""

    def combine(self, operands: list[Tensor]) -> Tensor:
        first, second = operands
        return first / second
