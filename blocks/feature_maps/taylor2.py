"""The second-order Taylor expansion of the exponential (Based)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Taylor2(FeatureMap, kind="taylor2"):
    """phi(x) = [1, x d^-1/4, x_i^2 / sqrt(2 d), x_i x_j / sqrt(d) (i < j)], so that phi(q) . phi(k) = 1 + s + s^2 / 2
    with s = q . k / sqrt(d). Packed: 1 + d + d (d + 1) / 2 channels.

    Source: Based (arXiv:2402.18668), section 4.
    """

    def output_dim(self, dim: int) -> int:
        return 1 + dim + dim * (dim + 1) // 2

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        import torch

        dim = x.shape[-1]
        rows, columns = torch.triu_indices(dim, dim, 1, device=x.device)
        cross = x[..., rows] * x[..., columns] * dim**-0.5
        return torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, x.square() * (2 * dim) ** -0.5, cross], dim=-1)
