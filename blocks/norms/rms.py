"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Flag
from archspec.families import Norm
from archspec.initial import ONES, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class RmsNorm(Norm, kind="rms"):
    """weight * x / sqrt(mean(x^2) + eps). Source: Zhang and Sennrich (arXiv:1910.07467)."""

    affine: Flag = True

    def parameters(self, dim: int) -> Parameters:
        return {"weight": Parameter((dim,), ONES)} if self.affine else {}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.normalization import rms_norm

        return rms_norm(x, parameters.get("weight"), self.eps)
