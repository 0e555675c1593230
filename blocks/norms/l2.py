"""Unit length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Norm

if TYPE_CHECKING:
    from torch import Tensor


class L2Norm(Norm, kind="l2"):
    """x / sqrt(||x||^2 + eps)."""

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.normalization import l2_norm

        return l2_norm(x, self.eps)
