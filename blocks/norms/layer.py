"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Flag
from archspec.families import Norm
from archspec.initial import ONES, ZEROS, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class LayerNorm(Norm, kind="layer"):
    """weight * (x - mean) / sqrt(var + eps) + shift. Source: Ba et al. (arXiv:1607.06450)."""

    affine: Flag = True

    def parameters(self, dim: int) -> Parameters:
        return {"weight": Parameter((dim,), ONES), "shift": Parameter((dim,), ZEROS)} if self.affine else {}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.normalization import layer_norm

        return layer_norm(x, parameters.get("weight"), parameters.get("shift"), self.eps)
