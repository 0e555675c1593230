"""The product of two gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate, Per, joint_granularity

if TYPE_CHECKING:
    from torch import Tensor


class Product(Gate, kind="product"):
    """g h. S4D (arXiv:2206.11893) turns by frequency times step; H3 (arXiv:2212.14052) skips by a learned shifted key.

    Args:
        first, second: g and h; either may name a gate under ``gates:``.
    """

    first: Gate
    second: Gate

    has_source: ClassVar[bool] = False
    factors: ClassVar[tuple[str, ...]] = ("first", "second")

    @property
    def granularity(self) -> Per:
        return joint_granularity(self.first.granularity, self.second.granularity)

    @property
    def value_range(self) -> tuple[float, float]:
        pairs = [(a, b) for a in self.first.value_range for b in self.second.value_range]
        ends = [self.scale * (a * b if a and b else 0.0) for a, b in pairs]  # 0 times infinity is 0 here
        return min(ends), max(ends)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return known["first"] * known["second"]

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        # The sum of the logarithms, so that a product that underflows keeps its gradient.
        if all(f"log.{name}" in known for name in self.factors):
            return known["log.first"] + known["log.second"]
        return super().log_value(z, known)
