"""Two nodes mixed by a third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.cells import Node, Operand, Pair, product

if TYPE_CHECKING:
    from torch import Tensor


class Blend(Node, kind="blend"):
    """a + by (b - a), for ``of: [a, b]``: a where ``by`` is 0, b where it is 1."""

    of: Pair
    by: Operand

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for factors in (*self.of, self.by) for name in factors))

    def value(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], prepared: Tensor | None) -> Tensor:
        first, second = (product(values, factors) for factors in self.of)
        return first + product(values, self.by) * (second - first)
