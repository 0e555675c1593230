"""Absolute error: l = ||M(k) - v||_1 ("value-less" writing, Miras equation 12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Bias

if TYPE_CHECKING:
    from torch import Tensor


class L1(Bias, kind="l1"):
    """l = sum_i |r_i|; delta = sign(r). At r_i = 0 the subgradient 0 is taken.

    Source: Miras (arXiv:2504.13173), equation 12.
    """

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return (prediction - value).abs().sum(-1)

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return (prediction - value).sign()
