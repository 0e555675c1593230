"""The exponential of every channel as a feature map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Exp(FeatureMap, kind="exp"):
    """phi(x) = exp(x), channel by channel; positive, and unbounded unless a norm comes before.

    Not the features of the exponential kernel: those are ``exponential``.
    """

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return x.exp()
