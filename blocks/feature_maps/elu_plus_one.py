"""The positive feature map of linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class EluPlusOne(FeatureMap, kind="elu_plus_one"):
    """phi(x) = elu(x) + 1. Source: Katharopoulos et al. (arXiv:2006.16236), equation 7."""

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import elu

        return elu(x) + 1
