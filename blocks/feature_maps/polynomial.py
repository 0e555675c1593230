"""All monomials up to a degree, with learned coefficients (Atlas)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from archspec.component import Integer
from archspec.families import FeatureMap
from archspec.initial import Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Polynomial(FeatureMap, kind="polynomial"):
    """phi_p(x) = [sqrt(a_n) x^(n)] for n = 0 .. degree, x^(n) all products of n channels (d^n of them, ordered).

    phi(q) . phi(k) = sum_n a_n (q . k)^n; the a_n are learned, start at 1/n! (the exponential's) and are kept
    positive by learning their logarithm.

    Source: Atlas (arXiv:2505.23735), section 3.2.
    """

    degree: Annotated[Integer, Field(ge=1, le=3)] = 2

    def output_dim(self, dim: int) -> int:
        return sum(dim**n for n in range(self.degree + 1))

    def parameters(self, num_heads: int, dim: int) -> Parameters:
        return {
            f"a{n}": Parameter((num_heads, 1), Initial(constant=1.0 / math.factorial(n)), logarithm=True)
            for n in range(self.degree + 1)
        }

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        import torch

        power = torch.ones_like(x[..., :1])
        found = []
        for n in range(self.degree + 1):
            found.append((parameters[f"a{n}"] / 2).exp().to(x.dtype) * power)
            power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        return torch.cat(found, dim=-1)
