"""The product of two learned maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap
from archspec.initial import FAN_IN, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Hadamard(FeatureMap, kind="hadamard"):
    """phi(x) = (W x) * (U x), W and U learned per head: monomials of degree two, mixed by what is learned.

    Source: the default feature map of linear attention in flash-linear-attention.
    """

    def parameters(self, num_heads: int, dim: int) -> Parameters:
        shape = (num_heads, dim, dim)
        return {name: Parameter(shape, FAN_IN, decayed=True) for name in ("first", "second")}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        import torch

        first, second = (torch.einsum("bthk,hkl->bthl", x, parameters[name]) for name in ("first", "second"))
        return first * second
