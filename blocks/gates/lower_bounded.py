"""A sigmoid above a bound that is a gate itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate, Per

if TYPE_CHECKING:
    from torch import Tensor


class LowerBounded(Gate, kind="lower_bounded"):
    """b + (1 - b) sigmoid(z), b the gate ``bound``, of values in [0, 1].

    A constant bound is a sigmoid's ``floor``. Source: HGRN (arXiv:2311.04823), section 3.2, whose bounds rise from
    layer to layer: ``bound: {kind: rising, per: key}``.
    """

    bound: Gate

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def granularity(self) -> Per:
        varies = {self.per, self.bound.granularity} - {"head"}
        if not varies:
            return "head"
        return varies.pop() if len(varies) == 1 else "state"

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return known["bound"] + (1 - known["bound"]) * z.sigmoid()
