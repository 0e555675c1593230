"""What a named gate leaves of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Text
from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Complement(Gate, kind="complement"):
    """1 - g, g the gate ``of`` under the mixer's ``gates:``.

    With g the decay, what is forgotten makes room for what is written: HGRN2 (arXiv:2404.07904), k = 1 - alpha.
    """

    of: Text

    has_source: ClassVar[bool] = False

    def needs(self) -> tuple[str, ...]:
        return (f"gates.{self.of}",)

    def derived_range(self, low: float, high: float) -> tuple[float, float]:
        return 1 - high, 1 - low

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return 1 - known[f"gates.{self.of}"]
