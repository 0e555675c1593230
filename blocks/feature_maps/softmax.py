"""Softmax over the channels of a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Softmax(FeatureMap, kind="softmax"):
    """phi(x) = softmax(x) over the last axis."""

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x.softmax(-1)
