"""The token step of a decay, used as write strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Dt(Gate, kind="dt"):
    """The token step of the retention's gate.

    Delta of ``ssd`` (Mamba, arXiv:2312.00752: the write is Delta B x), or the token's weight of ``running_softmax``.
    """

    has_source: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    def needs(self) -> tuple[str, ...]:
        return ("retention.gate.token_step",)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return known["retention.gate.token_step"]
