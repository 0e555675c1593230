"""The exponential kernel's features, cut at a degree (Atlas)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from archspec.component import Integer
from archspec.families import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Exponential(FeatureMap, kind="exponential"):
    """phi(x)_m = x^m / sqrt(m!) for every exponent m = (m_1, .., m_d) of total at most ``degree``.

    phi(q) . phi(k) = sum_n (q . k)^n / n!, n = 0 .. degree: the first terms of exp(q . k), whose whole feature map has
    infinitely many channels. C(d + degree, degree) channels, each monomial once.

    Source: Atlas (arXiv:2505.23735), phi* of section 4, which needs a cut wherever a memory is not the tokens.
    """

    degree: Annotated[Integer, Field(ge=1, le=4)] = 3

    def output_dim(self, dim: int) -> int:
        return math.comb(dim + self.degree, self.degree)

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        import torch

        found = [torch.ones_like(x[..., :1])]
        for n in range(1, self.degree + 1):
            channels, weights = _monomials(x.shape[-1], n)
            product = torch.tensor(weights, dtype=x.dtype, device=x.device)
            for chosen in torch.tensor(channels, device=x.device).unbind(1):
                product = product * x[..., chosen]
            found.append(product)
        return torch.cat(found, dim=-1)


@cache
def _monomials(dim: int, degree: int) -> tuple[list[tuple[int, ...]], list[float]]:
    """Return the channels that each monomial of one degree multiplies, and 1 / sqrt(m!) of its exponents m."""
    channels = list(combinations_with_replacement(range(dim), degree))
    factorials = [math.prod(math.factorial(times) for times in Counter(chosen).values()) for chosen in channels]
    return channels, [factorial**-0.5 for factorial in factorials]
