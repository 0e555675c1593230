"""Dot-product similarity: l = -<M(k), v> (Hebbian writing; linear attention on a matrix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Bias

if TYPE_CHECKING:
    from torch import Tensor


class Dot(Bias, kind="dot"):
    """l = -<M(k), v>; delta = -v, whatever the memory already says."""

    error: ClassVar = "value"

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -(prediction * value).sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return -value
