"""The write strength that keeps a decaying state's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Normalizing(Gate, kind="normalizing"):
    """sqrt(1 - alpha^2), alpha the retention's decay: white inputs of variance 1 then give states of variance 1.

    Source: LRU (arXiv:2303.06349), equation 7, at its initial value; Griffin (arXiv:2402.19427), equation 4.
    """

    has_source: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def needs(self) -> tuple[str, ...]:
        return ("retention.gate",)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        import torch

        return (-torch.expm1(2 * known["retention.gate"])).clamp(min=1e-12).sqrt()
