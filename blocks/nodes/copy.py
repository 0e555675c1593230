"""A node once more, for an activation of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.cells import Node, Operand, product

if TYPE_CHECKING:
    from torch import Tensor


class Copy(Node, kind="copy"):
    """act(a), for ``of: a``."""

    of: Operand

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.of))

    def value(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], prepared: Tensor | None) -> Tensor:
        return product(values, self.of)
