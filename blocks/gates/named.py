"""A reference to a gate that the mixer names under ``gates:``, for a quantity that several coordinates share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Text
from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Named(Gate, kind="named"):
    """The value of ``gates: {NAME: ...}``; a bare name that is no kind of gate is short for this."""

    name: Text

    has_source: ClassVar[bool] = False

    def needs(self) -> tuple[str, ...]:
        return (f"gates.{self.name}",)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return known[f"gates.{self.name}"]
