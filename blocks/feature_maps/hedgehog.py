"""The learned softmax features of Hedgehog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap
from archspec.initial import ZEROS, Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Hedgehog(FeatureMap, kind="hedgehog"):
    """phi(x) = softmax([2 (W x + b), -2 (W x + b)]), W per head, starting at the identity, b at zero.

    Source: Hedgehog (arXiv:2402.04347), section 4.
    """

    def output_dim(self, dim: int) -> int:
        return 2 * dim

    def parameters(self, num_heads: int, dim: int) -> Parameters:
        return {
            "weight": Parameter((num_heads, dim, dim), Initial(law="identity"), decayed=True),
            "offset": Parameter((num_heads, dim), ZEROS),
        }

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        import torch

        y = 2 * (torch.einsum("bthk,hkl->bthl", x, parameters["weight"]) + parameters["offset"])
        return torch.cat([y, -y], dim=-1).softmax(-1)
