"""The p-norm error: l = 1/p ||M(k) - v||_p^p (Miras equations 10 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from archspec.component import Number, Positive
from archspec.families import Bias

if TYPE_CHECKING:
    from torch import Tensor


class Lp(Bias, kind="lp"):
    """l = 1/p sum_i |r_i|^p; delta = sign(r) |r|^(p-1), so that p = 2 *is* l2 and p = 1 is l1.

    Miras prints the gradient with the factor p of ||r||_p^p; it belongs to the step size here. ``smoothing: a``
    replaces sign(r) by tanh(a r) and |r| by sqrt(r^2 + 1e-6), which makes delta differentiable at 0; the loss is
    then the one without smoothing, which delta approximates.

    Source: Miras (arXiv:2504.13173), equations 10 and 11; the smoothing is in its section on Moneta, without a.
    """

    p: Annotated[Number, Field(ge=1)]
    smoothing: Positive | None = None

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        return (prediction - value).abs().pow(self.p).sum(-1) / self.p

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r = prediction - value
        if self.smoothing is not None:
            return (self.smoothing * r).tanh() * (r.square() + 1e-6).sqrt().pow(self.p - 1)
        if self.p == 1:
            return r.sign()
        # |r|^(p-1) has an infinite slope at 0 for p < 2: keep 0 out of the power, so that no gradient is NaN.
        size = r.abs()
        safe = size.where(size > 0, 1.0)
        return r.sign() * safe.pow(self.p - 1).where(size > 0, 0.0)
