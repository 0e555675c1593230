"""Regression robust to a shift of the value: the worst value within a radius (Miras equation 17)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Positive
from archspec.families import Bias

if TYPE_CHECKING:
    from torch import Tensor


class Robust(Bias, kind="robust"):
    """l = max over ||d|| <= radius of 1/2 ||r + d||^2 = 1/2 ||r||^2 + radius ||r|| + radius^2 / 2.

    delta = r (1 + radius / ||r||), with ||r|| at least 1e-6: the error never falls below the radius, except at 0.
    Source: Miras (arXiv:2504.13173), equation 17.
    """

    radius: Positive = 0.1

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        square = (prediction - value).square().sum(-1)
        return 0.5 * square + self.radius * square.clamp(min=1e-12).sqrt() + 0.5 * self.radius**2

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r = prediction - value
        return r * (1 + self.radius / r.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt())
